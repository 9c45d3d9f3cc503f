"""Programs in Python, scored by their tests in a sandbox."""

from pyrl.tasks.code.sandbox import Call, Limits, LocalSandbox, Outcome, Sandbox, SandboxError

__all__ = ["Call", "Limits", "LocalSandbox", "Outcome", "Sandbox", "SandboxError"]
