"""Tasks as a user would write them, loaded by path: "own_tasks.py:Class"."""

import os
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np

from pyrl.tasks import Prompt, split_prompts


class Good:
    name = "good"

    def __init__(self, bonus=0.0):
        self.bonus = bonus

    def prompts(self, split):
        return split_prompts([Prompt(str(i), f"say {i}") for i in range(10)], split, heldout=3)

    def score(self, prompt, completion):
        return self.bonus + (completion == prompt.id)


class Bad(Good):
    """The completion says how the reward misbehaves."""

    def score(self, prompt, completion):
        return getattr(self, "do_" + completion)()

    def do_fine(self):
        return 0.5

    def do_true(self):
        return True

    def do_numpy(self):
        return np.float32(0.25)

    def do_numpy_bool(self):
        return np.bool_(True)

    def do_fraction(self):
        return Fraction(1, 4)

    def do_pid(self):
        return os.getpid()

    def do_raise(self):
        raise KeyError("no such answer")

    def do_raise_unprintable(self):
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError

        raise Mute

    def do_raise_huge(self):
        raise ValueError("x" * 10_000_000)

    def do_nan(self):
        return float("nan")

    def do_inf(self):
        return float("inf")

    def do_beyond_fp32(self):
        return -1e39

    def do_edge_of_fp32(self):
        return 3.4e38

    def do_overflow(self):
        return 10**400

    def do_string(self):
        return "0.5"

    def do_none(self):
        return None

    def do_array(self):
        return np.zeros(2)

    def do_complex(self):
        return 1j

    def do_unpicklable(self):
        return lambda: 1.0

    def do_huge(self):
        return "x" * 10_000_000

    def do_print(self):
        print("x" * 10_000_000)
        os.system("echo from a child")
        return 0.75

    def do_sys_exit(self):
        sys.exit(0)

    def do_exit(self):
        os._exit(3)

    def do_segfault(self):
        os.abort()

    def do_interrupt(self):
        raise KeyboardInterrupt

    def do_hang(self):
        time.sleep(600)

    def do_hang_with_child(self):
        child = subprocess.Popen(["sleep", "600"])
        with open(os.environ["PYRL_TEST_PIDS"], "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        child.wait()


class Answers(Bad):
    """The completion says how reward and answer misbehave: "REWARD ANSWER"."""

    def score(self, prompt, completion):
        return super().score(prompt, completion.split()[0])

    def answer(self, prompt, completion):
        return getattr(self, "say_" + completion.split()[1])()

    def say_four(self):
        return "4"

    def say_nothing(self):
        return None

    def say_subclass(self):
        class Loud(str):
            def __str__(self):
                return "loud"

        return Loud("quiet")

    def say_number(self):
        return 4

    def say_not_here(self):
        raise NotImplementedError("no notion of an answer")

    def say_hang(self):
        time.sleep(600)

    def say_exit(self):
        os._exit(4)


class TrustedAnswers(Answers):
    trusted = True


class Broken(Good):
    """It pickles, and cannot be unpickled."""

    def __reduce__(self):
        return (_fail, ())


def _fail():
    raise OSError("the data file is gone")


class Unsendable(Good):
    def __init__(self):
        super().__init__()
        self.judge = lambda text: 1.0


class Trusted(Bad):
    trusted = True


class Needs(Good):
    def __init__(self, path, *, limit=3):
        super().__init__()


class Empty(Good):
    def prompts(self, split):
        return []


class Generator(Good):
    def prompts(self, split):
        return (Prompt(str(i), "x") for i in range(3))


class Strings(Good):
    def prompts(self, split):
        return ["write a poem"]


class Leaky(Good):
    def prompts(self, split):
        return [Prompt(f"{split}-{i}", f"say {i}") for i in range(5)]


class Nameless:
    def prompts(self, split):
        return [Prompt("a", "a")]

    def score(self, prompt, completion):
        return 1.0


class Scoreless:
    name = "scoreless"

    def prompts(self, split):
        return [Prompt("a", "a")]


not_a_class = 3


class Number(Good):
    """The reward is the number that the completion says."""

    def score(self, prompt, completion):
        return float(completion)
