"""The task of verifiable instructions: its prompts, its rewards, and rows of Google's form."""

import itertools
import json
import pickle
import random
import sys
import types
from importlib import util
from pathlib import Path

import pytest

from pyrl.tasks import get_task
from pyrl.tasks.ifeval import CLASHES, KINDS, IFEval
from pyrl.tasks.ifeval import vocabulary as v
from pyrl.tasks.ifeval.google import _IDS as GOOGLE
from pyrl.tasks.ifeval.text import words

spec = util.spec_from_file_location("ifeval_writer", Path(__file__).with_name("ifeval_writer.py"))
writer = util.module_from_spec(spec)
spec.loader.exec_module(writer)


def can_be_kept(task, prompt):
    return any(task.score(prompt, text) == 1 for text in writer.drafts(prompt.data))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_drawn_instructions_can_be_kept_together(level):
    task = IFEval(level=level, reward="all")
    for prompt in task.prompts("train")[:150]:
        assert 1 <= len(prompt.data["instructions"]) <= level
        assert can_be_kept(task, prompt), prompt.text


@pytest.mark.slow
def test_every_pair_of_kinds_that_do_not_clash_can_be_kept():
    for pair in itertools.combinations(KINDS, 2):
        if frozenset(pair) in CLASHES:
            continue
        task = IFEval(kinds=pair, level=[2, 3], reward="all")
        for prompt in task.prompts("train")[:4]:
            assert can_be_kept(task, prompt), prompt.text


def test_prompts_have_no_clashes_and_every_kind_occurs():
    seen = set()
    for prompt in IFEval().prompts("train")[:2000]:
        kinds = [i["kind"] for i in prompt.data["instructions"]]
        seen.update(kinds)
        assert len(set(kinds)) == len(kinds)
        assert not any(frozenset(p) in CLASHES for p in itertools.combinations(kinds, 2)), kinds
        told = {i["kind"]: i for i in prompt.data["instructions"]}
        told_words = [
            w for kind in ("include", "avoid") for w in told.get(kind, {}).get("words", [])
        ]
        assert not set(told_words) & set(words(prompt.data["request"]))
        if {"include", "frequency"} <= told.keys():
            assert told["frequency"]["word"] not in told["include"]["words"]
    assert seen == set(KINDS)


def test_words_to_use_and_to_avoid_are_apart():
    fixed = [*v.OPENERS, *v.BEGINNINGS, *v.ENDINGS, *v.KEYS, *(r for s in v.REPLIES for r in s)]
    taken = {w for text in fixed for w in words(text)} | set(v.KEYWORDS)
    assert not set(v.AVOIDED) & taken
    assert not any("," in t or "?" in t for t in (*v.REQUESTS, *v.MANNERS, *v.TOPICS))
    assert all(any(w.startswith(stem.lower()) for w in words(t)) for t, stem in v.TOPICS.items())


def test_the_same_prompts_in_every_instance_and_disjoint_splits():
    task = IFEval(train=400, heldout=100, seed=3)
    train, held = task.prompts("train"), task.prompts("heldout")
    assert (len(train), len(held)) == (400, 100)
    assert list(train) == list(IFEval(train=400, seed=3).prompts("train"))
    assert train[0].text != IFEval(seed=4).prompts("train")[0].text
    other = IFEval(seed=9, train=400).prompts("train")
    requests = {p.data["request"] for p in (*train, *other)}
    assert not requests & {p.data["request"] for p in held}
    assert pickle.loads(pickle.dumps(train[7])) == train[7]


def test_rewards_are_shares_and_thoughts_do_not_count():
    task = IFEval(kinds=["no_commas", "lowercase"], level=2)
    prompt = next(p for p in task.prompts("train") if p.data["topic"] == "lighthouse")
    text = "the lighthouse stood on a rock and every night its lamp turned over the dark sea."
    assert task.score(prompt, text) == 1
    assert task.score(prompt, f"<think>Hm, A, B</think>\n{text}") == 1
    assert task.score(prompt, text.capitalize()) == 0.5
    assert task.score(prompt, text.replace(" and", ", and").capitalize()) == 0
    strict = IFEval(kinds=["no_commas", "lowercase"], level=2, reward="all")
    assert strict.score(prompt, text.capitalize()) == 0 and strict.score(prompt, text) == 1
    off_topic = text.replace("lighthouse", "tower")
    assert task.score(prompt, off_topic) == 0


def test_degenerate_completions_get_nothing():
    task = IFEval()
    for prompt in task.prompts("train")[:300]:
        keywords = " ".join(w for i in prompt.data["instructions"] for w in i.get("words", ["x"]))
        for text in (
            *("", "  \n ", "...", "?" * 50, "\x00\xff" * 20, "</think>", "no", "[" * 1000),
            *(keywords, keywords * 20, "word " * 200, prompt.text, prompt.text.lower(), "{}"),
        ):
            assert task.score(prompt, text) == 0, (prompt.text, text[:80])


def test_gibberish_is_no_answer():
    rng = random.Random(0)
    for kind in ("no_commas", "lowercase", "avoid", "sentences_max", "letter_max"):
        task = IFEval(kinds=[kind], level=1)
        for prompt in task.prompts("train")[:20]:
            heap = ["".join(rng.choices("bcdghkmnoprtuy", k=6)) for _ in range(14)]
            text = " ".join([prompt.data["topic"].lower(), "the of and", *heap]) + "."
            assert task.score(prompt, text) == 0, text


def test_json_names_the_topic():
    task = IFEval(kinds=["json"], level=1)
    for prompt in task.prompts("train")[:20]:
        keys = prompt.data["instructions"][0]["keys"]
        told = json.dumps(dict.fromkeys(keys, f"All about {prompt.data['topic']} and the old sea"))
        assert task.score(prompt, told) == 1
        assert task.score(prompt, told.replace(prompt.data["topic"], "nothing")) == 0


