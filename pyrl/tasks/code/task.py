"""Programs that pass tests: reward = the share of tests passed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pyrl.tasks.code.judge import Case
from pyrl.tasks.code.problems import draw
from pyrl.tasks.code.rows import problem_of_row
from pyrl.tasks.code.sandbox import MODES, Call, Limits, LocalSandbox, Sandbox
from pyrl.tasks.extract import after_thinking, last_code_block
from pyrl.tasks.protocol import Prompt
from pyrl.tasks.reading import ReadingTask
from pyrl.tasks.rows import Row

LEVELS = (1, 2, 3)
SANDBOXES = (*MODES, "e2b", "sandboxfusion")
REWARDS = ("fraction", "all")
#: The labels of a block of Python.
LANGUAGES = ("python", "python3", "py")


@dataclass(eq=False, kw_only=True)
class Code(ReadingTask):
    """reward = (tests passed) / (tests) of the last ```python block (else the last block without a
    label) after the thoughts; 0 without a block, with a syntax error, or when all tests together
    take more than `timeout` seconds. As in ProRL (arXiv 2505.24864).

    A test is an input and the words printed for it, or a function's arguments and its value
    (`judge`). Without `data`: problems with parameters (`families`); with data: `rows`. Programs
    run in a sandbox that never sees an expected answer. A sandbox that fails raises `SandboxError`:
    that costs the sample, and is no reward.
    """

    name: ClassVar[str] = "code"
    trusted: ClassVar[bool] = False
    own_suffix: ClassVar[str] = (
        "\nPut the whole program in one ```python block; the last such block counts."
    )

    level: int | tuple[int, int] = 1
    """How hard drawn problems are: 1 to 3, or (least, most)."""
    tests: int = 8
    """Tests of a drawn problem; of a row, at most, the first ones (0 = all)."""
    timeout: float = 5.0
    """Seconds for all tests of a program together."""
    memory_mb: int = 512
    """Address space of a program, MiB."""
    sandbox: str = "auto"
    """A mode of `sandbox.LocalSandbox`, "e2b" or "sandboxfusion"."""
    endpoint: str | None = None
    """Address of the SandboxFusion server, "http://host:8080"."""
    reward: str = "fraction"
    """"fraction", or "all": 1 if every test passed, else 0."""
    _box: Sandbox = field(init=False, repr=False)
    _limits: Limits = field(init=False, repr=False)

    def __post_init__(self) -> None:
        least, most = self._levels()
        if not (least in LEVELS and most in LEVELS and least <= most):
            raise ValueError(f"level={self.level!r}: expected 1 to 3, or (least, most) of them")
        fewest = 1 if self.data is None else 0
        if self.tests < fewest:
            raise ValueError(f"tests={self.tests}: expected at least {fewest}")
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout}: expected seconds > 0")
        if self.reward not in REWARDS:
            raise ValueError(f"reward={self.reward!r}: expected one of {', '.join(REWARDS)}")
        self._box = _sandbox(self.sandbox, self.endpoint)
        self._limits = Limits(seconds=self.timeout, memory_mb=self.memory_mb)
        super().__post_init__()

    def draw(self, id: str, rng: random.Random, index: int) -> Prompt:
        """A problem of `families`, with its right program as `data["reference"]`."""
        problem = draw(rng, rng.randint(*self._levels()), self.tests)
        data = {
            "key": problem.key,
            "function": problem.function,
            "tests": list(problem.tests),
            "reference": problem.reference,
        }
        return Prompt(id, self.chat(problem.statement), data)

    def drawn_key(self, prompt: Prompt) -> str:
        """The family with its parameters: a wording of its own makes no other problem."""
        key: str = prompt.data["key"]
        return key

    def row_key(self, row: Row, where: str) -> str:
        """The statement; unusable tests are an error here, before the first step."""
        return self._problem(row, where)[0]

    def row_prompt(self, id: str, row: Row, where: str) -> Prompt:
        """The row's statement and tests."""
        statement, function, tests = self._problem(row, where)
        if function:
            statement += f"\n\nThe function is called `{function}`."
        return Prompt(id, self.chat(statement), {"function": function, "tests": tests})

    def score(self, prompt: Prompt, completion: str) -> float:
        """See the class. Raises SandboxError when the sandbox failed."""
        program = last_code_block(after_thinking(completion), LANGUAGES)
        if program is None or not program.strip():
            return 0.0
        cases = [_case(prompt.data["function"], test) for test in prompt.data["tests"]]
        outcomes = self._box.run(program, [case.call for case in cases], self._limits)
        if any(outcome.status == "timeout" for outcome in outcomes):
            return 0.0
        passed = sum(case.passed(o) for case, o in zip(cases, outcomes, strict=True))
        if self.reward == "all":
            return float(passed == len(cases))
        return passed / len(cases)

    def _levels(self) -> tuple[int, int]:
        if isinstance(self.level, int):
            return self.level, self.level
        least, most = self.level
        return least, most

    def _problem(self, row: Row, where: str) -> tuple[str, str, list[dict[str, Any]]]:
        try:
            return problem_of_row(row, self.tests)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


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


def _case(function: str, test: Mapping[str, Any]) -> Case:
    if function:
        call = Call(function=function, arguments=test["input"])
        return Case(call, test["output"], single=test.get("single", False))
    return Case(Call(stdin=test["input"]), test["output"])
