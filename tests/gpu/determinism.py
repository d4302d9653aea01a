"""The same call gives the same bits, every time."""

from __future__ import annotations

import torch

from gpu.comparison import call
from gpu.data import MODES, peaked_problem
from gpu.harness import Check, Context, Rows

RUNS = 20


def twenty_runs(context: Context) -> Rows:
    """Loss, token losses, both gradients and every statistic, at model size with default chunks."""
    rows = Rows()
    problem = peaked_problem(
        num_tokens=context.pick(1024, 24),
        vocab_size=context.pick(151_936, 301),
        student_width=context.pick(2048, 32),
        teacher_width=context.pick(4096, 48),
        dtype=torch.bfloat16,
        device=context.device,
    )
    for backend in context.backends:
        for mode in ("forward", "jsd-token-clip", "hot-top-k-tail"):
            with rows.attempting(f"{backend} {mode}"):
                options = {"backend": backend, "return_top_k": 4, **MODES[mode]}
                first = call(context, problem, **options).tensors()
                differing = dict.fromkeys(first, 0)
                for _ in range(RUNS - 1):
                    for name, x in call(context, problem, **options).tensors().items():
                        same = (x == first[name]) | (x.isnan() & first[name].isnan())
                        differing[name] += not same.all()
                for name, count in differing.items():
                    rows.at_most(f"{backend} {mode} {name}: runs that differ", count, 0)
    return rows


CHECKS: dict[str, Check] = {"twenty-runs": twenty_runs}
