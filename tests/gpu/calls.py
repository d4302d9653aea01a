"""How the operator is called in training: without waits for the device, into `main_grad`, in a process group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from gpu.comparison import GRADIENT_LIMIT, call, error
from gpu.data import MODES, STATS
from gpu.dense import Dense, exact_product
from gpu.harness import Check, Context, Rows
from gpu.shapes import DTYPES, name_of, small_problem

WITHOUT_TOKEN_SET = tuple(name for name in STATS if name != "teacher_mass")


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[list[warnings.WarningMessage]]:
    """Make torch warn of, or refuse, operations that wait for the device; yields the warnings so far."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")


def synchronisations(context: Context) -> Rows:
    """No wait for the device without token weights, forward and backward; with them exactly one."""
    context.need_cuda()
    rows, problem = Rows(), small_problem(context)
    for backend in context.backends:
        for mode in ("forward", "jsd-token-clip", "hot-top-k-tail"):
            options: dict[str, Any] = {"backend": backend, "chunk": (16, 32), "stats": WITHOUT_TOKEN_SET}
            options |= {"return_top_k": 4, **MODES[mode]}
            for weight, expected in ((None, 0), (problem.token_weight, 1)):
                what = f"{backend} {mode}, {'no ' if weight is None else ''}token weights: waits other than {expected}"
                with rows.attempting(what):
                    call(context, problem, token_weight=weight, **options)  # compiles
                    with sync_debug_mode("warn") as caught:
                        call(context, problem, token_weight=weight, **options)
                    waits = [x for x in caught if "called a synchronizing" in str(x.message)]
                    places = ", ".join(f"{x.filename}:{x.lineno}" for x in waits)
                    rows.at_most(what, abs(len(waits) - expected), 0, note=f"{len(waits)} {places}")
            with rows.attempting(f"{backend} {mode} refusing to wait"), sync_debug_mode("error"):
                call(context, problem, token_weight=None, **options)
    return rows


def main_grad(context: Context) -> Rows:
    """`grad_weight_out`: dW is added to what it holds, in backward or, given the factor, in forward; padding is not."""
    rows, factor = Rows(), 3.0
    for dtype in DTYPES:
        problem = small_problem(context, dtype)
        valid = slice(problem.vocab_size)
        want = Dense(problem, exact_product)().weight_grad[valid] * factor
        g = torch.Generator(context.device).manual_seed(1)
        before = torch.randn(problem.student_weight.shape, generator=g, device=context.device) * want.std().float()
        for backend in context.backends:
            for known in (False, True):
                what = f"{backend} {name_of(dtype)} factor {'known' if known else 'not known'}"
                with rows.attempting(what):
                    hidden, head = (x.detach().requires_grad_() for x in problem.heads[:2])
                    total = before.clone()
                    out = context.operator(
                        hidden,
                        head,
                        *problem.heads[2:],
                        vocab_size=problem.vocab_size,
                        token_weight=problem.token_weight,
                        grad_weight_out=total,
                        grad_weight_factor=factor if known else None,
                        backend=backend,
                        chunk=(16, 32),
                    )
                    after_forward = total.clone()
                    (factor * out.loss).backward()
                    rows.equal(f"{what}: changed by the wrong pass", after_forward, total if known else before)
                    added = total[valid].double() - before[valid].double()
                    rows.at_most(f"{what}: dW", error(added, want), GRADIENT_LIMIT[dtype])
                    rows.equal(f"{what}: padding", total[problem.vocab_size :], before[problem.vocab_size :])
                    rows.at_most(f"{what}: also in .grad", float(head.grad is not None), 0)
    return rows


def upstream_factor(context: Context) -> Rows:
    """A factor of 4 on the loss is a factor of 4 on both gradients, to the bit; a frozen head has none."""
    rows, problem = Rows(), small_problem(context)
    for backend in context.backends:
        want = call(context, problem, backend=backend)
        hidden, head = problem.student_input.detach().requires_grad_(), problem.student_weight.detach().requires_grad_()
        options = {"vocab_size": problem.vocab_size, "token_weight": problem.token_weight, "backend": backend}
        (4.0 * context.operator(hidden, head, *problem.heads[2:], **options).loss).backward()
        rows.equal(f"{backend} dH", hidden.grad, 4 * want.input_grad)
        rows.equal(f"{backend} dW", head.grad, 4 * want.weight_grad)
        alone = problem.student_input.detach().requires_grad_()
        context.operator(alone, *problem.heads[1:], **options).loss.backward()
        rows.equal(f"{backend} dH of a frozen head", alone.grad, want.input_grad)
    return rows


def group_of_one(context: Context) -> Rows:
    """A tensor-parallel group of one rank changes no bit, under sequence parallelism and overlap neither."""
    rows, problem = Rows(), small_problem(context)
    kind = "nccl" if context.device.type == "cuda" else "gloo"
    dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for backend in context.backends:
            for mode in ("forward", "hot-jsd", "top-k-tail"):
                options: dict[str, Any] = {"backend": backend, "chunk": (16, 32), **MODES[mode]}
                want = call(context, problem, **options).tensors()
                for parallel in (
                    {},
                    {"sequence_parallel": True},
                    {"overlap_grad_reduce": True},
                    {"sequence_parallel": True, "overlap_grad_reduce": True},
                ):
                    what = f"{backend} {mode} {' '.join(parallel) or 'group alone'}"
                    with rows.attempting(what):
                        got = call(context, problem, tp_group=dist.group.WORLD, **parallel, **options)
                        for name, x in got.tensors().items():
                            rows.equal(f"{what} {name}", x, want[name])
    finally:
        dist.destroy_process_group()
    return rows


CHECKS: dict[str, Check] = {
    "synchronisations": synchronisations,
    "main-grad": main_grad,
    "upstream-factor": upstream_factor,
    "group-of-one": group_of_one,
}
