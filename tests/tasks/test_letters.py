import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyrl.tasks import get_task

TASK = get_task("letters")


@given(st.text(alphabet="abcXYZ 1é"))
def test_reward_is_the_share_of_paying_characters(text):
    expected = len([c for c in text if "a" <= c <= "z"]) / len(text) if text else 0.0
    assert TASK.score(TASK.prompts("train")[0], text) == expected


def test_splits_and_sizes():
    task = get_task("letters", train=3, heldout=2, target="xy")
    train, held = task.prompts("train"), task.prompts("heldout")
    assert (len(train), len(held)) == (3, 2)
    assert not {p.messages for p in train} & {p.messages for p in held}
    assert task.score(train[0], "xaya") == 0.5


@pytest.mark.parametrize("options", [{"target": ""}, {"train": 0}, {"heldout": 0}])
def test_option_mistakes(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        get_task("letters", **options)
