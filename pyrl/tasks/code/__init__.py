"""Programs in Python, scored by their tests in a sandbox."""

from pyrl.tasks.code.sandbox import Call, Limits, LocalSandbox, Outcome, Sandbox, SandboxError
from pyrl.tasks.code.task import Code

__all__ = ["Call", "Code", "Limits", "LocalSandbox", "Outcome", "Sandbox", "SandboxError"]
