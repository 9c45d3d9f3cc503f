import os
import signal

import pytest

from pyrl.trainer.interrupt import StopRequest


def test_the_handler_says_nothing_and_the_loop_says_it_once():
    """A handler that printed could start in the middle of another print."""
    told = []
    with StopRequest(told.append) as stop:
        stop.announce()
        assert not told and not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and not told
        stop.announce()
        stop.announce()
        assert len(told) == 1 and "Ctrl-C again aborts" in told[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
