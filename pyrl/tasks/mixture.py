"""Several tasks as one, each a domain with its own prompts and scale of rewards."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import overload

from pyrl.tasks.protocol import Prompt, Split, Task


class Mixture:
    """score = scale of the prompt's domain * its task's score; prompts of domain d are named d/id.

    Which domain a training prompt comes from is the trainer's to draw; `prompts` lists them one
    domain after another. `trusted` if every task is. ValueError for a scale that is not > 0.
    """

    name = "mixture"

    def __init__(self, tasks: Mapping[str, Task], scales: Mapping[str, float] | None = None):
        self.tasks = dict(tasks)
        self.scales = dict.fromkeys(self.tasks, 1.0) | dict(scales or {})
        for domain, scale in self.scales.items():
            if domain not in self.tasks or not scale > 0:
                raise ValueError(f"scales[{domain!r}] = {scale}: expected a number > 0 for one of "
                                 f"{list(self.tasks)}")  # fmt: skip
        self.trusted = all(getattr(task, "trusted", False) is True for task in self.tasks.values())

    def domain(self, domain: str, split: Split) -> Sequence[Prompt]:
        """The prompts of one domain, under their names in the mixture."""
        return _Named(domain, self.tasks[domain].prompts(split))

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Those of every domain."""
        return list(itertools.chain(*(self.domain(domain, split) for domain in self.tasks)))

    def score(self, prompt: Prompt, completion: str) -> float:
        """The scaled reward, by the task of the prompt's domain."""
        task, own = self._own(prompt)
        return self.scales[prompt.domain] * task.score(own, completion)

    def answer(self, prompt: Prompt, completion: str) -> str | None:
        """The final answer. NotImplementedError where the domain's task has no notion of one."""
        task, own = self._own(prompt)
        find = getattr(task, "answer", None)
        if find is None:
            raise NotImplementedError(f"the task of domain {prompt.domain!r} has no answers")
        return find(own, completion)

    def _own(self, prompt: Prompt) -> tuple[Task, Prompt]:
        return self.tasks[prompt.domain], dataclasses.replace(
            prompt, id=prompt.id.removeprefix(prompt.domain + "/"), domain=""
        )


class _Named(Sequence[Prompt]):
    """The prompts of a domain, renamed when they are asked for."""

    def __init__(self, domain: str, prompts: Sequence[Prompt]) -> None:
        self._domain, self._prompts = domain, prompts

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self._named(prompt) for prompt in self._prompts[index]]
        return self._named(self._prompts[index])

    def _named(self, prompt: Prompt) -> Prompt:
        return dataclasses.replace(prompt, id=f"{self._domain}/{prompt.id}", domain=self._domain)
