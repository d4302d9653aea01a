"""Values, gradients and statistics against fp64, at the vocabulary and widths of a real model."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gpu.comparison import VALUE_LIMIT, call, compare, error, references
from gpu.data import MODES, Problem, peaked_problem
from gpu.dense import Dense, exact_product
from gpu.harness import Check, Context, Rows

CHUNK = (48, 96)  # several pieces a chunk, and a ragged last one
MAIN_MODES = ("forward", "reverse", "jsd", "mixed", "top-k-tail")
# Both backends see the same fp32 logits and differ by the rounding of row math alone, which now and then rounds a
# bf16 gradient the other way.
BACKENDS_DIFFER_BY = {torch.bfloat16: 1e-3, torch.float32: 1e-5}


def model_sized(context: Context, *, dtype: torch.dtype, kl: float) -> Problem:
    """Return 128 weighted tokens among 320, over 151,936 ids."""
    return peaked_problem(
        num_tokens=context.pick(320, 40),
        num_kept=context.pick(128, 24),
        vocab_size=context.pick(151_936, 1003),
        student_width=context.pick(2048, 64),
        teacher_width=context.pick(4096, 96),
        dtype=dtype,
        device=context.device,
        kl=kl,
    ).without_near_ties()


def modes_at(kl: float, dtype: torch.dtype, modes: Iterable[str]) -> Check:
    """Return a check of `modes` in every backend, on data of a mean KL of about `kl` nats."""

    def check(context: Context) -> Rows:
        problem, rows = model_sized(context, dtype=dtype, kl=kl), Rows()
        exact, yardstick = references(problem)
        ratio = exact.mean_kl() / kl
        assert 0.5 < ratio < 2.0, f"the data's mean KL is {exact.mean_kl():.3g}, {kl} was meant"
        for mode in modes:
            want, by_torch, results = exact(**MODES[mode]), yardstick(**MODES[mode]), []
            capped = int((want.input_grad[exact.kept].norm(dim=1) == 0).sum())
            assert ("token_clip" in MODES[mode]) == (0 < capped < len(exact.kept)), f"{mode}: {capped} tokens capped"
            for backend in context.backends:
                with rows.attempting(f"{backend} {mode}"):
                    got = call(context, problem, backend=backend, chunk=CHUNK, **MODES[mode])
                    compare(rows, f"{backend} {mode}", got, want, by_torch)
                    results.append(got)
            if len(results) == 2:
                limit = BACKENDS_DIFFER_BY[dtype]
                rows.at_most(f"{mode} dH between backends", error(results[1].input_grad, results[0].input_grad), limit)
        return rows

    return check


def likeliest_ids(context: Context) -> Rows:
    """`return_top_k`: the right log-probabilities in order, and the ids they belong to."""
    problem, rows, k = model_sized(context, dtype=torch.bfloat16, kl=0.24), Rows(), 8
    exact = Dense(problem, exact_product)
    for backend in context.backends:
        got = call(context, problem, backend=backend, chunk=CHUNK, return_top_k=k, **MODES["hot-top-k-tail"])
        for side, z in (("student", exact.z_student), ("teacher", exact.z_teacher)):
            logs = z.log_softmax(1)
            values = got.stats[f"{side}_top_logprobs"][exact.kept]
            ids = got.stats[f"{side}_top_ids"][exact.kept]
            rows.at_most(f"{backend} {side} values", error(values, logs.topk(k).values), 5 * VALUE_LIMIT)
            rows.at_most(f"{backend} {side} ids", error(values, logs.gather(1, ids)), 5 * VALUE_LIMIT)
            rows.at_most(f"{backend} {side} repeated ids", (ids.sort(1).values.diff(dim=1) == 0).sum(), 0)
            dropped = problem.token_weight == 0
            rows.at_most(f"{backend} {side} of weight 0", got.stats[f"{side}_top_ids"][dropped].abs().sum(), 0)
    return rows


def device_products(context: Context) -> Rows:
    """The overloads of `mm` and `addmm` that the operator relies on: bf16 operands, fp32 results, alpha, beta, out."""
    context.need_cuda()
    rows, limit, fp32 = Rows(), 1e-4, torch.float32
    g = torch.Generator(context.device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=context.device)

    hidden, head = randn(512, 2048).bfloat16(), randn(1003, 2048).bfloat16()
    logits_grad = randn(512, 1024).bfloat16()[:, :1003]
    for name, a, b in (("logits", hidden, head.T), ("dH", logits_grad, head), ("dW", logits_grad.T, hidden)):
        want = a.double() @ b.double()
        block = torch.full((a.shape[0], b.shape[1] + 21), torch.nan, device=context.device)
        out = block[:, : b.shape[1]]
        rows.at_most(f"{name} mm", error(torch.mm(a, b, fp32, out=out), want), limit)
        out.fill_(torch.nan)
        torch.addmm(out, a, b, fp32, beta=0.0, alpha=0.5, out=out)
        rows.at_most(f"{name} addmm over NaN with beta 0", error(out, 0.5 * want), limit)
        start = randn(*out.shape) * want.std()
        out.copy_(start)
        torch.addmm(out, a, b, fp32, beta=1.0, alpha=3.0, out=out)
        rows.at_most(f"{name} addmm onto a sum", error(out, start + 3 * want), limit)
        rows.at_most(f"{name} written beside the output", (~block[:, b.shape[1] :].isnan()).sum(), 0)
    rows.at_most("fp32 products may use tf32", int(torch.backends.cuda.matmul.allow_tf32), 0)
    return rows


bf16, fp32 = torch.bfloat16, torch.float32
CHECKS: dict[str, Check] = {
    "products": device_products,
    "bf16-kl-0.24": modes_at(0.24, bf16, MODES),
    "bf16-kl-0.025": modes_at(0.025, bf16, MAIN_MODES),
    "bf16-kl-0.002": modes_at(0.002, bf16, MAIN_MODES),
    "fp32-kl-0.24": modes_at(0.24, fp32, MODES),
    "likeliest-ids": likeliest_ids,
}
