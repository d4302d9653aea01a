"""Defects that users of other fused distillation losses have met: each test fails for an operator that has one.

Most also show, in a line or two of torch, how far off the defect would be on the same data. Heads that are tables of
logits (identity inputs) leave no rounding but the operator's own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from tests.linear_kl_dense import MODES, STATS, Case, dense, peaked_case, relative_error
from tests.unit.test_linear_kl_memory import AllocationMeter
from trd_kernels import LinearKLDivOutput, linear_kl_div

DIVERGENCES = ("forward", "reverse", "jsd", "mixed")
ROUNDING_TO_BF16 = 2.0**-9


def backends() -> list[Any]:
    """Return `torch` and `triton` as parameters; the latter is skipped, with the reason, where it cannot run."""
    obstacle = "triton is not installed"
    if find_spec("triton") is not None:
        from trd_kernels.triton_rows import INTERPRETED

        obstacle = "" if INTERPRETED else "TRITON_INTERPRET=1 was not set when triton was imported"
    return ["torch", pytest.param("triton", marks=pytest.mark.skipif(bool(obstacle), reason=obstacle or "it runs"))]


@pytest.fixture(scope="module", params=backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def operate(case: Case, backend: str, **options: Any) -> tuple[LinearKLDivOutput, Tensor, Tensor]:
    """Return the operator's output and its gradients of the student's inputs and head."""
    hidden, head = (x.clone().requires_grad_() for x in case.heads()[:2])
    given = {"token_weight": case.token_weight, "labels": case.labels, "token_set": case.token_set, "chunk": 16}
    options = given | {"vocab_size": case.vocab_size, "backend": backend} | options
    out = linear_kl_div(hidden, head, *case.heads()[2:], **options)
    out.loss.backward()
    return out, hidden.grad, head.grad


def table(student: Tensor, teacher: Tensor, num_rows: int | None = None) -> Case:
    """Return heads with exactly these logits `[N, V]`, and zero rows up to `num_rows`.

    The head's gradient is that of the logits, transposed.
    """
    num_tokens, vocab_size = student.shape
    padding = (0, 0, 0, (num_rows or vocab_size) - vocab_size)
    return Case(
        student_input=torch.eye(num_tokens),
        student_weight=pad(student.T, padding),
        teacher_input=torch.eye(num_tokens),
        teacher_weight=pad(teacher.T, padding),
        vocab_size=vocab_size,
        token_weight=torch.ones(num_tokens),
        labels=torch.arange(num_tokens) % vocab_size,
        token_set=torch.tensor([0]),
    )


def logits(num_tokens: int, *, spread: float, vocab_size: int = 157) -> tuple[Tensor, Tensor]:
    """Return the student's logits, the teacher's within `spread`, and the peaked teacher's."""
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(num_tokens, vocab_size, generator=g) * 3
    return teacher + torch.randn(num_tokens, vocab_size, generator=g) * spread, teacher


def assert_right(case: Case, backend: str, tolerance: float, **options: Any) -> tuple[LinearKLDivOutput, Tensor]:
    """Compare values, statistics and the head's gradient with the fp64 definition; return output and gradient."""
    out, _, weight_grad = operate(case, backend, **options)
    want = dense(case, **{k: v for k, v in options.items() if k != "stats"})
    assert relative_error(out.token_loss, want.token_loss) <= tolerance
    assert relative_error(weight_grad, want.weight_grad) <= tolerance
    for name, x in out.stats.items():
        assert relative_error(x, want.stats[name]) <= tolerance, name
    return out, weight_grad


@pytest.mark.parametrize("mode", ["forward", "reverse", "jsd", "entry-clip", "top-6-both", "top-6-tail"])
def test_columns_of_a_partial_block_are_no_logits_of_zero(backend: str, mode: str) -> None:
    """verl #2656, #2899: columns beyond the vocabulary in its last block entered the sums with a logit of 0."""
    student, teacher = (z - 60.0 for z in logits(12, spread=0.5))
    assert (pad(student, (0, 3)).logsumexp(1) - student.logsumexp(1)).min() > 40.0
    assert_right(table(student, teacher), backend, 1e-5, stats=STATS, **MODES[mode])


