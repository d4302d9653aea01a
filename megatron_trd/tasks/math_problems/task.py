"""Mathematics problems with a final answer in a box."""

from __future__ import annotations

from pathlib import Path

from megatron_trd.records import FinishReason, Problem, Verdict
from megatron_trd.tasks.corpus import CorpusTask, Row
from megatron_trd.tasks.math_problems.verifier import verify_answer


class MathTask(CorpusTask):
    """Problems whose final answer is compared with the gold by `--math-verifier-profile`."""

    name = "math"
    template_dir = Path(__file__).parents[1] / "templates" / "math"

    def check_grading(self) -> None:
        """Compare two expressions, which needs Math-Verify."""
        if not verify_answer(r"\boxed{\sqrt{8}}", r"2\sqrt{2}").correct:
            raise ValueError("--task math: the verifier does not find sqrt(8) = 2 sqrt(2); install math-verify anew")

    def accept(self, row: Row) -> None:
        """Refuse a problem without an answer."""
        if not row.problem.answer.strip():
            raise ValueError("answer is empty; remove the line")

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        """Compare the response's last box with the answer.

        `amo_answer_type` and `amo_points` in a problem's metadata say how AMO-Bench's parser treats it.
        """
        return verify_answer(
            response,
            problem.answer,
            profile=self.data.math_verifier_profile,
            finish_reason=finish_reason,
            amo_answer_type=problem.metadata.get("amo_answer_type", "number"),
            amo_points=problem.metadata.get("amo_points", ()),
        )
