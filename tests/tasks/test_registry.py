from pathlib import Path

import pytest

from pyrl.tasks import Prompt, Task, get_task, task_names

OWN = Path(__file__).with_name("own_tasks.py")


@pytest.mark.parametrize("name", task_names())
def test_every_built_in_task_follows_the_protocol(name):
    task = get_task(name)
    assert isinstance(task, Task) and task.name == name
    for split in ("train", "heldout"):
        prompts = task.prompts(split)
        assert isinstance(prompts[0], Prompt)
        assert prompts[-1] == prompts[len(prompts) - 1] and prompts[1:3] == [prompts[1], prompts[2]]
        with pytest.raises(IndexError):
            prompts[len(prompts)]
        assert isinstance(task.score(prompts[0], "some text"), float)
    with pytest.raises(ValueError, match=r"split='test'.*train, heldout"):
        task.prompts("test")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown task 'sums'.*instructions, letters.*module:Class"
    ):
        get_task("sums")


def test_unknown_option_lists_the_allowed_ones():
    with pytest.raises(ValueError, match=r"'letters' has no option 'traim'.*train=64, heldout=16"):
        get_task("letters", traim=3)


def test_an_option_of_the_wrong_kind_is_named():
    with pytest.raises(ValueError, match=r"'letters' with options .*many.*TypeError.*letters\.py"):
        get_task("letters", train="many")


def test_own_task_from_a_file_with_options():
    task = get_task(f"{OWN}:Good", bonus=0.5)
    assert task.score(task.prompts("train")[0], "nothing") == 0.5


def test_own_task_from_a_module(monkeypatch, tmp_path):
    (tmp_path / "my_module.py").write_text(OWN.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert get_task("my_module:Good").name == "good"


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("Missing", {}, r"has no class 'Missing'; it has .*Good"),
        ("not_a_class", {}, r"has no class 'not_a_class'"),
        ("Good", {"bonis": 1}, r"no option 'bonis'; its options: bonus=0.0"),
        ("Needs", {}, r"needs the option 'path'; its options: path, limit=3"),
        ("Empty", {}, r"the training split is empty"),
        ("Generator", {}, r"prompts\('train'\) returned generator; expected a sequence"),
        ("Strings", {}, r"prompts\('train'\)\[0\] is str; expected pyrl.tasks.Prompt"),
        ("Leaky", {}, r"held-out prompt 'heldout-0' is also a training prompt"),
        ("Nameless", {}, r"no string attribute 'name'"),
        ("Scoreless", {}, r"no method 'score'"),
    ],
)
def test_own_task_mistakes(target, options, message):
    with pytest.raises(ValueError, match=message):
        get_task(f"{OWN}:{target}", **options)


def test_missing_file_and_module_are_named():
    with pytest.raises(ValueError, match=r"no such file: nowhere/task.py"):
        get_task("nowhere/task.py:Task")
    with pytest.raises(ValueError, match=r"no module 'no_such_package.tasks' on the import path"):
        get_task("no_such_package.tasks:Task")


def test_an_error_inside_the_users_file_is_not_hidden(tmp_path):
    file = tmp_path / "task.py"
    file.write_text("import a_module_that_is_not_there\n")
    for _ in range(2):  # a half-loaded module must not be kept
        with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
            get_task(f"{file}:Task")
