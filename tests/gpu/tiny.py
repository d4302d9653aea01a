"""Every mode on shapes small enough for a memory checker; references are computed on the CPU."""

from __future__ import annotations

import torch

from gpu.comparison import call, compare, references
from gpu.data import MODES, peaked_problem
from gpu.harness import Check, Context, Rows


def every_mode(dtype: torch.dtype) -> Check:
    """Return a check of all modes in every backend: 37 tokens, 29 of them weighted, 1003 ids in 1088 rows."""

    def check(context: Context) -> Rows:
        rows = Rows()
        problem = peaked_problem(
            num_tokens=37,
            num_kept=29,
            vocab_size=1003,
            num_rows=1088,
            student_width=64,
            teacher_width=96,
            dtype=dtype,
            device="cpu",
        ).without_near_ties()
        exact, yardstick = references(problem)
        there = problem.to(context.device)
        for mode, options in MODES.items():
            want, by_torch = exact(**options), yardstick(**options)
            for backend in context.backends:
                with rows.attempting(f"{backend} {mode}"):
                    got = call(context, there, backend=backend, chunk=(8, 16), return_top_k=3, **options)
                    compare(rows, f"{backend} {mode}", got.cpu(), want, by_torch)
        return rows

    return check


CHECKS: dict[str, Check] = {"bf16": every_mode(torch.bfloat16), "fp32": every_mode(torch.float32)}
