"""Drawn prompts: reproducible, and on one side each."""

import pytest

from pyrl.tasks import user_prompt
from pyrl.tasks.generated import HELDOUT_SHARE, generated, side


def draw(rng, index):
    return user_prompt(str(index), f"number {rng.randrange(10**6)}")


def test_the_same_on_every_call_and_never_on_both_sides():
    train = [p.text for p in generated("train", 300, draw, seed=1)]
    assert train == [p.text for p in generated("train", 300, draw, seed=1)]
    assert train != [p.text for p in generated("train", 300, draw, seed=2)]
    held = {p.text for s in range(3) for p in generated("heldout", 100, draw, seed=s)}
    assert not held & set(train)
    assert all(side(text) == "train" for text in train)


def test_sides_have_their_share():
    held = sum(side(str(i)) == "heldout" for i in range(20_000)) / 20_000
    assert abs(held - HELDOUT_SHARE) < 0.01


def test_bad_input():
    with pytest.raises(ValueError, match=r"train = 0: expected at least 1 prompt"):
        generated("train", 0, draw)
    only = "a" if side("a") == "train" else "b"
    with pytest.raises(ValueError, match="too few different prompts"):
        generated("heldout", 1, lambda rng, i: user_prompt("x", only))[0]
    with pytest.raises(ValueError, match="split='test'"):
        generated("test", 1, draw)
