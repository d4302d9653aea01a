"""What `linear_kl_div` offers around the loss itself: chunk sizes, top-K of both sides, main_grad, compilation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.linear_kl_dense import MODES, Case, dense, peaked_case, relative_error, tied_case
from trd_kernels import LinearKLDivOutput, linear_kl_div
from trd_kernels.heads import Heads
from trd_kernels.torch_rows import TorchRows
from trd_kernels.workspace import DEFAULT_WORKSPACE_MB, ChunkSizes


def call(case: Case, hidden: Tensor, head: Tensor, **options: Any) -> LinearKLDivOutput:
    """Call the operator on a case with these student tensors."""
    given = {"vocab_size": case.vocab_size, "token_weight": case.token_weight, "chunk": 7, **options}
    return linear_kl_div(hidden, head, case.teacher_input, case.teacher_weight, **given)


def leaves(case: Case) -> tuple[Tensor, Tensor]:
    return case.student_input.clone().requires_grad_(), case.student_weight.clone().requires_grad_()


@pytest.mark.parametrize("mode", ["forward", "jsd", "top-6-tail", "both-clips", "hot"])
@pytest.mark.parametrize("chunk", [(1, 1), (2, 5), (3, 9), (7, 19), (7, 1000), (1000, 1000)])
def test_two_level_chunks(mode: str, chunk: tuple[int, int]) -> None:
    case, want = peaked_case(), dense(peaked_case(), **MODES[mode])
    hidden, head = leaves(case)
    out = call(case, hidden, head, chunk=chunk, **MODES[mode])
    out.loss.backward()
    assert relative_error(out.loss, want.loss) < 1e-10
    assert relative_error(hidden.grad, want.input_grad) < 1e-10
    assert relative_error(head.grad, want.weight_grad) < 1e-10


class NeedsNoScratch(TorchRows):
    scratch_mb = 0.0


def test_default_chunks_of_a_large_vocabulary() -> None:
    """What the row kernels of a GPU get at 151,936 columns in bf16; the sizes of kernels/README.md."""

    def sizes(columns: int, budget_mb: float, *, with_grad: bool = True, dtype: torch.dtype = torch.bfloat16) -> Any:
        tensor = torch.empty(1, 1, device="meta")
        heads = Heads(
            student_input=tensor,
            student_weight=tensor,
            teacher_input=tensor,
            teacher_weight=tensor,
            num_padding=0,
            compute_dtype=torch.float32,
            operand_dtype=dtype,
        )
        return ChunkSizes.within(budget_mb, heads=heads, rows=NeedsNoScratch(), columns=columns, with_grad=with_grad)

    assert sizes(151_936, DEFAULT_WORKSPACE_MB) == (512, 2048)
    assert sizes(38_016, DEFAULT_WORKSPACE_MB / 4) == (512, 2048)
    assert sizes(19_072, DEFAULT_WORKSPACE_MB / 8) == (512, 2048)
    assert sizes(151_936, DEFAULT_WORKSPACE_MB, with_grad=False) == (1024, 1024)
    assert sizes(151_936, DEFAULT_WORKSPACE_MB, dtype=torch.float32) == (
        1024,
        1024,
    )  # the gradient overwrites the logits
    assert sizes(151_936, 1) == (1, 4)
    for budget in (37, 300, 1200):
        logits, gradient = sizes(151_936, budget)
        assert 151_936 * (8 * logits + 2 * gradient) <= budget * 2**20


def test_chunk_of_two_sizes_is_checked() -> None:
    for chunk in ((0, 4), (8, 4), 0):
        with pytest.raises(ValueError, match="chunk .*1 <= C_l <= C_g"):
            linear_kl_div(*peaked_case().heads(), vocab_size=157, chunk=chunk)


def sorted_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the top k by definition: sorted by falling log-probability, then by rising id."""
    logprobs = logits.log_softmax(1)
    order = [sorted(range(logits.shape[1]), key=lambda v: (-row[v].item(), v))[:k] for row in logits]
    ids = torch.tensor(order)
    return ids, logprobs.gather(1, ids)


TOP_K_CASES = {
    "plain": (peaked_case(), {}),
    "tempered": (peaked_case(), {"temperature": 1.7}),
    "jsd": (peaked_case(), {"divergence": "jsd"}),
    "support": (peaked_case(), {"teacher_top_k": 3}),
    "ties": (tied_case(), {}),
    "ties-support": (tied_case(), {"teacher_top_k": 3}),
}


@pytest.mark.parametrize("name", TOP_K_CASES)
def test_top_k_of_both_sides(name: str) -> None:
    case, options = TOP_K_CASES[name]
    for k in (1, 5, case.vocab_size):
        stats = call(case, case.student_input, case.student_weight, return_top_k=k, **options).stats
        kept = case.token_weight != 0
        for side in ("student", "teacher"):
            hidden, head = getattr(case, f"{side}_input"), getattr(case, f"{side}_weight")
            ids, logprobs = sorted_top((hidden @ head.T)[:, : case.vocab_size], k)
            assert stats[f"{side}_top_ids"].dtype == torch.int64
            assert torch.equal(stats[f"{side}_top_ids"][kept], ids[kept])
            assert relative_error(stats[f"{side}_top_logprobs"][kept], logprobs[kept]) < 1e-10
            assert not stats[f"{side}_top_ids"][~kept].any() and not stats[f"{side}_top_logprobs"][~kept].any()


