"""Peak device memory: a workspace of fixed size, and per token no more than gradients of hidden states and vectors."""

from __future__ import annotations

from typing import Any

import torch

from gpu.data import MODES, STATS, Problem, peaked_problem
from gpu.harness import Check, Context, Rows

MIB = 2**20
TOKENS, VOCAB, WIDTH, TEACHER_WIDTH = 8192, 151_936, 2048, 4096
DEFAULT_WORKSPACE_MB = 1200
# Hidden states of one chunk, its dH, and what rounds up: beside the workspace, the same for any number of tokens.
CHUNK_ROWS_MB = 48
# Loss, weight, clip gate, label, kept ids with their sort and every statistic: fp32 or int64 each.
VECTOR_BYTES = 256
OBSERVED = tuple(name for name in STATS if name != "teacher_mass")


def per_token(*, backward: bool) -> int:
    """Return the bytes a token may cost: its fp32 gradient, the returned bf16 one, its entries of vectors."""
    return WIDTH * (4 + (2 if backward else 0)) + VECTOR_BYTES


def problem_of(context: Context, num_tokens: int) -> Problem:
    """Return a problem of model size in bf16."""
    return peaked_problem(
        num_tokens=num_tokens,
        vocab_size=VOCAB,
        student_width=WIDTH,
        teacher_width=TEACHER_WIDTH,
        dtype=torch.bfloat16,
        device=context.device,
    )


def peak(
    context: Context,
    problem: Problem,
    *,
    input_grad: bool = True,
    weight_grad: bool = False,
    backward: bool = False,
    **options: Any,
) -> int:
    """Return the bytes that a call adds, at its peak, to what was allocated before it."""
    hidden = problem.student_input.detach().requires_grad_(input_grad)
    head = problem.student_weight.detach().requires_grad_(weight_grad)
    observed = {"token_weight": problem.token_weight, "labels": problem.labels, "stats": OBSERVED}
    for _ in range(2):  # cuBLAS allocates once for itself, in the first call
        hidden.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = context.operator(hidden, head, *problem.heads[2:], vocab_size=problem.vocab_size, **observed, **options)
        if backward:
            out.loss.backward()
        del out
        highest = torch.cuda.max_memory_allocated() - before
    return highest


def growth(context: Context) -> Rows:
    """Four times the tokens: the peak grows by their gradients and vectors, within 5 %, and by nothing else."""
    context.need_cuda()
    rows, few, many = Rows(), problem_of(context, TOKENS), problem_of(context, 4 * TOKENS)
    for backend in context.backends:
        for mode in ("forward", "jsd", "top-k-tail"):
            for backward in (False, True):
                what = f"{backend} {mode} {'with' if backward else 'without'} backward"
                with rows.attempting(what):
                    options = {"backend": backend, "backward": backward, **MODES[mode]}
                    low, high = (peak(context, problem, **options) for problem in (few, many))
                    slope = (high - low) / (3 * TOKENS)
                    rows.at_most(f"{what}: bytes per token", slope, 1.05 * per_token(backward=backward))
                    # Not even an [N, V] tensor of single bytes fits in.
                    rows.at_most(f"{what}: peak over N x V bytes", high / (4 * TOKENS * VOCAB), 0.5)
    return rows


def workspace(context: Context) -> Rows:
    """The peak is the workspace and the per-token part, whatever the workspace."""
    context.need_cuda()
    rows, problem = Rows(), problem_of(context, TOKENS)
    for backend in context.backends:
        for mode in ("forward", "reverse", "jsd", "entry-clip", "top-k", "top-k-tail", "hot"):
            for megabytes in (None, 300):
                what = f"{backend} {mode}, workspace {megabytes or 'default'}: MiB"
                with rows.attempting(what):
                    used = peak(context, problem, backward=True, backend=backend, workspace_mb=megabytes, **MODES[mode])
                    allowed = (megabytes or DEFAULT_WORKSPACE_MB) + TOKENS * per_token(backward=True) / MIB
                    rows.at_most(what, used / MIB, allowed)
    return rows


def gradients_by_need(context: Context) -> Rows:
    """Without gradients the workspace alone; a trainable head adds one fp32 head, or nothing where it is given."""
    context.need_cuda()
    rows, problem = Rows(), problem_of(context, TOKENS)
    main_grad = torch.zeros(VOCAB, WIDTH, device=context.device)
    given = {"weight_grad": True, "grad_weight_out": main_grad, "grad_weight_factor": 1.0}
    head_mb, input_mb, vectors_mb = (n / MIB for n in (VOCAB * WIDTH * 4, TOKENS * WIDTH * 4, TOKENS * VECTOR_BYTES))
    for what, options, gradients_mb in (
        ("no gradients", {"input_grad": False}, 0.0),
        ("frozen head", {}, input_mb),
        ("trainable head", {"weight_grad": True}, input_mb + head_mb),
        ("trainable head, main_grad given", given, input_mb),
    ):
        for backend in context.backends:
            with rows.attempting(f"{backend} {what}"):
                used = peak(context, problem, backend=backend, **options) / MIB
                allowed = DEFAULT_WORKSPACE_MB + CHUNK_ROWS_MB + vectors_mb + gradients_mb
                rows.at_most(f"{backend} {what}: MiB", used, allowed)
    return rows


CHECKS: dict[str, Check] = {"growth": growth, "workspace": workspace, "gradients-by-need": gradients_by_need}