def test_hostile_text_is_scored_at_once():
    task = IFEval()
    prompts = task.prompts("train")[:20]
    for text in ("*[<<\"'.?,|{1. " * 80_000, "a" * 10**6, "١" * 10**6, "\n" * 10**6, "[" * 10**6):
        assert all(task.score(p, text) == 0 for p in prompts)
    assert all(0 <= task.score(p, "the sea, " * 20_000) <= 1 for p in prompts)


def test_options():
    assert isinstance(get_task("ifeval"), IFEval) and IFEval.trusted
    prompt = IFEval(system="Be brief.", kinds=["replies"]).prompts("train")[0]
    assert prompt.messages[0] == {"role": "system", "content": "Be brief."}
    assert prompt.text.startswith(prompt.data["request"]) and "?" in prompt.data["request"]
    for options, message in (
        ({"kinds": ["haiku"]}, "kinds: unknown 'haiku'"),
        ({"kinds": "json"}, "kinds='json': expected a list"),
        ({"level": 4}, "level=4: expected 1, 2 or 3"),
        ({"level": []}, r"level=\[\]"),
        ({"level": True}, "level=True"),
        ({"reward": "some"}, "reward='some'"),
        ({"train": 0}, "train=0"),
        ({"heldout": -1}, "heldout=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            IFEval(**options)


#: id → (kwargs, a text that keeps it)
ROWS = {
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "less than"},
        "only ONE",
    ),
    "change_case:english_capital": ({}, "ALL OF IT"),
    "change_case:english_lowercase": ({}, "all of it"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Do it now."}, "Do it now. Done"),
    "combination:two_responses": ({}, "one two three\n******\nfour five six"),
    "detectable_content:number_placeholders": ({"num_placeholders": 1}, "dear [name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Dear\nP.S. so it is"),
    "detectable_format:constrained_response": ({}, "My answer is maybe."),
    "detectable_format:json_format": ({}, '{"a": "b"}'),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Day", "num_sections": 1},
        "Day 1\nrest\nDay 2\nwork",
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n* two"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 1}, "it is *so*"),
    "detectable_format:title": ({}, "<<So>>"),
    "keywords:existence": ({"keywords": ["sea", "sun"]}, "sun and sea"),
    "keywords:forbidden_words": ({"forbidden_words": ["sea"]}, "sun"),
    "keywords:frequency": ({"keyword": "sea", "frequency": 2, "relation": "at least"}, "sea sea"),
    "keywords:letter_frequency": (
        {"letter": "a", "let_frequency": 2, "let_relation": "less than"},
        "sea",
    ),
    "language:response_language": ({"language": "ru"}, "Солнце встаёт"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "It is.\n\nSo it is.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a b c\n***\nd e f"),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "less than"},
        "One only.",
    ),
    "length_constraints:number_words": ({"num_words": 2, "relation": "at least"}, "two words"),
    "punctuation:no_comma": ({}, "none"),
    "startend:end_checker": ({"end_phrase": "The end."}, "So. The end."),
    "startend:quotation": ({}, '"So it is"'),
}


def with_rows(monkeypatch, rows):
    """pyrl.tasks.rows with these rows for any source."""
    module = types.ModuleType("pyrl.tasks.rows")
    module.load_rows = lambda source, *, split="train", subset=None: rows
    monkeypatch.setitem(sys.modules, "pyrl.tasks.rows", module)
    return IFEval(data="rows.jsonl", heldout=2)


def row(prompt, *instructions):
    ids, kwargs = zip(*instructions, strict=True)
    return {"prompt": prompt, "instruction_id_list": list(ids), "kwargs": list(kwargs)}


def test_rows_of_every_instruction_of_google(monkeypatch):
    assert ROWS.keys() == GOOGLE.keys() and len(GOOGLE) == 25
    every = dict.fromkeys(k for given, _ in ROWS.values() for k in given)
    rows = [row(f"Tell it, {i}.", (i, {**every, **given})) for i, (given, _) in ROWS.items()]
    task = with_rows(monkeypatch, rows)
    prompts = [*task.prompts("train"), *task.prompts("heldout")]
    assert len(prompts) == 25 and len(task.prompts("heldout")) == 2
    for prompt in prompts:
        name = prompt.text.removeprefix("Tell it, ").removesuffix(".")
        assert task.score(prompt, ROWS[name][1]) == 1, name
        assert task.score(prompt, "") == task.score(prompt, prompt.text) == 0, name
    assert len(pickle.dumps(task)) < 4000


def test_rows_that_cannot_be_checked(monkeypatch):
    good = [row(f"Tell {i}", ("punctuation:no_comma", {})) for i in range(3)]
    thai = row("Tell", ("language:response_language", {"language": "xx"}))
    task = with_rows(monkeypatch, [*good, thai, row("Tell", ("new:kind", {}))])
    assert len(task.prompts("train")) == 1
    for rows, message in (
        ([], "there are no rows"),
        ([thai], "no row can be checked; the last: .*language 'xx'"),
        ([{"prompt": "a"}], "rows.jsonl row 0: no field 'instruction_id_list'; it has prompt"),
        ([row("", ("punctuation:no_comma", {}))], "row 0: prompt=''"),
        (
            [{"prompt": "a", "instruction_id_list": [], "kwargs": []}],
            "0 instructions with 0 kwargs",
        ),
        ([row("a", ("keywords:existence", {}))], "row 0: kwargs {} of 'keywords:existence'"),
        ([row("a", ("keywords:existence", {"keywords": None}))], "row 0: kwargs"),
    ):
        with pytest.raises(ValueError, match=message):
            with_rows(monkeypatch, rows).prompts("train")