@pytest.mark.parametrize("mode", ["forward", "jsd", "cold-reverse", "top-6-tail"])
def test_running_maximum_does_not_start_at_zero(backend: str, mode: str) -> None:
    """verl #2656: with a maximum of at least 0, rows of very negative logits underflow to a sum of 0."""
    student, teacher = (z - 200.0 for z in logits(12, spread=0.5))
    assert student.exp().sum() == 0
    # Logits of 200 are 1.5e-5 apart: a temperature and the tail bucket round there.
    assert_right(table(student, teacher), backend, 1e-4, stats=STATS, **MODES[mode])


@pytest.mark.parametrize("mode", DIVERGENCES)
def test_vocabularies_of_two_sizes_are_masked_not_filled_with_zeros(backend: str, mode: str) -> None:
    """Liger's chunked distillation losses: the smaller vocabulary's logits were padded with zeros, not masked."""
    case = table(*(z - 5.0 for z in logits(12, spread=0.5)), num_rows=176)
    unmasked = dense(replace(case, vocab_size=176), **MODES[mode])
    assert relative_error(unmasked.loss, dense(case, **MODES[mode]).loss) > 0.1
    _, weight_grad = assert_right(case, backend, 1e-5, **MODES[mode])
    assert not weight_grad[157:].any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("mode", [*DIVERGENCES, "entry-clip", "top-6-both"])
def test_huge_logits_do_not_overflow(backend: str, sign: float, mode: str) -> None:
    """Liger kl_div: `exp(y - max) * exp(max)` multiplies the protecting shift back in."""
    student, teacher = ((z * 64).round() / 64 + sign * 1e4 for z in logits(12, spread=0.5))
    maximum = teacher.amax(1, keepdim=True)
    naive = ((teacher - maximum).exp() * maximum.exp()).sum(1)
    assert naive.log().eq(sign * torch.inf).all()
    assert_right(table(student, teacher), backend, 1e-5, stats=STATS[2:], **MODES[mode])
    # Logits of opposite signs: their difference is rounded at 2e4 nats.
    assert_right(table(student, teacher - sign * 2e4), backend, 0.02, **MODES[mode])


@pytest.mark.parametrize(
    ("mode", "beta"), [("forward", 0.5), ("reverse", 0.5), ("mixed", 0.5), ("jsd", 0.5), ("jsd", 0.3), ("jsd", 0.95)]
)
def test_disjoint_distributions_have_no_log_of_zero(backend: str, mode: str, beta: float) -> None:
    """Liger #769: the log of a mean of probabilities that have both underflowed."""
    student, teacher = logits(8, spread=0.5, vocab_size=160)
    places = torch.arange(160) // 40  # columns of both, of the teacher, of the student, of neither
    student, teacher = student - 250.0 * (places % 2 == 1), teacher - 250.0 * (places >= 2)
    student[:4, places == 0] -= 250.0  # half of the rows share nothing
    p, q = teacher.softmax(1), student.softmax(1)
    assert (p * (p / (0.5 * p + 0.5 * q)).log()).isnan().any()
    out, gradient = assert_right(table(student, teacher), backend, 1e-5, **(MODES[mode] | {"beta": beta}))
    assert gradient.T[4:].norm(dim=1).min() > 1e-3
    if mode == "jsd":
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert (out.token_loss[:4] - entropy).abs().max() < 1e-6
        assert gradient.T[:4].norm(dim=1).max() < 1e-6


