"""The Triton backend under Triton's interpreter: the same numbers as the fp64 definition, on the same peaked data."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.linear_kl_dense import MODES, STATS, Case, dense, peaked_case, relative_error, tied_case
from trd_kernels import LinearKLDivOutput, backends, linear_kl_div

triton_rows = pytest.importorskip("trd_kernels.triton_rows", reason="triton is not installed")
if not triton_rows.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 was not set when triton was imported", allow_module_level=True)

STANDARD_STATS = (*STATS, "divergence")


def run(case: Case, **options: Any) -> tuple[LinearKLDivOutput, Tensor, Tensor]:
    """Call the operator with the Triton backend and return its output and both gradients."""
    hidden = case.student_input.clone().requires_grad_()
    head = case.student_weight.clone().requires_grad_()
    out = linear_kl_div(
        hidden,
        head,
        *case.heads()[2:],
        vocab_size=case.vocab_size,
        token_weight=case.token_weight,
        labels=case.labels,
        token_set=case.token_set,
        **{"stats": STATS, "chunk": 16, "backend": "triton", **options},
    )
    out.loss.backward()
    return out, hidden.grad, head.grad


def errors(case: Case, got: tuple[LinearKLDivOutput, Tensor, Tensor], **options: Any) -> dict[str, float]:
    """Return relative errors against the definition."""
    out, want = got[0], dense(case, **options)
    found = {
        "loss": relative_error(out.loss, want.loss),
        "token_loss": relative_error(out.token_loss, want.token_loss),
        "input_grad": relative_error(got[1], want.input_grad),
        "weight_grad": relative_error(got[2], want.weight_grad),
    }
    return found | {name: relative_error(out.stats[name], want.stats[name]) for name in STATS}


@pytest.mark.parametrize("mode", MODES)
def test_equals_definition(mode: str) -> None:
    case = peaked_case(dtype=torch.float32)
    found = errors(case, run(case, **MODES[mode]), **MODES[mode])
    assert max(found.values()) <= 1e-5, found


# A block has 64 columns: exactly one, one and a column, two, and (above) two and 29.
@pytest.mark.parametrize("vocab_size", [64, 65, 128])
@pytest.mark.parametrize("mode", ["forward", "reverse", "jsd", "mixed", "entry-clip", "top-6-both", "top-6-tail"])
def test_any_number_of_columns(mode: str, vocab_size: int) -> None:
    case = peaked_case(dtype=torch.float32, vocab_size=vocab_size)
    found = errors(case, run(case, **MODES[mode]), **MODES[mode])
    # What a clip lets through is small beside what was rounded.
    assert max(found.values()) <= (2e-5 if "clip" in mode else 1e-5), found


@pytest.mark.parametrize("beta", [0.01, 0.2, 0.25, 0.5, 0.75, 0.8, 0.99])
@pytest.mark.parametrize("offset", [0.0, 60.0])
def test_jsd_of_any_beta(beta: float, offset: float) -> None:
    """Logarithms of mixtures come from one series near one half and from two pieces elsewhere."""
    case = peaked_case(dtype=torch.float32, offset=offset)
    options = {"divergence": "jsd", "beta": beta}
    found = errors(case, run(case, **options), **options)
    assert max(found.values()) <= (2e-4 if offset else 2e-5), found


@pytest.mark.parametrize("mode", ["top-6-both", "top-6-teacher", "top-6-tail"])
def test_ties_at_the_threshold_go_to_the_lowest_ids(mode: str) -> None:
    exact = tied_case()
    case = replace(exact, **{k: getattr(exact, k).float() for k in exact.__slots__ if "input" in k or "weight" in k})
    found = errors(case, run(case, **MODES[mode]), **MODES[mode])
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("mode", ["forward", "reverse", "jsd", "top-6-tail", "entry-clip"])
@pytest.mark.parametrize("offset", [60.0, -60.0])
def test_logits_offset_by_60_nats(mode: str, offset: float) -> None:
    # fp32 logits of size 80 are 8e-6 apart: the torch backend does no better.
    case = peaked_case(offset=offset, dtype=torch.float32)
    found = errors(case, run(case, **MODES[mode]), **MODES[mode])
    assert max(found.values()) <= 2e-4, found


@pytest.mark.parametrize("mode", ["forward", "reverse", "jsd", "mixed"])
def test_value_and_gradient_are_precise_near_zero(mode: str) -> None:
    """Identity inputs make the heads tables of exact logits, so that only the row kernels can err."""
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(321, 24, generator=g) * 3
    for spread, tolerance in ((1.5e-3, 5e-4), (0.1, 1e-5), (2.0, 1e-5)):
        student = teacher + torch.randn(321, 24, generator=g) * spread
        ones, zeros = torch.ones(24), torch.zeros(24, dtype=torch.int64)
        case = Case(
            student_input=torch.eye(24),
            student_weight=student,
            teacher_input=torch.eye(24),
            teacher_weight=teacher,
            vocab_size=321,
            token_weight=ones,
            labels=zeros,
            token_set=zeros[:1],
        )
        want = dense(case, **MODES[mode])
        out, _, weight_grad = run(case, **MODES[mode])
        assert out.token_loss.min() > 0
        assert ((out.token_loss.double() - want.token_loss) / want.token_loss).abs().max() < 1e-5
        assert relative_error(weight_grad, want.weight_grad) < tolerance


@pytest.mark.parametrize(
    "mode", ["forward", "reverse", "jsd", "mixed", "entry-clip", "hot", "top-6-both", "top-6-tail"]
)
def test_equal_heads_give_exactly_zero(mode: str) -> None:
    case = peaked_case(dtype=torch.float32)
    case = replace(case, teacher_input=case.student_input, teacher_weight=case.student_weight)
    out, input_grad, weight_grad = run(case, **MODES[mode])
    for zero in (out.loss, out.token_loss, input_grad, weight_grad):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("mode", ["forward", "jsd", "cold-top-6", "both-clips"])
def test_two_level_chunks_change_nothing_but_rounding(mode: str) -> None:
    case = peaked_case(dtype=torch.float32)
    for chunk in (1, (3, 7), (5, 100)):
        found = errors(case, run(case, chunk=chunk, **MODES[mode]), **MODES[mode])
        assert max(found.values()) <= 1e-5, (chunk, found)


def test_without_gradient_the_outputs_are_the_same_bits() -> None:
    for mode in ("forward", "jsd", "entry-clip", "top-6-tail"):
        case = peaked_case(dtype=torch.float32)
        want = run(case, stats=STANDARD_STATS, return_top_k=3, **MODES[mode])[0]
        with torch.no_grad():
            got = linear_kl_div(
                *case.heads(),
                vocab_size=case.vocab_size,
                token_weight=case.token_weight,
                labels=case.labels,
                token_set=case.token_set,
                stats=STANDARD_STATS,
                return_top_k=3,
                chunk=16,
                backend="triton",
                **MODES[mode],
            )
        assert torch.equal(got.loss, want.loss.detach()) and torch.equal(got.token_loss, want.token_loss)
        assert all(torch.equal(got.stats[name], want.stats[name]) for name in want.stats)


def test_bf16_inputs() -> None:
    case = peaked_case(dtype=torch.bfloat16)
    case = replace(case, token_weight=case.token_weight.float())
    want = dense(case)
    out, input_grad, weight_grad = run(case)
    assert relative_error(out.loss, want.loss) < 1e-5
    assert relative_error(input_grad, want.input_grad) < 2.0**-9
    assert relative_error(weight_grad, want.weight_grad) < 2.0**-9


def test_nothing_to_learn_from() -> None:
    case = replace(peaked_case(dtype=torch.float32), token_weight=torch.zeros(24))
    out, input_grad, weight_grad = run(case)
    for zero in (out.loss, out.token_loss, input_grad, weight_grad):
        assert torch.equal(zero, torch.zeros_like(zero))


def test_auto_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    backends._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="trd_kernels"):
        for _ in range(3):
            assert backends.choose_backend("auto", device=torch.device("cpu"), dtype=torch.float32).name == "torch"
        cuda = torch.device("cuda")
        assert backends.choose_backend("auto", device=cuda, dtype=torch.bfloat16).name == "triton"
        assert backends.choose_backend("auto", device=cuda, dtype=torch.float64).name == "torch"
    said = [record.message for record in caplog.records]
    assert len(said) == 3
    assert "torch, the choice for a cpu device" in said[0]
    assert said[1] == "row kernels: triton"
    assert "torch, as the Triton kernels compute in float32" in said[2]


def test_a_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = peaked_case(dtype=torch.float32)
    monkeypatch.setattr(triton_rows, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend triton: Triton needs a CUDA device, or TRITON_INTERPRET=1"):
        run(case)
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("no")))
    with pytest.raises(ValueError, match="backend triton: triton does not import"):
        run(case)
    assert backends.choose_backend("auto", device=torch.device("cuda"), dtype=torch.float32).name == "torch"
