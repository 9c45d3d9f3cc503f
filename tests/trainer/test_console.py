"""What a run prints, on a terminal and off it."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from rich.console import Console as RichConsole

from pyrl.trainer.console import Console, duration, number, sparkline, warnings

BEFORE = {"mean": 0.312, "low": 0.251, "high": 0.374, "prompts": 64, "samples": 256}
AFTER = {"mean": 0.687, "low": 0.622, "high": 0.748, "prompts": 64, "samples": 256}
STEP = {
    "step": 1,
    "reward_mean": 0.40625,
    "loss": -0.0123,
    "kl": 0.00123,
    "entropy": 1.5,
    "grad_norm": 0.52,
    "completion_length_mean": 20.25,
    "tokens_per_second": 1234.5,
    "seconds": 4.0,
    "seconds_sample": 2.5,
    "seconds_update": 1.25,
}


def terminal(width: int = 120) -> RichConsole:
    return RichConsole(
        file=io.StringIO(), force_terminal=True, width=width, color_system=None, highlight=False,
        _environ={"TERM": "xterm"},
    )  # fmt: skip


def pipe(encoding: str = "utf-8") -> tuple[RichConsole, io.BytesIO]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    return RichConsole(file=file, highlight=False, _environ={}), raw


def play(console: Console) -> None:
    with console:
        console.banner({"model": "smollm2-135m", "task": "sums", "loss": "grpo", "absent": None})
        console.evaluation("before", BEFORE)
        for step in (1, 2, 3):
            console.phase("sample")
            console.step({**STEP, "step": step})
        console.message("Ctrl-C: finishing this step")
        console.evaluation("after", AFTER)
        console.finish(
            {"heldout_before": BEFORE, "heldout_after": AFTER, "steps": 3, "seconds": 12.0}
        )


def visible(out: RichConsole) -> str:
    assert isinstance(out.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.file.getvalue())


def test_a_pipe_gets_plain_lines() -> None:
    out, raw = pipe()
    play(Console(3, rich_console=out))
    text = raw.getvalue().decode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)  # no control code, no carriage return
    rows = [line for line in text.splitlines() if line.startswith("step")]
    assert rows[0] == (
        "step 1/3  reward 0.406  kl 0.0012  entropy 1.500  loss -0.0123  grad 0.52  length 20.2  "
        "tok/s 1,234  4.0s (sample 2.5 update 1.2)  eta 8.0s"
    )
    assert [row.split("eta ")[1] for row in rows[:3]] == ["8.0s", "4.0s", "0.0s"]
    assert "held-out before  0.312 [0.251, 0.374] on 64 prompts, 256 samples\n" in text
    assert "[0.622, 0.748] on 64 prompts, 256 samples  (+0.375)\n" in text
    assert "absent" not in text


def test_an_evaluation_with_its_details_is_still_one_line() -> None:
    out, raw = pipe()
    table = {"mean": 0.3, "pass": {"4": {"mean": 0.58}}, "majority": {"4": {"mean": 0.4}}}
    details = {"ks": [1, 4], "overall": table, "domains": {"code": {"mean": None}, "": table}}
    Console(1, rich_console=out).evaluation("before", BEFORE, details)
    Console(1, rich_console=out).evaluation(
        "after", BEFORE, {"ks": [1], "overall": {**table, "majority": None}, "domains": {}}
    )
    assert raw.getvalue().decode() == (
        "held-out before  0.312 [0.251, 0.374] on 64 prompts, 256 samples, pass@4 0.580, "
        "maj@4 0.400 (code -, - 0.300)\n"
        "held-out after  0.312 [0.251, 0.374] on 64 prompts, 256 samples\n"
    )


def test_a_dumb_terminal_counts_as_a_pipe() -> None:
    out = RichConsole(
        file=io.StringIO(), force_terminal=True, highlight=False, _environ={"TERM": "dumb"}
    )
    play(Console(3, rich_console=out))
    assert isinstance(out.file, io.StringIO)
    assert "\x1b" not in out.file.getvalue()
    assert "step 1/3  reward 0.406" in out.file.getvalue()


def test_an_ascii_log_cannot_end_the_run() -> None:
    out, raw = pipe("ascii")
    with Console(1, rich_console=out) as console:
        console.banner({"task": "sums → words"})
        console.message("naïve")
    assert raw.getvalue() == b"task  sums ? words\nna?ve\n"


@pytest.mark.parametrize("width", [30, 60, 80, 120, 200])
def test_rows_fit_the_terminal(width: int) -> None:
    out = terminal(width)
    console = Console(1000, rich_console=out)
    for step in range(1, 4):
        console.step({**STEP, "step": step})
    rows = visible(out).splitlines()
    assert len(rows) == 4  # a heading and one line a step: nothing wrapped
    assert all(len(row) <= width for row in rows)
    assert len({len(row) for row in rows[1:]}) == 1
    heads = rows[0].split()
    assert heads[:2] == ["step", "reward"]
    assert ("sample 2.5" in rows[1]) == (width >= 120)


def test_the_live_line_reports_progress_and_trend() -> None:
    out = terminal()
    console = Console(10, rich_console=out)
    for step, reward in enumerate((0.0, 0.5, 1.0), 1):
        console.step({**STEP, "step": step, "reward_mean": reward})
    console.phase("update")
    out.print(console._status())
    line = visible(out).splitlines()[-1]
    assert "3/10 update 4.0 s/step ETA 28s reward ▁▅█" in line


def test_on_a_terminal_the_outcome_is_left_and_the_live_line_is_not() -> None:
    out = terminal()
    play(Console(3, rich_console=out))
    text = visible(out)
    assert "pyrl train" in text and "finished" in text and "+0.375" in text
    assert out._live_stack == []


def test_the_live_line_ends_with_an_exception() -> None:
    out = terminal()
    with pytest.raises(KeyboardInterrupt), Console(3, rich_console=out):
        raise KeyboardInterrupt
    assert out._live_stack == []


def test_quiet_prints_only_messages() -> None:
    out, raw = pipe()
    play(Console(3, quiet=True, rich_console=out))
    assert raw.getvalue() == b"Ctrl-C: finishing this step\n"


def test_missing_metrics_are_dashes_not_errors() -> None:
    out, raw = pipe()
    with Console(5, rich_console=out) as console:
        console.step({"step": 1})
        console.step({"step": 2, "reward_mean": None, "loss": None, "seconds": None})
        console.evaluation("before", {"mean": None, "prompts": 0, "samples": 0})
        lost = {"mean": math.nan, "low": math.nan, "high": math.nan, "prompts": 0, "samples": 0}
        console.evaluation("after", {**lost, "nan_rewards": 8})
        console.finish({})
    assert raw.getvalue().decode().splitlines() == [
        "step 1/5  reward -  -  eta -",
        "step 2/5  reward -  -  eta -",
        "held-out before  - on 0 prompts, 0 samples",
        "held-out after  no sample has a reward: 8 lost",
    ]
    console = Console(5, rich_console=terminal())
    console.step({"step": 1})


def test_a_resumed_run_counts_from_where_it_was() -> None:
    out, raw = pipe()
    with Console(10, rich_console=out) as console:
        console.step({**STEP, "step": 8})
    assert b"step  8/10" in raw.getvalue()
    assert b"eta 8.0s" in raw.getvalue()


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"nan_rewards": 2}, "rewards without a value: 2"),
        ({"groups": 8, "zero_variance_groups": 8}, "every group has equal rewards: no gradient"),
        ({"truncated_share": 0.75}, "75% of completions truncated"),
        ({"skipped_tokens": 5}, "tokens skipped: 5"),
        ({"loss": float("nan")}, "the loss is not finite"),
        ({"loss": float("inf")}, "the loss is not finite"),
    ],
)
def test_warnings(metrics: dict[str, Any], expected: str) -> None:
    assert warnings(metrics) == [expected]


def test_no_warning_for_an_ordinary_step() -> None:
    assert warnings({**STEP, "groups": 8, "zero_variance_groups": 3, "nan_rewards": 0}) == []


def test_a_step_without_an_update_has_no_loss_to_warn_of() -> None:
    assert warnings({**STEP, "loss": None}) == []


def test_a_log_on_a_full_disk_loses_lines_and_not_the_run() -> None:
    class Full(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    file = Full()
    with Console(3, rich_console=RichConsole(file=file, highlight=False, _environ={})) as console:
        play(console)
        file.full = False
        console.message("room again")
    assert file.getvalue() == "room again\n"


def test_numbers_and_durations() -> None:
    assert [number(v) for v in (0.0, 0.5, 123.456, 12345.6, 1e-5, 2e7, 12345, None)] == [
        "0.000", "0.500", "123.5", "12,346", "1.0e-05", "2.0e+07", "12,345", "-",
    ]  # fmt: skip
    assert [duration(v) for v in (0.04, 9.94, 9.96, 59.4, 61, 3600, 7260, None)] == [
        "0.0s", "9.9s", "10s", "59s", "1m 01s", "1h 00m", "2h 01m", "-",
    ]  # fmt: skip
    assert sparkline([1.0, 1.0]) == "▁▁"