@pytest.mark.parametrize("mode", DIVERGENCES)
def test_divergence_near_zero_is_not_negative(backend: str, mode: str) -> None:
    """The usual sum of p (log p - log q) cancels: negative and wrong by its own size at a KL of 1e-8."""
    student, teacher = logits(24, spread=1.5e-4)
    want = dense(table(student, teacher), **MODES[mode]).token_loss
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    assert want.min() > 1e-10 and want.max() < 1e-7 and (log_p.exp() * (log_p - log_q)).sum(1).min() < 0
    got = operate(table(student, teacher), backend, **MODES[mode])[0].token_loss
    assert got.min() > 0
    assert ((got.double() - want) / want).abs().max() < 1e-4


@pytest.mark.parametrize("mode", DIVERGENCES)
def test_small_gradients_are_not_filtered_out(backend: str, mode: str) -> None:
    """Cut cross-entropy skips blocks with gradients below 2.4e-4: near the teacher that is all of them."""
    _, gradient = assert_right(table(*logits(12, spread=5e-4)), backend, 5e-3, **MODES[mode])
    assert gradient.abs().max() < torch.finfo(torch.bfloat16).eps / 32


@pytest.mark.parametrize(("beta", "limit"), [(1e-3, "forward"), (1 - 1e-3, "reverse")])
def test_beta_has_no_jump_at_its_ends(backend: str, beta: float, limit: str) -> None:
    """ms-swift #10078: JSD vanishes as beta nears 0 or 1, where a KL of full size took its place."""
    case = table(*logits(12, spread=0.2))
    out, gradient = assert_right(case, backend, 1e-4, divergence="jsd", beta=beta)
    share, want = min(beta, 1 - beta), dense(case, **MODES[limit])
    assert relative_error(out.token_loss / share, want.token_loss) < 0.01
    assert relative_error(gradient / share, want.weight_grad) < 0.01
    with pytest.raises(ValueError, match="beta .*forward_kl and reverse_kl"):
        operate(case, backend, divergence="jsd", beta=float(round(beta)))


