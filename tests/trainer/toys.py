"""Tasks whose rewards go wrong in one way each."""

from pyrl.tasks import LazyPrompts, Prompt


class Toy:
    name = "toy"
    trusted = True

    def prompts(self, split):
        return LazyPrompts(8, lambda i: Prompt(f"{split}-{i}", f"{i} {split}"))

    def score(self, prompt, completion):
        raise NotImplementedError


class Equal(Toy):
    def score(self, prompt, completion):
        return 1.0


class Raises(Toy):
    def score(self, prompt, completion):
        raise RuntimeError("the verifier is broken")


class SomeLost(Toy):
    """NaN for completions of an odd length, else the share of letters."""

    def score(self, prompt, completion):
        if len(completion) % 2:
            return float("nan")
        return sum(c.isalpha() for c in completion) / max(1, len(completion))


class HalfFlat(Toy):
    """Prompts with an even number give everyone the same reward."""

    def score(self, prompt, completion):
        if int(prompt.id.split("-")[1]) % 2 == 0:
            return 0.5
        return sum(c.isalpha() for c in completion) / max(1, len(completion))


class Long(Toy):
    def prompts(self, split):
        texts = [f"{'x' * (10 if i else 600)} {i} {split}" for i in range(4)]
        return [Prompt(f"{split}-{i}", text) for i, text in enumerate(texts)]


class NoHeldout(Toy):
    def prompts(self, split):
        return super().prompts(split) if split == "train" else []


class Empty(Toy):
    def prompts(self, split):
        return []


class Domains(Toy):
    """Two kinds of prompts, one of which has answers: the first letter of the completion."""

    def prompts(self, split):
        return LazyPrompts(
            8, lambda i: Prompt(f"{split}-{i}", f"{i} {split}", domain=("even", "odd")[i % 2])
        )

    def score(self, prompt, completion):
        if prompt.domain == "even":
            return float((self.answer(prompt, completion) or "z").lower() < "n")
        return sum(c.isalpha() for c in completion) / max(1, len(completion))

    def answer(self, prompt, completion):
        if prompt.domain == "odd":
            raise NotImplementedError("an odd prompt has no answer")
        return next((c for c in completion if c.isalpha()), None)


class Hostile(Toy):
    """Everything that a task may say is markup."""

    HTML = '</td></script><img src="//evil" onerror=alert(1)>{{ 7 * 7 }}'

    def prompts(self, split):
        return [Prompt(f"{split} {i} {self.HTML}", f"{self.HTML} {split} {i}", domain=self.HTML)
                for i in range(4)]  # fmt: skip

    def score(self, prompt, completion):
        if len(completion) % 2:
            raise RuntimeError(self.HTML)
        return 1.0 / (1 + len(completion))

    def answer(self, prompt, completion):
        return self.HTML
