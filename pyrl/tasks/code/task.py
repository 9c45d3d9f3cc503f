"""Programs that pass tests: reward = the share of tests passed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from pyrl.tasks.code.judge import Case
from pyrl.tasks.code.problems import draw
from pyrl.tasks.code.rows import problem_of_row
from pyrl.tasks.code.sandbox import MODES, Call, Limits, LocalSandbox, Sandbox
from pyrl.tasks.extract import after_thinking, last_code_block
from pyrl.tasks.generated import generated
from pyrl.tasks.protocol import Prompt, Split, check_split, split_prompts

LEVELS = (1, 2, 3)
SANDBOXES = (*MODES, "e2b", "sandboxfusion")
FORMAT = "Put the whole program in one ```python block; the last such block counts."
#: The labels of a block of Python.
LANGUAGES = ("python", "python3", "py")


class Code:
    """Prompts: a problem, and the request for a program in a block of code.

    Reward: (tests passed) / (tests) of the last ```python block (else the last block without a
    label) after the thoughts; 0 without a block, with a syntax error, or when all tests together
    take more than `timeout` seconds. With `reward="all"`: 1 if every test passed, else 0. As in
    ProRL (arXiv 2505.24864). A test is an input and the printed words, or a function's arguments
    and its value (`judge`). Programs run in a sandbox that never sees an expected answer; a sandbox
    that fails raises `SandboxError`, which costs the sample and is no reward.
    """

    name = "code"
    trusted = False

    def __init__(
        self,
        data: str | None = None,
        *,
        train: int = 10_000,
        heldout: int = 200,
        level: int | tuple[int, int] = 1,
        seed: int = 0,
        tests: int = 8,
        timeout: float = 5.0,
        memory_mb: int = 512,
        sandbox: str = "auto",
        endpoint: str | None = None,
        reward: str = "fraction",
        system: str | None = None,
    ) -> None:
        """Generated problems (`families`), or those of a file or a Hugging Face data set.

        data: rows of `prompt` and tests, see `rows`; None generates. Rows are split by `heldout`.
        train: prompts for training; of data, at most.
        heldout: prompts held out; of data, exactly.
        level: 1 to 3, or (least, most), drawn for each prompt. Generated problems only.
        seed: of the generated problems and of the split.
        tests: tests of a prompt; of data, at most (0 = all that a row has).
        timeout: seconds for all tests of a program together.
        memory_mb: address space of a program, MiB.
        sandbox: a mode of `sandbox.LocalSandbox`, "e2b" or "sandboxfusion".
        endpoint: address of the SandboxFusion server.
        reward: "fraction" or "all".
        system: the system message; None = none.
        """
        least, most = (level, level) if isinstance(level, int) else tuple(level)
        if not (least in LEVELS and most in LEVELS and least <= most):
            raise ValueError(f"level={level!r}: expected 1 to 3, or (least, most) of them")
        for option, value in (("train", train), ("heldout", heldout)):
            if value < 1:
                raise ValueError(f"{option}={value}: expected at least 1")
        if tests < (0 if data else 1):
            raise ValueError(f"tests={tests}: expected at least {0 if data else 1}")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: expected seconds > 0")
        if reward not in ("fraction", "all"):
            raise ValueError(f'reward={reward!r}: expected "fraction" or "all"')
        self._sandbox = _sandbox(sandbox, endpoint)
        self._limits = Limits(seconds=timeout, memory_mb=memory_mb)
        self._reward, self._system, self._seed = reward, system, seed
        self._sizes, self._levels, self._tests = (
            {"train": train, "heldout": heldout},
            (least, most),
            tests,
        )
        self._rows = None if data is None else _read(data, tests, system)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Drawn problems (no family with equal parameters in both splits), or the rows' share."""
        check_split(split)
        size = self._sizes[split]
        if self._rows is None:
            return generated(
                split,
                size,
                lambda rng, i: self._drawn(rng, split, i),
                seed=self._seed,
                key=lambda prompt: prompt.data["key"],
            )
        found = split_prompts(self._rows, split, heldout=self._sizes["heldout"], seed=self._seed)
        return found[:size] if split == "train" else found

    def score(self, prompt: Prompt, completion: str) -> float:
        """See the class. Raises SandboxError when the sandbox failed."""
        program = last_code_block(after_thinking(completion), LANGUAGES)
        if program is None or not program.strip():
            return 0.0
        cases = [_case(prompt.data["function"], test) for test in prompt.data["tests"]]
        outcomes = self._sandbox.run(program, [case.call for case in cases], self._limits)
        if any(outcome.status == "timeout" for outcome in outcomes):
            return 0.0
        passed = sum(case.passed(o) for case, o in zip(cases, outcomes, strict=True))
        if self._reward == "all":
            return float(passed == len(cases))
        return passed / len(cases)

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows: scoring reads the prompt's data alone."""
        return self.__dict__ | {"_rows": None}

    def _drawn(self, rng: random.Random, split: str, index: int) -> Prompt:
        problem = draw(rng, rng.randint(*self._levels), self._tests)
        data = {
            "key": problem.key,
            "function": problem.function,
            "tests": list(problem.tests),
            "reference": problem.reference,
        }
        return Prompt(f"{split}-{index}", _messages(problem.statement, self._system), data)


def _sandbox(kind: str, endpoint: str | None) -> Sandbox:
    if kind not in SANDBOXES:
        raise ValueError(f"sandbox={kind!r}: expected one of {', '.join(SANDBOXES)}")
    if (endpoint is not None) != (kind == "sandboxfusion"):
        raise ValueError(
            f'sandbox={kind!r}, endpoint={endpoint!r}: sandbox="sandboxfusion" needs the address '
            "of its server as endpoint, and no other takes one"
        )
    if kind in MODES:
        return LocalSandbox(kind)
    from pyrl.tasks.code.remote import E2B, SandboxFusion

    return E2B() if endpoint is None else SandboxFusion(endpoint)


def _read(data: str, tests: int, system: str | None) -> list[Prompt]:
    from pyrl.tasks.rows import load_rows

    found = []
    for i, row in enumerate(load_rows(data)):
        try:
            statement, function, cases = problem_of_row(row, tests)
        except ValueError as error:
            raise ValueError(f"{data}: row {i}: {error}") from None
        if function:
            statement += f"\n\nThe function is called `{function}`."
        kept = {"function": function, "tests": cases}
        found.append(Prompt(f"row-{i}", _messages(statement, system), kept))
    return found


def _messages(statement: str, system: str | None) -> tuple[dict[str, str], ...]:
    told = {"role": "user", "content": f"{statement}\n\n{FORMAT}"}
    return (told,) if system is None else ({"role": "system", "content": system}, told)


def _case(function: str, test: Mapping[str, Any]) -> Case:
    if function:
        call = Call(function=function, arguments=test["input"])
        return Case(call, test["output"], single=test.get("single", False))
    return Case(Call(stdin=test["input"]), test["output"])
