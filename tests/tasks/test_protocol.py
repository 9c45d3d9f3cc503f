import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyrl.tasks import LazyPrompts, Prompt, split_prompts, user_prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "text"), "Prompt.id=''"),
        (("a", ""), "prompt 'a': the text is empty"),
        (("a", ()), "there are no messages"),
        (("a", "text", {}, None), "prompt 'a': domain=None: expected a string"),
        (("a", ({"role": "user"},)), r"messages\[0\].*no string 'content'"),
        (
            ("a", ({"role": "user", "content": "x"}, "hi")),
            r"messages\[1\]='hi' has no string 'role'",
        ),
    ],
)
def test_prompt_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Prompt(*arguments)


def test_prompt_text_is_the_last_message():
    assert Prompt("a", "hello").text == "hello"
    assert user_prompt("a", "hello", answer=3) == Prompt(
        "a", ({"role": "user", "content": "hello"},), {"answer": 3}
    )
    assert user_prompt("a", "hello").text == "hello"


@given(st.integers(1, 50), st.data())
def test_lazy_prompts_index_like_a_list(length, data):
    made = [Prompt(str(i), "x") for i in range(length)]
    lazy = LazyPrompts(length, made.__getitem__)
    assert list(lazy) == made and len(lazy) == length
    picked = data.draw(st.slices(length))
    assert lazy[picked] == made[picked]
    index = data.draw(st.integers(-length, length - 1))
    assert lazy[index] == made[index]
    with pytest.raises(IndexError):
        lazy[-length - 1]


@given(st.lists(st.sampled_from("abcdefghij"), min_size=1), st.integers(1, 9), st.integers(0, 3))
def test_split_prompts_is_a_disjoint_partition(texts, heldout, seed):
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    if len(set(texts)) <= heldout:
        with pytest.raises(ValueError, match=f"heldout={heldout}.*distinct prompts"):
            split_prompts(prompts, "train", heldout=heldout, seed=seed)
        return
    train, held = (
        split_prompts(prompts, split, heldout=heldout, seed=seed) for split in ("train", "heldout")
    )
    assert sorted(p.id for p in train + held) == sorted(p.id for p in prompts)
    assert not {p.text for p in train} & {p.text for p in held}
    assert len({p.text for p in held}) == heldout
    assert train == split_prompts(prompts, "train", heldout=heldout, seed=seed)


def test_split_prompts_of_an_empty_data_set():
    with pytest.raises(ValueError, match="the data set is empty"):
        split_prompts([], "train", heldout=1)


def test_split_prompts_depends_on_the_seed():
    prompts = [Prompt(str(i), f"text {i}") for i in range(100)]
    held = [split_prompts(prompts, "heldout", heldout=10, seed=s) for s in (0, 1)]
    assert held[0] != held[1]
