"""Odd sizes, poisoned padding, strides, dropped tokens, extreme logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpu.comparison import call, compare, references
from gpu.data import MODES, Problem, peaked_problem
from gpu.harness import Check, Context, Rows

DTYPES = (torch.bfloat16, torch.float32)
FEW_MODES = ("forward", "reverse", "jsd", "top-k-tail", "hot")


def small_problem(context: Context, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Problem:
    """Return 72 tokens, 48 of them weighted, over 1003 ids in 1088 rows."""
    sizes = {"num_tokens": 72, "num_kept": 48, "vocab_size": 1003, "num_rows": 1088}
    widths = {"student_width": context.pick(512, 64), "teacher_width": context.pick(768, 96)}
    return peaked_problem(**sizes | widths | {"dtype": dtype, "device": context.device} | options)


def name_of(dtype: torch.dtype) -> str:
    """Return `bf16` or `fp32`."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def vocabulary_sizes(context: Context) -> Rows:
    """One id, fewer than any block, one more than a block, and the real ones; rows behind them are poisoned."""
    rows = Rows()
    sizes = [(1, 8), (2, 2), (127, 128), (1003, 1003), (1025, 1088), (4097, 4224)]
    for vocab_size, num_rows in sizes + context.pick([(16_385, 16_512), (151_669, 152_064)], []):
        for dtype in DTYPES:
            problem = small_problem(context, dtype, vocab_size=vocab_size, num_rows=num_rows)
            exact, yardstick = references(problem)
            for mode in ("forward", "reverse", "jsd"):
                want, by_torch = exact(**MODES[mode]), yardstick(**MODES[mode])
                for backend in context.backends:
                    what = f"{backend} {name_of(dtype)} {mode} V={vocab_size}"
                    with rows.attempting(what):
                        got = call(context, problem, backend=backend, chunk=32, **MODES[mode])
                        compare(rows, what, got, want, by_torch)
                        rows.at_most(f"{what} dW of padding", got.weight_grad[vocab_size:].abs().sum(), 0)
    return rows


def poison(context: Context) -> Rows:
    """What padding rows and dropped tokens hold changes no bit: a large logit, infinities, NaN."""
    rows, clean = Rows(), small_problem(context, padding=0.0)
    for mode in FEW_MODES:
        for backend in context.backends:
            options = {"backend": backend, "chunk": 32} | MODES[mode]
            want = call(context, clean, **options).tensors()
            for value in (50.0, torch.inf, torch.nan):
                dropped = (clean.token_weight == 0)[:, None]
                poisoned = replace(
                    small_problem(context, padding=value),
                    student_input=clean.student_input.masked_fill(dropped, value),
                    teacher_input=clean.teacher_input.masked_fill(dropped, value),
                )
                with rows.attempting(f"{backend} {mode} {value}"):
                    for name, got in call(context, poisoned, **options).tensors().items():
                        rows.equal(f"{backend} {mode} {value} {name}", got, want[name])
    return rows


def no_tokens(context: Context) -> Rows:
    """No token at all, or none with a weight: zeros of the right shapes, whatever the hidden states hold."""
    rows = Rows()
    some = small_problem(context)
    tokens = ("student_input", "teacher_input", "token_weight", "labels")
    none = replace(some, **{name: getattr(some, name)[:0] for name in tokens})
    masked = replace(
        some,
        token_weight=torch.zeros_like(some.token_weight),
        student_input=torch.full_like(some.student_input, torch.nan),
    )
    for what, problem in (("N=0", none), ("all masked", masked)):
        for backend in context.backends:
            for mode in FEW_MODES:
                with rows.attempting(f"{backend} {mode} {what}"):
                    got = call(context, problem, backend=backend, **MODES[mode])
                    for name, x in got.tensors().items():
                        rows.equal(f"{backend} {mode} {what} {name}", x, torch.zeros_like(x))
                    rows.equal(f"{backend} {mode} {what} tokens", got.token_loss, problem.token_weight * 0)
    return rows


