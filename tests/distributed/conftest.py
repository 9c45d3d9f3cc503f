import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ranks():
    """ranks(world): the processes of a gloo group of that size, kept for the session."""
    spec = importlib.util.spec_from_file_location(
        "tests_ranks", Path(__file__).with_name("ranks.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a rank's function looks up its file
    spec.loader.exec_module(module)
    groups = {}

    def of(world):
        if world not in groups:
            groups[world] = module.Ranks(world)
        return groups[world]

    yield of
    for group in groups.values():
        group.close()
