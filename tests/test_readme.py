"""What README.md and the docs show runs as it is written."""

import re
import shlex
from pathlib import Path

import pytest

from pyrl.cli import _parser, _prepared
from pyrl.tasks import get_task, task_names

ROOT = Path(__file__).resolve().parents[1]


def blocks(language, file="README.md"):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(), re.M | re.S)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run_on_their_own(code, capsys):
    shown = {}
    exec(compile(code, "README.md", "exec"), shown)
    assert capsys.readouterr().out.count("tensor(") == 2
    metrics, parameters = shown["out"].metrics, shown["model"].parameters()
    assert metrics["tokens"] == 4 * 10 and metrics["clip_high"] == 0  # on-policy: the ratio is 1
    # log(1 / vocabulary) = -6.9 for a random model; masked positions would pull it towards 0.
    assert -7.5 < metrics["logprob_sum"] / metrics["tokens"] < -6.3
    assert all(p.grad is not None for p in parameters)


def test_commands_have_the_flags_they_show():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("pyrl ")]
    assert {command[1] for command in commands} >= {"train", "eval", "report"}
    for command in commands:
        rest, _ = _prepared(command[1:])
        assert not _parser().parse_known_args(rest)[1], command
        recipe = next((word for word in command if word.endswith(".toml")), "README.md")
        assert (ROOT / recipe).is_file()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    used = re.findall(r"make ([a-z-]+)", "\n".join(lines))
    assert used and set(used) <= set(targets)


def test_the_drop_in_step_trains():
    (code,) = blocks("python", "docs/drop-in.md")
    shown = {}
    exec(compile(code, "drop-in.md", "exec"), shown)
    assert shown["out"].metrics["tokens"] == 4 * 7
    assert all(p.grad is not None and p.grad.isfinite().all() for p in shown["model"].parameters())


def test_shared_prefixes_train_as_shown():
    (code,) = blocks("python", "docs/packing.md")
    shown = {}
    exec(compile(code, "packing.md", "exec"), shown)
    assert shown["row"].num_tokens == 4 + 3 * 4  # the prompt's last token once a sample
    assert shown["out"].metrics["tokens"] == 9 and [len(x) for x in shown["logprobs"]] == [3, 3, 3]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in shown["model"].parameters())


@pytest.mark.parametrize(
    "file", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_lead_somewhere(file):
    path = ROOT / file
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).is_file(), target


def test_ten_lines_are_a_task_and_the_tasks_that_ship_are_listed(tmp_path, capsys):
    own, shown = blocks("python", "docs/rewards.md")
    (tmp_path / "capitals.py").write_text(own)
    task = get_task(f"{tmp_path}/capitals.py:Capitals")
    assert len(own.splitlines()) < 20
    prompt = task.prompts("train")[0]
    assert task.score(prompt, f"It is {prompt.data['city']}.") == 1 and task.score(prompt, "") == 0
    exec(compile(shown, "rewards.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("[")
    page = (ROOT / "docs/rewards.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(task_names())