def _every_other_column(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], 2).flatten(1)[:, ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "column-major": lambda x: x.T.contiguous().T,
    "every other row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2],
    "every other column": _every_other_column,
    "odd row stride": lambda x: torch.nn.functional.pad(x, (1, 2), value=torch.nan)[:, 1:-2],
}


def layouts(context: Context) -> Rows:
    """Inputs that are not contiguous."""
    rows = Rows()
    for dtype in DTYPES:
        problem = small_problem(context, dtype)
        exact, yardstick = references(problem)
        want, by_torch = exact(), yardstick()
        for layout, arrange in LAYOUTS.items():
            heads = ("student_input", "student_weight", "teacher_input", "teacher_weight")
            strided = replace(problem, **{name: arrange(getattr(problem, name)) for name in heads})
            for backend in context.backends:
                what = f"{backend} {name_of(dtype)} {layout}"
                with rows.attempting(what):
                    compare(rows, what, call(context, strided, backend=backend), want, by_torch)
    return rows


def chunks(context: Context) -> Rows:
    """Any chunk sizes, single tokens and ragged ends among them, and any workspace."""
    rows, problem = Rows(), small_problem(context)
    exact, yardstick = references(problem)
    want, by_torch = exact(), yardstick()
    for sizes in ({"chunk": 1}, {"chunk": 7}, {"chunk": (7, 21)}, {"chunk": (5, 48)}, {"workspace_mb": 0.01}, {}):
        for backend in context.backends:
            with rows.attempting(f"{backend} {sizes}"):
                compare(rows, f"{backend} {sizes}", call(context, problem, backend=backend, **sizes), want, by_torch)
    return rows


def offsets(context: Context) -> Rows:
    """All of the student's logits moved by 60 nats, the teacher's the other way: fp32 logits are coarse there."""
    rows = Rows()
    for dtype in DTYPES:
        for offset in (60.0, -60.0):
            problem = small_problem(context, dtype, offset=offset)
            exact, yardstick = references(problem)
            for mode in FEW_MODES:
                want, by_torch = exact(**MODES[mode]), yardstick(**MODES[mode])
                for backend in context.backends:
                    what = f"{backend} {name_of(dtype)} {mode} {offset:+.0f}"
                    with rows.attempting(what):
                        got = call(context, problem, backend=backend, **MODES[mode])
                        compare(rows, what, got, want, by_torch, coarse=True)
    return rows


def equal_heads(context: Context) -> Rows:
    """A student equal to its teacher: loss and gradients exactly 0, in every mode that compares like with like."""
    rows = Rows()
    for dtype in DTYPES:
        base = small_problem(context, dtype)
        twins = replace(base, teacher_input=base.student_input, teacher_weight=base.student_weight)
        for mode in MODES:
            if mode == "top-k-teacher":  # compares the renormalised teacher with the whole student
                continue
            for backend in context.backends:
                with rows.attempting(f"{backend} {name_of(dtype)} {mode}"):
                    got = call(context, twins, backend=backend, chunk=(16, 32), **MODES[mode])
                    zeros = (got.loss, got.token_loss, got.input_grad, got.weight_grad)
                    total = sum(x.double().abs().sum() for x in zeros)
                    rows.at_most(f"{backend} {name_of(dtype)} {mode}", total, 0)
                    matches = (got.stats["argmax_match"] == (base.token_weight != 0)).all()
                    rows.at_most(f"{backend} {name_of(dtype)} {mode} argmax differs", float(~matches), 0)
    return rows


CHECKS: dict[str, Check] = {
    "vocabulary-sizes": vocabulary_sizes,
    "poison": poison,
    "no-tokens": no_tokens,
    "layouts": layouts,
    "chunks": chunks,
    "offsets": offsets,
    "equal-heads": equal_heads,
}