@pytest.mark.parametrize(("mode", "shift"), [("top-6-tail", 1.0), ("reverse-top-6-tail", -1.0)])
def test_truncated_divergence_below_zero_still_has_a_gradient(backend: str, mode: str, shift: float) -> None:
    """verl #7855: a KL over the top K alone can be negative; clamped at 0 it has no gradient (89 % of the steps).

    With the tail as one more outcome there is nothing to clamp.
    """
    student, teacher = logits(12, spread=0.1)
    top = teacher.topk(6).indices
    case = table(student.scatter_add(1, top, torch.full((12, 6), shift)), teacher)
    log_q, log_p = (w.T.double().log_softmax(1).gather(1, top) for w in (case.student_weight, case.teacher_weight))
    truncated = shift * (log_p if shift > 0 else log_q).exp() * (log_p - log_q)
    assert truncated.sum(1).max() < 0
    out, gradient = assert_right(case, backend, 1e-5, **MODES[mode])
    assert out.token_loss.min() > 1e-3 and gradient.norm(dim=0).min() > 1e-3
    step = 1e-4 * torch.randn(157, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = (replace(case, student_weight=case.student_weight + s * step) for s in (1, -1))
    after, before = (dense(x, **MODES[mode]).token_loss for x in moved)
    assert relative_error((gradient * step).sum(0), (after - before) / 2) < 1e-4


@pytest.mark.parametrize("option", ["bias", "logit_scale", "logit_softcap"])
def test_head_options_are_refused_not_ignored(option: str) -> None:
    """TRL #6629: a softcap and a scale of the logits were dropped on the fused path, silently."""
    with pytest.raises(ValueError, match=f"{option} .*not supported"):
        linear_kl_div(*peaked_case().heads(), vocab_size=157, **{option: 30.0})


def near_heads() -> Case:
    """Return bf16 heads 0.002 nats apart, with logits up to about 40, for 64 tokens that pull the same few rows."""
    g = torch.Generator().manual_seed(0)
    head = torch.randn(157, 32, generator=g) * 0.9
    hidden = head[torch.randint(5, (64, 3), generator=g)].sum(1)
    moved = hidden + 0.03 * torch.randn(64, 32, generator=g)
    tensors = {"student_input": hidden, "student_weight": head, "teacher_input": moved, "teacher_weight": head}
    case = table(torch.zeros(64, 157), torch.zeros(64, 157))
    return replace(case, **{name: x.bfloat16() for name, x in tensors.items()})


def test_logits_are_not_rounded_to_bf16(backend: str) -> None:
    """Liger #1432: bf16 logits lose most of the gradient q - p once student and teacher are close."""
    case = near_heads()
    want, weight = dense(case), case.student_weight.double()
    assert 1e-3 < want.token_loss.mean() < 4e-3
    q, p = ((x.double() @ weight.T).bfloat16().double().softmax(1) for x in (case.student_input, case.teacher_input))
    assert relative_error((q - p) @ weight, want.input_grad) > 50 * ROUNDING_TO_BF16
    out, input_grad, weight_grad = operate(case, backend)
    assert relative_error(input_grad, want.input_grad) < ROUNDING_TO_BF16
    assert relative_error(weight_grad, want.weight_grad) < ROUNDING_TO_BF16
    assert relative_error(out.token_loss, want.token_loss) < 1e-4


def test_head_gradient_is_not_accumulated_in_bf16(backend: str) -> None:
    """Liger #827, #512: every chunk's share was rounded into a bf16 dW, so that more chunks meant more error."""
    case = near_heads()
    hidden, weight, want = case.student_input.double(), case.student_weight.double(), dense(case).weight_grad
    q, p = ((x.double() @ weight.T).softmax(1) for x in (case.student_input, case.teacher_input))
    total = torch.zeros_like(case.student_weight)
    for token in range(64):
        total += torch.outer((q - p)[token], hidden[token]).bfloat16()
    assert relative_error(total, want) > 2 * ROUNDING_TO_BF16
    few, many = (relative_error(operate(case, backend, chunk=c)[2], want) for c in (64, 2))
    assert few < ROUNDING_TO_BF16 and many < 1.02 * few


class OperatorLog(TorchDispatchMode):
    """Lists the operators that ran, and the multiply-adds of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.products: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::").rstrip("_"))
        if self.names[-1] in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.products.append(a.numel() * b.shape[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["forward", "jsd"])
def test_frozen_head_costs_no_product(backend: str, mode: str) -> None:
    """Liger's chunked distillation losses: the head's gradient was computed whether or not it was frozen."""
    case = peaked_case(dtype=torch.float32)
    student, teacher = (10 * case.vocab_size * x.shape[1] for x in (case.student_input, case.teacher_input))
    for trains, gradients in (((False, False), 0), ((True, False), 1), ((False, True), 1), ((True, True), 2)):
        hidden, head = (x.clone().requires_grad_(t) for x, t in zip(case.heads()[:2], trains, strict=True))
        options = {"vocab_size": case.vocab_size, "backend": backend, "token_weight": case.token_weight, "chunk": 10}
        with OperatorLog() as log:
            out = linear_kl_div(hidden, head, *case.heads()[2:], **options, **MODES[mode])
            if gradients:
                out.loss.backward()
        assert sorted(log.products) == [student] * 2 * (1 + gradients) + [teacher] * 2  # 20 tokens: 2 chunks


@pytest.mark.parametrize("mode", ["jsd", "top-6-tail"])
def test_no_buffer_of_tokens_times_vocabulary(backend: str, mode: str) -> None:
    """Liger fused_linear_jsd: per-entry losses `[N, V]` in fp32, the largest tensor of the whole step."""
    case = peaked_case(num_tokens=64, vocab_size=203, num_rows=203, dtype=torch.float32)
    with AllocationMeter(*case.heads()) as meter:
        operate(case, backend, stats=STATS, **MODES[mode])
    assert meter.largest_numel < 64 * 203 // 2


def test_token_weights_with_a_trainable_head(backend: str) -> None:
    """Liger #968: per-token factors applied after dW had been summed over tokens."""
    case = peaked_case(dtype=torch.float32)
    case = replace(case, token_weight=torch.randn(24, generator=torch.Generator().manual_seed(0)))
    want, unweighted = dense(case), dense(replace(case, token_weight=torch.ones(24)))
    assert relative_error(case.token_weight.mean() * unweighted.weight_grad, want.weight_grad) > 0.5
    _, input_grad, weight_grad = operate(case, backend)
    assert relative_error(weight_grad, want.weight_grad) < 1e-5
    assert relative_error(input_grad, want.input_grad) < 1e-5


@pytest.mark.parametrize("mode", ["forward", "jsd"])
def test_mask_is_applied(backend: str, mode: str) -> None:
    """Liger #974: JSD accepted ignored labels and trained on them all the same."""
    case = peaked_case(dtype=torch.float32)
    masked, kept = case.token_weight == 0, case.token_weight != 0
    assert operate(replace(case, token_weight=torch.ones(24)), backend, **MODES[mode])[1][masked].any()
    case.labels[masked] = -100
    rows = {x: getattr(case, x)[kept] for x in ("student_input", "teacher_input", "token_weight", "labels")}
    want = operate(replace(case, **rows), backend, stats=STATS, **MODES[mode])
    out, input_grad, weight_grad = operate(case, backend, stats=STATS, **MODES[mode])
    assert relative_error(out.loss, want[0].loss.detach()) < 1e-6 and relative_error(weight_grad, want[2]) < 1e-6
    pairs = [(x, want[0].stats[name]) for name, x in out.stats.items()]
    for got, expected in (*pairs, (out.token_loss, want[0].token_loss), (input_grad, want[1])):
        assert torch.equal(got[kept], expected) and not got[masked].any()


def test_labels_follow_their_chunk(backend: str) -> None:
    """Liger #330: every chunk of tokens was compared with the labels of the whole batch."""
    case = peaked_case(dtype=torch.float32)
    want, firsts = (dense(replace(case, labels=x)).stats for x in (case.labels, case.labels[:5].repeat(5)[:24]))
    for name in STATS[:2]:
        assert relative_error(firsts[name], want[name]) > 0.1
        for chunk in (5, (5, 10)):
            assert relative_error(operate(case, backend, chunk=chunk, stats=[name])[0].stats[name], want[name]) < 1e-5


def test_upstream_gradient_is_neither_assumed_nor_asked_for(backend: str) -> None:
    """Liger's gradients in the forward pass: right for an upstream gradient of 1 alone, which the host waited for."""
    case = peaked_case(dtype=torch.float32)
    want = dense(case)
    with OperatorLog() as log:
        bool(torch.ones(()) == 1.0)
    assert "_local_scalar_dense" in log.names
    hidden, head = (x.clone().requires_grad_() for x in case.heads()[:2])
    options = {"vocab_size": case.vocab_size, "token_weight": case.token_weight, "backend": backend}
    loss = linear_kl_div(hidden, head, *case.heads()[2:], **options).loss
    for upstream in (-2.5, 0.0, 1.0):
        with OperatorLog() as log:
            grads = torch.autograd.grad(loss, (hidden, head), torch.tensor(upstream), retain_graph=True)
        assert relative_error(grads[0], upstream * want.input_grad) < 1e-5
        assert relative_error(grads[1], upstream * want.weight_grad) < 1e-5
        assert "_local_scalar_dense" not in log.names
    main_grad = torch.full_like(head, 2.0)
    added = linear_kl_div(hidden, head, *case.heads()[2:], grad_weight_out=main_grad, **options).loss
    (3.0 * added).backward()
    assert relative_error(main_grad - 2.0, 3.0 * want.weight_grad) < 1e-5 and head.grad is None
