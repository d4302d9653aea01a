"""A sandbox for programs that nobody trusts."""

from megatron_trd.tasks.sandbox.job import Finished, Job, Limits, SandboxError
from megatron_trd.tasks.sandbox.sandbox import Sandbox, shared_sandbox

__all__ = ["Finished", "Job", "Limits", "Sandbox", "SandboxError", "shared_sandbox"]
