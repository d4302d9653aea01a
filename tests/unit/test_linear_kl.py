"""`linear_kl_div` against its fp64 definition, on peaked data with poisoned padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.linear_kl_dense import MODES, STATS, Case, Dense, dense, peaked_case, relative_error, tied_case
from trd_kernels import LinearKLDivLoss, LinearKLDivOutput, linear_kl_div, linear_kl_div_reference

HEADS = ("student_input", "student_weight", "teacher_input", "teacher_weight")


def run(case: Case, *, upstream: float = 1.0, **options: Any) -> tuple[LinearKLDivOutput, Tensor, Tensor]:
    """Call the operator and return its output and both gradients."""
    hidden = case.student_input.clone().requires_grad_()
    head = case.student_weight.clone().requires_grad_()
    options = {"stats": STATS, "chunk": 7, **options}
    out = linear_kl_div(
        hidden,
        head,
        case.teacher_input,
        case.teacher_weight,
        vocab_size=case.vocab_size,
        token_weight=case.token_weight,
        labels=case.labels,
        token_set=case.token_set,
        **options,
    )
    (upstream * out.loss).backward()
    return out, hidden.grad, head.grad


def assert_matches(got: tuple[LinearKLDivOutput, Tensor, Tensor], want: Dense, tolerance: float) -> None:
    out, input_grad, weight_grad = got
    errors = {
        "loss": relative_error(out.loss, want.loss),
        "token_loss": relative_error(out.token_loss, want.token_loss),
        "input_grad": relative_error(input_grad, want.input_grad),
        "weight_grad": relative_error(weight_grad, want.weight_grad),
    } | {name: relative_error(x, want.stats[name]) for name, x in out.stats.items()}
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("mode", MODES)
def test_fp64_equals_definition(mode: str) -> None:
    case = peaked_case()
    want = dense(case, **MODES[mode])
    if "clip" in mode:
        capped = (want.input_grad[case.token_weight != 0].norm(dim=1) == 0).sum()
        assert "entry" in mode or "both-clips" in mode or 0 < capped < 19
    assert_matches(run(case, **MODES[mode]), want, 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_fp32_equals_definition(mode: str) -> None:
    case = peaked_case(dtype=torch.float32)
    assert_matches(run(case, **MODES[mode]), dense(case, **MODES[mode]), 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_shipped_reference_equals_definition(mode: str) -> None:
    case = peaked_case()
    hidden, head = case.student_input.clone().requires_grad_(), case.student_weight.clone().requires_grad_()
    out = linear_kl_div_reference(
        hidden,
        head,
        case.teacher_input,
        case.teacher_weight,
        vocab_size=case.vocab_size,
        token_weight=case.token_weight,
        labels=case.labels,
        token_set=case.token_set,
        stats=STATS,
        **MODES[mode],
    )
    out.loss.backward()
    assert_matches((out, hidden.grad, head.grad), dense(case, **MODES[mode]), 1e-10)


def test_data_spans_the_range_that_matters() -> None:
    values = dense(peaked_case()).token_loss
    assert values.max() > 0.5
    assert 0 < values[values > 0].min() < 1e-6
    assert dense(peaked_case()).stats["teacher_entropy"].max() < 4.0 < torch.tensor(157.0).log()


@pytest.mark.parametrize("mode", ["forward", "reverse", "jsd", "top-6-tail", "entry-clip"])
@pytest.mark.parametrize("offset", [60.0, -60.0])
def test_logits_offset_by_60_nats(mode: str, offset: float) -> None:
    case = peaked_case(offset=offset)
    assert_matches(run(case, **MODES[mode]), dense(case, **MODES[mode]), 1e-10)
    # fp32 logits of size 80 are 8e-6 apart: no loss can be better than that (see the exact tables below).
    case = peaked_case(offset=offset, dtype=torch.float32)
    assert_matches(run(case, **MODES[mode]), dense(case, **MODES[mode]), 2e-4)


@pytest.mark.parametrize(
    "mode", ["forward", "reverse", "jsd", "mixed", "entry-clip", "hot", "top-6-both", "top-6-tail"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_heads_give_exactly_zero(mode: str, dtype: torch.dtype) -> None:
    case = peaked_case(dtype=dtype)
    case = replace(case, teacher_input=case.student_input, teacher_weight=case.student_weight)
    out, input_grad, weight_grad = run(case, **MODES[mode])
    for zero in (out.loss, out.token_loss, input_grad, weight_grad):
        assert torch.equal(zero, torch.zeros_like(zero))
    kept = (case.token_weight != 0).float()
    assert torch.equal(out.stats["argmax_match"].float(), kept)


def table_case(*, spread: float, offset: float = 0.0) -> Case:
    """Identity inputs: the heads are tables of logits that fp32 holds exactly, so only the divergence can err."""
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(999, 32, generator=g) * 3 - offset
    student = teacher + torch.randn(999, 32, generator=g) * spread + 2 * offset
    return Case(
        student_input=torch.eye(32),
        student_weight=student,
        teacher_input=torch.eye(32),
        teacher_weight=teacher,
        vocab_size=999,
        token_weight=torch.ones(32),
        labels=torch.zeros(32, dtype=torch.int64),
        token_set=torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize("mode", ["forward", "reverse", "jsd", "mixed"])
def test_fp32_value_is_precise_and_positive_near_zero(mode: str) -> None:
    case = table_case(spread=1.5e-3)
    want = dense(case, **MODES[mode]).token_loss
    got, _, weight_grad = run(case, **MODES[mode])
    assert want.min() > 1e-8 and want.max() < 1e-5
    assert got.token_loss.min() > 0
    assert relative_error(weight_grad, dense(case, **MODES[mode]).weight_grad) < 5e-4
    assert ((got.token_loss.double() - want) / want).abs().max() < 1e-5


@pytest.mark.parametrize("mode", [m for m in MODES if "clip" not in m])
def test_fp32_is_exact_given_exact_logits(mode: str) -> None:
    options = MODES[mode] | {"token_clip": None}
    for spread in (2.0, 0.1):
        case = table_case(spread=spread)
        assert_matches(run(case, **options), dense(case, **options), 1e-5)
    for offset in (60.0, -60.0):
        # z_S - z_T is rounded at 120 nats. The head's gradient shows it alone; the input's also multiplies by logits.
        case = table_case(spread=0.1, offset=offset)
        out, _, weight_grad = run(case, **options)
        want = dense(case, **options)
        assert relative_error(weight_grad, want.weight_grad) < 5e-4
        assert relative_error(out.loss, want.loss) < 1e-4


def test_zero_padding_rows_carry_no_probability() -> None:
    # Rows loaded as zeros have logit 0, far above the rest at an offset of -60: they must not enter any sum.
    case = peaked_case(offset=-60.0)
    for weight in (case.student_weight, case.teacher_weight):
        weight[case.vocab_size :] = 0.0
    got = run(case)
    assert_matches(got, dense(case), 1e-10)
    assert torch.equal(got[2][case.vocab_size :], torch.zeros_like(got[2][case.vocab_size :]))


@pytest.mark.parametrize("mode", ["top-6-both", "top-6-teacher", "top-6-tail"])
def test_top_k_ties_go_to_the_lowest_ids(mode: str) -> None:
    case = tied_case()
    logits = case.teacher_input @ case.teacher_weight.T
    top = logits.topk(7, dim=1).values
    assert (top[:, 5] == top[:, 6]).sum() > 10
    assert_matches(run(case, **MODES[mode]), dense(case, **MODES[mode]), 1e-10)


@pytest.mark.parametrize("mode", ["forward", "reverse", "jsd", "mixed", "entry-clip", "top-6-tail", "hot"])
def test_finite_differences(mode: str) -> None:
    case = peaked_case()
    g = torch.Generator().manual_seed(5)
    to_hidden = torch.randn(case.student_input.shape, generator=g, dtype=torch.float64)
    to_head = torch.randn(case.student_weight.shape, generator=g, dtype=torch.float64) * 0.1
    _, input_grad, weight_grad = run(case, **MODES[mode])
    directional = (input_grad * to_hidden).sum() + (weight_grad * to_head).sum()

    def value(step: float) -> Tensor:
        moved = replace(
            case,
            student_input=case.student_input + step * to_hidden,
            student_weight=case.student_weight + step * to_head,
        )
        return run(moved, **MODES[mode])[0].loss.detach()

    h = 1e-5
    numeric = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert abs(numeric - directional) <= 1e-6 * abs(directional)


@pytest.mark.parametrize("mode", ["forward", "jsd", "top-6-tail", "both-clips"])
def test_chunk_size_does_not_matter(mode: str) -> None:
    case = peaked_case()
    want = dense(case, **MODES[mode])
    for chunk in (1, 2, 5, 19, 1000):
        assert_matches(run(case, chunk=chunk, **MODES[mode]), want, 1e-10)
    assert_matches(run(case, chunk=None, workspace_mb=0.01, **MODES[mode]), want, 1e-10)
    assert_matches(run(case, chunk=None, **MODES[mode]), want, 1e-10)


def test_micro_batch_split_does_not_matter() -> None:
    case = peaked_case()
    whole, input_grad, weight_grad = run(case)
    parts = []
    for rows in (slice(0, 9), slice(9, 10), slice(10, 24)):
        fields = ("student_input", "teacher_input", "token_weight", "labels")
        parts.append(run(replace(case, **{f: getattr(case, f)[rows] for f in fields})))
    assert relative_error(sum(out.loss.detach() for out, _, _ in parts), whole.loss.detach()) < 1e-12
    assert relative_error(torch.cat([g for _, g, _ in parts]), input_grad) < 1e-12
    assert relative_error(sum(g for _, _, g in parts), weight_grad) < 1e-12


def test_upstream_gradient_scales_both_gradients() -> None:
    case = peaked_case()
    want = dense(case)
    scaled = replace(want, input_grad=want.input_grad * -3.5, weight_grad=want.weight_grad * -3.5)
    assert_matches(run(case, upstream=-3.5), scaled, 1e-10)


def test_frozen_head_gets_no_gradient_and_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from trd_kernels.chunk_pass import Heads

    products = []
    monkeypatch.setattr(Heads, "accumulate", lambda *args: products.append(args))
    case = peaked_case()
    hidden, head = case.student_input.clone().requires_grad_(), case.student_weight.clone()
    out = linear_kl_div(
        hidden, head, *case.heads()[2:], vocab_size=case.vocab_size, token_weight=case.token_weight, chunk=7
    )
    out.loss.backward()
    assert head.grad is None and products == []
    assert relative_error(hidden.grad, dense(case).input_grad) < 1e-10


def test_trainable_head_with_frozen_input() -> None:
    case = peaked_case()
    head = case.student_weight.clone().requires_grad_()
    out = linear_kl_div(
        case.student_input,
        head,
        *case.heads()[2:],
        vocab_size=case.vocab_size,
        token_weight=case.token_weight,
    )
    out.loss.backward()
    assert relative_error(head.grad, dense(case).weight_grad) < 1e-10


def test_without_gradient_outputs_are_the_same() -> None:
    case = peaked_case()
    want, _, _ = run(case)
    hidden = case.student_input.clone().requires_grad_()
    with torch.no_grad():
        got = linear_kl_div(
            hidden,
            *case.heads()[1:],
            vocab_size=case.vocab_size,
            token_weight=case.token_weight,
            labels=case.labels,
            token_set=case.token_set,
            stats=STATS,
            chunk=7,
        )
    assert not got.loss.requires_grad
    assert torch.equal(got.loss, want.loss.detach()) and torch.equal(got.token_loss, want.token_loss)
    assert all(torch.equal(got.stats[name], want.stats[name]) for name in STATS)


def test_only_the_loss_is_differentiable() -> None:
    out, _, _ = run(peaked_case())
    assert out.loss.requires_grad and not out.token_loss.requires_grad
    assert set(out.stats) == set(STATS) and not any(x.requires_grad for x in out.stats.values())
    assert run(peaked_case(), stats=())[0].stats == {}


@pytest.mark.parametrize("num_tokens", [0, 24])
def test_nothing_to_learn_from(num_tokens: int) -> None:
    case = peaked_case(num_tokens=num_tokens) if num_tokens else peaked_case()
    case = replace(
        case,
        student_input=case.student_input[:num_tokens],
        teacher_input=case.teacher_input[:num_tokens],
        token_weight=torch.zeros(num_tokens, dtype=torch.float64),
        labels=case.labels[:num_tokens],
    )
    out, input_grad, weight_grad = run(case)
    assert out.loss == 0
    for x, shape in ((out.token_loss, (num_tokens,)), (input_grad, case.student_input.shape), (weight_grad, (176, 21))):
        assert torch.equal(x, torch.zeros(shape, dtype=torch.float64))
    assert all(torch.equal(x, torch.zeros(num_tokens, dtype=torch.float64)) for x in out.stats.values())


def test_rows_of_zero_weight_are_not_even_read() -> None:
    case = peaked_case()
    want = dense(case)
    dropped = case.token_weight == 0
    case.student_input[dropped] = torch.nan
    case.teacher_input[dropped] = torch.inf
    case.labels[dropped] = -100
    got = run(case)
    assert_matches(got, want, 1e-10)


def test_label_outside_the_vocabulary_has_no_logprob() -> None:
    case = peaked_case()
    case.labels[0], case.labels[1] = -1, case.vocab_size
    out, _, _ = run(case)
    for name in ("student_logprob", "teacher_logprob"):
        assert out.stats[name].isnan().nonzero().flatten().tolist() == [0, 1]


def test_tokens_weigh_one_by_default() -> None:
    case = replace(peaked_case(), token_weight=torch.ones(24, dtype=torch.float64))
    out = linear_kl_div(*case.heads(), vocab_size=case.vocab_size)
    assert relative_error(out.loss, dense(case).loss) < 1e-10


def test_non_contiguous_tensors() -> None:
    case = peaked_case()
    strided = replace(
        case,
        student_input=torch.stack([case.student_input, case.student_input + 1], 2)[:, :, 0],
        teacher_weight=case.teacher_weight.T.contiguous().T,
        student_weight=case.student_weight.T.contiguous().T,
        token_weight=torch.stack([case.token_weight, case.token_weight + 1], 1)[:, 0],
    )
    hidden, head = strided.student_input.requires_grad_(), strided.student_weight.requires_grad_()
    out = linear_kl_div(hidden, head, *strided.heads()[2:], vocab_size=157, token_weight=strided.token_weight, chunk=7)
    grads = torch.autograd.grad(out.loss, (hidden, head))
    want = dense(case)
    assert relative_error(grads[0], want.input_grad) < 1e-10
    assert relative_error(grads[1], want.weight_grad) < 1e-10


def test_bf16_inputs_compute_in_fp32_on_the_cpu() -> None:
    case = peaked_case(dtype=torch.bfloat16)
    case = replace(case, token_weight=case.token_weight.float())
    out, input_grad, weight_grad = run(case)
    want = dense(case)
    assert out.loss.dtype == out.token_loss.dtype == torch.float32
    assert input_grad.dtype == weight_grad.dtype == torch.bfloat16
    assert relative_error(out.loss, want.loss) < 1e-5
    # One rounding to 8 bits of mantissa is at most 2^-9 and about 2^-9 / sqrt(3) on average.
    assert relative_error(input_grad, want.input_grad) < 2.0**-9
    assert relative_error(weight_grad, want.weight_grad) < 2.0**-9


def test_autocast_casts_as_a_matrix_product_would() -> None:
    case = peaked_case(dtype=torch.float32)
    cast = replace(case, **{name: getattr(case, name).bfloat16() for name in HEADS})
    want = run(cast)
    mixed = replace(case, student_input=case.student_input.bfloat16(), teacher_weight=case.teacher_weight.bfloat16())
    for given in (case, cast, mixed):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, input_grad, weight_grad = run(given)
        assert torch.equal(out.loss, want[0].loss)
        assert input_grad.dtype == given.student_input.dtype and weight_grad.dtype == given.student_weight.dtype
        assert torch.equal(input_grad.bfloat16(), want[1]) and torch.equal(weight_grad.bfloat16(), want[2])


def test_autocast_leaves_float64_alone() -> None:
    case = peaked_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_matches(run(case), dense(case), 1e-10)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_activation_recompute(use_reentrant: bool) -> None:
    case = peaked_case()
    want = dense(case)
    hidden, head = case.student_input.clone().requires_grad_(), case.student_weight.clone().requires_grad_()

    def block(x: Tensor, w: Tensor) -> Tensor:
        teacher = case.heads()[2:]
        out = linear_kl_div(x * 1.0, w, *teacher, vocab_size=157, token_weight=case.token_weight, chunk=7)
        return out.loss

    checkpoint(block, hidden, head, use_reentrant=use_reentrant).backward()
    assert relative_error(hidden.grad, want.input_grad) < 1e-10
    assert relative_error(head.grad, want.weight_grad) < 1e-10


def test_backward_twice_accumulates_and_second_order_is_refused() -> None:
    case = peaked_case()
    hidden = case.student_input.clone().requires_grad_()
    out = linear_kl_div(hidden, *case.heads()[1:], vocab_size=157, token_weight=case.token_weight)
    out.loss.backward(retain_graph=True)
    out.loss.backward()
    assert relative_error(hidden.grad, 2 * dense(case).input_grad) < 1e-10
    out = linear_kl_div(hidden, *case.heads()[1:], vocab_size=157)
    (first,) = torch.autograd.grad(out.loss * hidden.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_module_binds_options() -> None:
    case = peaked_case()
    module = LinearKLDivLoss(vocab_size=157, divergence="reverse_kl", stats=("student_logprob",))
    out = module(*case.heads(), token_weight=case.token_weight, labels=case.labels)
    want = dense(case, divergence="reverse_kl")
    assert relative_error(out.loss, want.loss) < 1e-10
    assert relative_error(out.stats["student_logprob"], want.stats["student_logprob"]) < 1e-10
    assert "divergence=reverse_kl" in repr(module)


BAD_OPTIONS = [
    ({"divergence": "forward-kl"}, "divergence forward-kl: .*forward_kl"),
    ({"divergence": "jsd", "beta": 1.0}, "beta 1.0: jsd needs"),
    ({"divergence": "mixed", "beta": 0.0}, "beta 0.0: mixed needs"),
    ({"temperature": 0.0}, "temperature 0.0"),
    ({"teacher_top_k": -1}, "teacher_top_k -1"),
    ({"teacher_top_k": 158}, "teacher_top_k 158: .*157"),
    ({"teacher_top_k": 4, "divergence": "jsd", "top_k_mode": "renorm_teacher"}, "renorm_teacher: .*not jsd"),
    ({"teacher_top_k": 4, "top_k_mode": "all"}, "top_k_mode all"),
    ({"teacher_top_k": 4, "divergence": "reverse_kl", "top_k_mode": "renorm_teacher"}, "renorm_teacher: .*infinite"),
    ({"token_clip": 0.0}, "token_clip 0.0"),
    ({"entry_clip": 0.1, "divergence": "reverse_kl"}, "entry_clip 0.1: .*forward_kl"),
    ({"entry_clip": 0.1, "teacher_top_k": 4}, "entry_clip 0.1: .*full vocabulary"),
    ({"vocab_size": 177}, "vocab_size 177: .*176"),
    ({"vocab_size": 0}, "vocab_size 0"),
    ({"sequence_parallel": True}, "sequence_parallel True: needs tp_group"),
    ({"backend": "triton"}, "backend triton: .*float32 .* float64; use backend='torch'"),
    ({"backend": "cuda"}, "backend cuda: choose one of auto, torch, triton"),
    ({"grad_reduce_dtype": torch.int32}, "grad_reduce_dtype"),
    ({"chunk": 0}, "chunk 0"),
    ({"workspace_mb": 0}, "workspace_mb 0"),
    ({"stats": ("entropy",)}, "stats entropy: .*student_entropy"),
    ({"stats": "argmax_match"}, "stats 'argmax_match': .*sequence"),
    ({"stats": ("teacher_logprob",)}, "labels None"),
    ({"stats": ("teacher_mass",)}, "token_set None"),
    ({"stats": ("teacher_mass",), "token_set": torch.tensor([157])}, r"token_set \[157\]: .*\[0, 157\)"),
    ({"labels": torch.zeros(23, dtype=torch.int64)}, r"labels \(23,\): must be \(24,\)"),
    ({"labels": torch.zeros(24)}, "labels torch.float32: must be int64"),
    ({"token_weight": torch.ones(24, 1)}, r"token_weight \(24, 1\)"),
    ({"token_weight": torch.ones(24, dtype=torch.bool)}, "token_weight torch.bool"),
    ({"token_weight": torch.ones(24, requires_grad=True)}, "token_weight that requires grad"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[m.split(":")[0] for _, m in BAD_OPTIONS])
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_kl_div(*peaked_case().heads(), **{"vocab_size": 157, **options})


def test_bad_tensors_are_refused() -> None:
    h, w, t, u = peaked_case().heads()
    for tensors, message in [
        ((h[0], w, t, u), "student_input .*two dimensions"),
        ((h, w[:, :20], t, u), "student_weight .*21 columns"),
        ((h, w, t[:5], u), "teacher_input .*24 rows"),
        ((h, w, t, u[:170]), "teacher_weight .*176 vocabulary rows"),
        ((h, w.float(), t, u), "student_weight torch.float32: must be the dtype"),
        ((h, w, t.float(), u.float()), "teacher_input torch.float32"),
        ((h.half(), w.half(), t.half(), u.half()), "student_input torch.float16"),
        ((h, w, t.clone().requires_grad_(), u), "teacher_input that requires grad: .*detach"),
        ((h, w, t, u.clone().requires_grad_()), "teacher_weight that requires grad: .*detach"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_kl_div(*tensors, vocab_size=157)