def test_top_k_of_a_wide_vocabulary_searches_few_tiles() -> None:
    """From 8 k tiles of 256 columns on, only the best tiles are searched: the same values."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 256 * 40 + 17, generator=g)
    z[0, 5] = z[0, 9000] = 7.0
    z[1, 256 * 40 + 3] = 9.0
    z[2] = z[2].round()  # ties everywhere
    head = z.T.contiguous()
    eye = torch.eye(3)
    for k in (1, 4):
        stats = linear_kl_div(eye, head, eye, head, vocab_size=z.shape[1], return_top_k=k, teacher_top_k=k).stats
        ids, logprobs = sorted_top(z, k)
        assert torch.equal(stats["teacher_top_ids"], ids)
        assert relative_error(stats["student_top_logprobs"], logprobs) < 1e-6


def test_return_top_k_is_checked() -> None:
    for k in (-1, 158):
        with pytest.raises(ValueError, match=f"return_top_k {k}: .*157"):
            linear_kl_div(*peaked_case().heads(), vocab_size=157, return_top_k=k)


@pytest.mark.parametrize("mode", ["forward-token-clip", "jsd-token-clip", "both-clips", "hot", "top-6-tail-clip"])
def test_divergence_is_the_value_before_the_clip(mode: str) -> None:
    case = peaked_case()
    options = MODES[mode] | {"token_clip": None, "scale_by_temperature_sq": False}
    want = dense(case, **options).token_loss
    with_clip = call(case, *leaves(case), stats=("divergence",), **MODES[mode])
    assert relative_error(with_clip.stats["divergence"], want) < 1e-10
    assert with_clip.token_loss.max() < want.max() * (1.7**2 if mode == "hot" else 1)


@pytest.mark.parametrize("factor", [None, -2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_head_gradient_is_added_to_main_grad(dtype: torch.dtype, factor: float | None) -> None:
    case = peaked_case(dtype=dtype)
    want = dense(case)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    start = torch.randn(176, 21, dtype=accumulation, generator=torch.Generator().manual_seed(0))
    main_grad = start.clone()
    hidden, head = leaves(case)
    weight = case.token_weight.to(accumulation)
    out = call(case, hidden, head, token_weight=weight, grad_weight_out=main_grad, grad_weight_factor=factor)
    assert torch.equal(main_grad, start) == (factor is None)
    (-2.5 * out.loss).backward()
    assert head.grad is None
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert relative_error(main_grad - start, -2.5 * want.weight_grad) < tolerance
    assert relative_error(hidden.grad, -2.5 * want.input_grad) < max(tolerance, torch.finfo(dtype).eps)
    assert torch.equal(main_grad[157:], start[157:])


def test_main_grad_accumulates_over_micro_batches() -> None:
    case, other = peaked_case(), peaked_case(seed=1)
    main_grad = torch.zeros(176, 21, dtype=torch.float64)
    for micro_batch in (case, other):
        hidden, head = leaves(micro_batch)
        call(micro_batch, hidden, head, grad_weight_out=main_grad).loss.backward()
    assert relative_error(main_grad, dense(case).weight_grad + dense(other).weight_grad) < 1e-10


def test_a_wrong_factor_is_caught_in_backward() -> None:
    case = peaked_case()
    main_grad = torch.zeros(176, 21, dtype=torch.float64)
    out = call(case, *leaves(case), grad_weight_out=main_grad, grad_weight_factor=0.5)
    with pytest.raises(RuntimeError, match="grad_weight_factor 0.5: is not the upstream gradient"):
        out.loss.backward()


def test_main_grad_is_checked() -> None:
    case = peaked_case()
    good = torch.zeros(176, 21, dtype=torch.float64)
    hidden, head = leaves(case)
    for options, message in (
        ({"grad_weight_out": good.float()}, "grad_weight_out torch.float32: must be torch.float64"),
        ({"grad_weight_out": good[1:]}, r"grad_weight_out \(175, 21\): must be \(176, 21\)"),
        ({"grad_weight_factor": 1.0}, "grad_weight_factor 1.0: needs grad_weight_out"),
    ):
        with pytest.raises(ValueError, match=message):
            call(case, hidden, head, **options)
    with pytest.raises(ValueError, match="grad_weight_out .*frozen"):
        call(case, hidden, head.detach(), grad_weight_out=good)
    with torch.no_grad():
        call(case, hidden, head, grad_weight_out=good, grad_weight_factor=1.0)
    assert not good.any()


@pytest.mark.parametrize("name", ["bias", "logit_scale", "logit_softcap"])
def test_what_the_operator_lacks_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 2.0: not supported: "):
        linear_kl_div(*peaked_case().heads(), vocab_size=157, **{name: 2.0})


class Student(nn.Module):
    """A model whose embedding is also its head, and whose loss is computed inside."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.head = nn.Parameter(case.student_weight.clone())
        self.mix = nn.Linear(21, 21, dtype=case.student_weight.dtype)
        nn.init.normal_(self.mix.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.mix.bias)

    def forward(self, hidden: Tensor, *, recompute: bool = False) -> Tensor:
        def tail(x: Tensor) -> Tensor:
            x = x + self.mix(x) + 0.1 * self.head[: x.shape[0]]
            return call(self.case, x, self.head).loss * 2.0

        return checkpoint(tail, hidden, use_reentrant=False) if recompute else tail(hidden)


def gradients(loss: Tensor, student: Student) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*student.parameters()]))


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_that_calls_it(backend: str, recompute: bool) -> None:
    case = peaked_case()
    student = Student(case)
    want = gradients(student(case.student_input), student)
    hidden = case.student_input
    x = hidden + student.mix(hidden) + 0.1 * student.head[: hidden.shape[0]]
    reference = dense(replace(case, student_input=x.detach()))
    assert (
        relative_error(torch.autograd.grad(student(hidden), student.mix.bias)[0], 2 * reference.input_grad.sum(0))
        < 1e-9
    )
    torch._dynamo.reset()
    compiled = torch.compile(student, backend=backend)
    got = gradients(compiled(hidden, recompute=recompute), student)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-10
