import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.tasks import get_task
from pyrl.tasks.instructions.constraints import KINDS, clause, satisfied
from pyrl.tasks.instructions.text import (
    FUNCTION_WORDS,
    MAX_WORDS,
    META_WORDS,
    copies,
    is_sentence,
    mentions,
    words,
)
from pyrl.tasks.instructions.vocabulary import KEYWORDS, OPENERS, TOPICS, vocabulary

TASK = get_task("instructions")
ALL_KINDS = get_task("instructions", constraints=list(KINDS), per_prompt=1)
SEEDS = st.integers(0, 1000)


def perfect(topic, limit, constraint):
    """A sentence that meets every demand, built from the parameters."""
    kind = constraint["kind"]
    end = constraint.get("mark", ".")
    if kind == "opener":
        return f"{constraint['word']} the kind {topic} could be so big{end}"
    if kind == "last_word":
        return f"The kind {topic} could be {constraint['word']}{end}"
    extra = [constraint["word"]] if "word" in constraint else constraint.get("words", ["big"])
    text = f"The {topic} could be {' '.join(extra)}{end}"
    if kind == "lowercase":
        return text.lower()
    if kind == "uppercase":
        return text.upper()
    return f'"{text}"' if kind == "quotes" else text


@given(SEEDS, st.data())
def test_a_perfect_answer_pays_one_and_every_missed_demand_costs_its_share(seed, data):
    task = get_task("instructions", constraints=list(KINDS), seed=seed)
    prompts = task.prompts(data.draw(st.sampled_from(["train", "heldout"])))
    prompt = prompts[data.draw(st.integers(0, len(prompts) - 1))]
    topic, limit, (constraint,) = (prompt.data[k] for k in ("topic", "limit", "constraints"))
    answer = perfect(topic, limit, constraint)
    assert task.score(prompt, answer) == 1.0, (prompt.text, answer)
    assert task.score(prompt, f"\n {answer} ") == 1.0
    assert task.score(prompt, answer[: len(answer) // 2]) == 0.0

    def changed(old, new):
        return re.sub(rf"\b{old}\b", new.upper() if answer.isupper() else new, answer, flags=re.I)

    assert task.score(prompt, changed(topic, "zebu")) == pytest.approx(2 / 3)
    too_long = changed("be", "be in a red hut far from it and we or you")
    assert task.score(prompt, too_long) == pytest.approx(2 / 3)


@given(st.sampled_from(sorted(KINDS)), SEEDS)
def test_each_check_accepts_its_answer_and_rejects_a_neutral_one(kind, seed):
    lexicon = vocabulary("train", 0)
    rng = random.Random(seed)
    constraint = {"kind": kind, **KINDS[kind].draw(rng, lexicon, rng.choice(lexicon.keywords))}
    assert satisfied(constraint, perfect("cats", 14, constraint))
    assert not satisfied(constraint, "")
    other = "?" if kind == "ending" else "."
    assert not satisfied(constraint, f"Ah, Zebu is zzz{other}")
    assert clause(constraint).split()[0] in ("use", "start", "end", "have", "be")


@given(st.text(), st.sampled_from(sorted(KINDS)), SEEDS)
def test_no_text_breaks_the_scoring(text, kind, seed):
    task = get_task("instructions", constraints=[kind], seed=seed)
    prompt = task.prompts("heldout")[seed % 100]
    assert task.score(prompt, text) in (0.0, 1 / 3, 2 / 3, 1.0)
    assert get_task("instructions", constraints=[kind], reward="all").score(prompt, text) in (0, 1)


LETTERS = st.text("abcdefgh", min_size=1, max_size=5)


@given(st.lists(LETTERS, min_size=1, max_size=12), st.sampled_from("?!."))
def test_sentence_needs_words_grammar_and_variety(tokens, end):
    text = " ".join(tokens) + end
    distinct = set(tokens)
    expected = (
        len(tokens) >= 5
        and len(distinct) >= 0.8 * len(tokens)
        and len(distinct & FUNCTION_WORDS) >= 2
        and not distinct & META_WORDS
    )
    assert is_sentence(text) == expected
    assert not is_sentence(text[:-1])  # cut off
    assert not is_sentence(f"{text} {text}")


GOOD = "The old cat's garden isn't far from the river."


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.upper(),
        GOOD.lower(),
        f'"{GOOD}"',
        f"“{GOOD[:-1]}!”",
        "During the summer, people play tennis.",
        "It costs 3.5 dollars at the café, doesn’t it?",
        "Every dog - even a small one - is a friend (mostly).",
    ],
)
def test_sentences(text):
    assert is_sentence(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "cats cats cats cats cats cats.",
        "Cats river golden window bright old.",  # no grammar
        "The cat is it.",  # four words
        GOOD[:-1],
        GOOD[:-1] + "...",
        GOOD + ".",
        GOOD + '"',
        "“" + GOOD,
        GOOD[:-1] + ").",
        GOOD + " And",
        GOOD + " " + GOOD,
        "The old cat.\nThe garden is by the river.",
        'The word "river" is used here about the cats.',  # talks about its instructions
        "The old 猫 is in the garden by the river.",
        "The old cat is in the garden by the river 😉.",
        "The cat <b>is</b> in the garden by the river.",
        " ".join(
            ["The cat is", *(f"n{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(MAX_WORDS))]
        )
        + ".",
    ],
)
def test_not_sentences(text):
    assert not is_sentence(text)


def test_parroting_the_prompt_pays_nothing():
    prompt = TASK.prompts("train")[0]
    assert copies(prompt.text, prompt.text)
    assert TASK.score(prompt, prompt.text) == 0.0
    keyword = prompt.data["constraints"][0]["word"]
    topic = prompt.data["topic"]
    for hack in (f"{topic} {keyword}.", f"{keyword} " * 6 + topic + ".", keyword, topic):
        assert TASK.score(prompt, hack) == 0.0


@given(st.lists(LETTERS, max_size=20), st.lists(LETTERS, max_size=20))
def test_copies_finds_exactly_the_shared_runs(a, b):
    runs = [a[i : i + 3] for i in range(len(a) - 2)]
    expected = any(b[i : i + 3] in runs for i in range(len(b) - 2))
    assert copies(" ".join(b), " ".join(a), length=3) == expected


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_is_recognised_in_singular_and_plural(topic):
    assert mentions(f"Some {topic.upper()}!", topic)
    assert mentions(f"My {topic.removesuffix('s')}'s name", topic)
    assert not mentions("Nothing of the kind", topic)
    assert not mentions(f"x{topic}x", topic)


def test_vocabulary_is_consistent():
    for group in (TOPICS, KEYWORDS, OPENERS):
        assert len(set(group)) == len(group)
        assert all(words(w) == [w.lower()] for w in group)
    stems = {t.removesuffix("s") for t in TOPICS} | set(TOPICS)
    assert not stems & set(KEYWORDS)
    assert not (stems | set(KEYWORDS)) & (FUNCTION_WORDS | META_WORDS)


@settings(max_examples=20)
@given(SEEDS)
def test_splits_share_no_topic_keyword_or_opener(seed):
    train, held = vocabulary("train", seed), vocabulary("heldout", seed)
    for a, b, whole in zip(
        (train.topics, train.keywords, train.openers),
        (held.topics, held.keywords, held.openers),
        (TOPICS, KEYWORDS, OPENERS),
        strict=True,
    ):
        assert not set(a) & set(b) and sorted((*a, *b)) == sorted(whole)


def test_heldout_prompts_are_not_training_prompts():
    train = {p.text for p in TASK.prompts("train")}
    held = [p.text for p in TASK.prompts("heldout")]
    assert not train & set(held)
    assert len(train) > 5000 and len(set(held)) > 500
    first = TASK.prompts("heldout")[:64]
    assert len({p.data["topic"] for p in first}) >= 20  # evaluation sees the variety
    assert {p.data["constraints"][0]["kind"] for p in first} == {"keyword", "opener"}


def test_prompts_are_a_function_of_the_seed():
    again = get_task("instructions")
    assert again.prompts("train")[:50] == TASK.prompts("train")[:50]
    assert get_task("instructions", seed=1).prompts("train")[:50] != TASK.prompts("train")[:50]
    # Pinned: recorded runs stay comparable, on every Python.
    assert TASK.prompts("heldout")[0].text == PINNED


PINNED = 'Write a simple sentence about oranges, with at most 11 words. It must use the word "red".'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraints": ["rhyme"]}, r"unknown 'rhyme'; expected some of \['keyword'"),
        ({"constraints": []}, "no such combination"),
        ({"per_prompt": 3}, "per_prompt=3: no such combination"),
        ({"constraints": ["lowercase", "uppercase"], "per_prompt": 2}, "no such combination"),
        ({"reward": "binary"}, "reward='binary'"),
    ],
)
def test_option_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        get_task("instructions", **options)


def test_two_constraints_never_clash():
    task = get_task("instructions", constraints=list(KINDS), per_prompt=2, system="Be brief.")
    for prompt in task.prompts("train")[:300]:
        kinds = {c["kind"] for c in prompt.data["constraints"]}
        assert len(kinds) == 2
        assert not kinds >= {"lowercase", "uppercase"} and not kinds >= {"keyword", "keywords"}
        assert prompt.messages[0] == {"role": "system", "content": "Be brief."}
        assert " and " in prompt.text
