"""Mathematics problems with a final answer in a box: the verifier and a task over local files."""

from megatron_trd.records import Verdict
from megatron_trd.tasks.math_problems.task import MathTask
from megatron_trd.tasks.math_problems.verifier import verify_answer

__all__ = ["MathTask", "Verdict", "verify_answer"]
