"""The task of reasoning-gym's puzzles: prompts, levels, scores."""

import hashlib
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

import pyrl.tasks
from pyrl.tasks import Scorer, get_task
from pyrl.tasks.logic import CURATED, EXCLUDED, LEVELS, Logic, gym

FEW = [
    "chain_sum",
    "countdown",
    "knights_knaves",
    "list_functions",
    "spiral_matrix",
    "word_sorting",
]


def solution(entry):
    """The entry's own, in the form that is asked for."""
    if entry["answer"] is not None:
        return str(entry["answer"])
    metadata = entry["metadata"]
    keys = ("possible_answer", "example_correct_answer")
    found = next(metadata[k] for k in keys if k in metadata)
    return found if isinstance(found, str) else json.dumps(found)


def tagged(text):
    return f"Hm.</think>So it is <answer>{text}</answer>."


def digest(names, level=None, count=2):
    """Of some prompts' texts."""
    texts = [gym.entry(n, level, random.Random(i))["question"] for n in names for i in range(count)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def in_another_process(names, hash_seed):
    code = (
        "import runpy, sys; sys.argv = ['']; "
        f"print(runpy.run_path({__file__!r})['digest']({list(names)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()[-1]


@pytest.mark.parametrize("name", FEW)
def test_own_solutions_score_one_and_wrong_answers_less(name):
    task = Logic(tasks=[name], level=None, train=5)
    for prompt in task.prompts("train"):
        assert prompt.domain == name
        entry = prompt.data["entry"]
        assert entry["question"].strip() in prompt.text and "<answer>" in prompt.text
        assert task.score(prompt, tagged(solution(entry))) == 1
        assert task.score(prompt, solution(entry)) == 0, "no tag"
        assert task.score(prompt, f"<answer>{solution(entry)}</answer></think>done") == 0
        for wrong in ("", "  ", "banana", "[", "x" * 100_000, "\x00١"):
            assert task.score(prompt, tagged(wrong)) < 0.2, (name, wrong[:10])
        assert task.answer(prompt, tagged(" a\n b ")) == "a b"
        assert task.answer(prompt, "a b") is None and task.answer(prompt, tagged(" ")) is None


def test_answers_are_not_evaluated(tmp_path):
    """Some scorers pass the answer to `eval`, or to sympy's `parse_expr`, which is no safer."""
    file = tmp_path / "made"
    for name in (*gym._EVAL, *gym._PARSED):
        entry = gym.entry(name, None, random.Random(0))
        for attack in (
            f"open({str(file)!r}, 'w')",
            f"[open({str(file)!r}, 'w')]",
            f"__import__('pathlib').Path({str(file)!r}).touch()",
            "().__class__.__base__.__subclasses__()",
            "exit()",
            "x.real",
            "9**9999",
        ):
            assert gym.score(name, None, entry, attack) == 0, (name, attack)
        assert gym.score(name, None, entry, solution(entry)) == 1
    assert not file.exists()


def test_an_integral_is_not_solved_by_naming_it():
    entry = gym.entry("simple_integration", None, random.Random(0))
    metadata = entry["metadata"]
    unsolved = f"Integral({metadata['integrand']}, {metadata['variable']})"
    assert gym.scorer("simple_integration", None).score_answer(unsolved, entry) == 1
    assert gym.score("simple_integration", None, entry, unsolved) == 0


def test_lists_are_still_read():
    entry = gym.entry("string_insertion", None, random.Random(0))
    assert gym.score("string_insertion", None, entry, repr(list(entry["answer"]))) == 0.1


def test_levels_change_the_puzzles():
    for name in ("chain_sum", "spiral_matrix"):
        sizes = []
        for level in (1, len(LEVELS[name])):
            task = Logic(tasks=[name], level=level, train=20)
            sizes.append(sum(len(p.text) for p in task.prompts("train")))
            assert {p.data["level"] for p in task.prompts("train")} == {level}
        assert sizes[1] > 1.3 * sizes[0]
    assert gym.config("chain_sum", 1).max_terms < gym.config("chain_sum", 3).max_terms
    mixed = Logic(tasks=["chain_sum"], level=[1, 3], train=60).prompts("train")
    assert {p.data["level"] for p in mixed} == {1, 3}
    # A puzzle with fewer levels stays at its last, one without has the package's default.
    assert gym.config("caesar_cipher", 9) == gym.config(
        "caesar_cipher", len(LEVELS["caesar_cipher"])
    )
    assert gym.config("acre", 9, seed=1) == gym.config("acre", None, seed=1)


def test_prompts_are_a_function_of_seed_split_and_index():
    task = Logic(tasks=FEW, train=20, heldout=6, seed=5)
    train, held = list(task.prompts("train")), list(task.prompts("heldout"))
    assert train == list(Logic(tasks=FEW, train=20, seed=5).prompts("train"))
    assert held == list(task.prompts("heldout"))
    assert train[3].text != Logic(tasks=FEW, seed=6).prompts("train")[3].text
    for prompt in train + held:
        assert pickle.loads(pickle.dumps(prompt)).text == prompt.text
    small = Logic(tasks=["gcd"], level=1, train=150, heldout=30)
    others = Logic(tasks=["gcd"], level=1, train=150, seed=8).prompts("train")
    known = {p.text for p in (*small.prompts("train"), *others)}
    assert not known & {p.text for p in small.prompts("heldout")}


def test_the_same_in_another_process():
    assert in_another_process(FEW, "7") == digest(FEW)


def test_global_generators_are_left_alone():
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist()
    gym.entry("pool_matrix", None, random.Random(0))
    gym.scorer("acre", 1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "arc_agi" else n for n in gym._REUSED]
)
def test_what_is_reused_is_what_a_new_one_makes(name):
    module = gym.load()
    for seed in (3, 2**31 - 1):
        new = module.DATASETS[name][0](gym.config(name, None, seed=seed, size=1))[0]
        assert gym._dataset(name, None, seed)[0] == new


def test_scoring_processes_load_the_package_once_and_survive():
    task = Logic(tasks=["prime_factorization"], train=3)
    prompts = list(task.prompts("train"))
    assert len(pickle.dumps(task)) < 2000
    with Scorer(task) as scorer:
        items = [(p, tagged(p.data["entry"]["answer"])) for p in prompts]
        found = scorer.score([*items, (prompts[0], tagged("banana"))], answers=True)
    assert [s.reward for s in found] == [1, 1, 1, 0]
    assert found[3].answer == "banana"


def test_options():
    assert isinstance(get_task("logic", tasks=["gcd"]), Logic)
    assert not getattr(Logic, "trusted", False)
    assert len(LEVELS) == 95 and len(EXCLUDED) == 11 and set(CURATED) < set(LEVELS)
    assert len(set(CURATED)) == len(CURATED) == 30
    system = Logic(tasks=["gcd"], system="Think.").prompts("heldout")[0]
    assert system.messages[0] == {"role": "system", "content": "Think."}
    for options, message in (
        ({"tasks": "some"}, "tasks='some': expected 'all', 'curated'"),
        ({"tasks": []}, r"tasks=\[\]"),
        ({"tasks": ["gdc"]}, "unknown 'gdc'; expected some of ab, acre"),
        ({"tasks": ["puzzle24"]}, "'puzzle24' is not used here .scorer"),
        ({"tasks": ["gcd"], "level": 9}, "level=9: expected 1 to 4.*'gcd' has most"),
        ({"tasks": ["acre"], "level": 1}, "level=1: acre have no levels"),
        ({"level": 0}, "level=0: expected 1 to"),
        ({"level": []}, r"level=\[\]"),
        ({"level": [True]}, r"level=\[True\]"),
        ({"level": [1.5]}, r"level=\[1.5\]"),
        ({"train": 0}, "train=0"),
        ({"heldout": 0}, "heldout=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Logic(**options)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "pyrl\[tasks\]"'):
        Logic()


def test_importing_the_tasks_does_not_import_the_package():
    code = (
        "import sys, pyrl.tasks, pyrl.tasks.logic, pyrl.tasks.ifeval\n"
        "pyrl.tasks.logic.Logic()\n"
        "assert not {'reasoning_gym', 'sympy', 'matplotlib', 'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert pyrl.tasks.task_names() == sorted(pyrl.tasks.task_names())


@pytest.mark.slow
def test_findings_still_hold():
    """Of every puzzle at every level, own solutions score 1; the first level is not the last."""
    for name, levels in LEVELS.items():
        seen = {}
        for level in (None, *range(1, len(levels) + 1)):
            entries = [gym.entry(name, level, random.Random(i)) for i in range(6)]
            seen[level] = [e["question"] for e in entries]
            for entry in entries:
                copied = pickle.loads(pickle.dumps(entry))
                own = solution(entry)  # an integral left as it is does not count here
                expected = 0 if "Integral" in own else 1
                assert gym.score(name, level, copied, own) == expected, (name, level)
        assert len(levels) < 2 or seen[1] != seen[len(levels)], name


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, None])
def test_no_curated_puzzle_is_won_by_one_answer_to_all(level):
    for name in CURATED:
        entries = [gym.entry(name, level, random.Random(i)) for i in range(60)]
        for text in {solution(e) for e in entries[:20]} | {"0", "1", "infeasible"}:
            paid = sum(gym.score(name, level, e, text) for e in entries[20:]) / 40
            assert paid <= 0.4, (name, text)


@pytest.mark.slow
def test_every_puzzle_is_the_same_in_another_process():
    assert in_another_process(LEVELS, "7") == in_another_process(LEVELS, "8")
