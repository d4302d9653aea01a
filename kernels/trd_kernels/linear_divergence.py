"""Full-vocabulary divergence between two linear heads, a bounded chunk of logits at a time.

Each chunk of tokens is carried from hidden states through both heads, the divergence and its gradient back to
hidden states before the next one starts; the backward pass only multiplies by the upstream gradient. No tensor of
`[N, V]` or `[N, V / tp]` exists. `kernels/README.md` has the formulas and the contract under tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trd_kernels.checks import require
from trd_kernels.chunk_pass import ChunkPass, Heads
from trd_kernels.divergence import Divergence
from trd_kernels.output import LinearKLDivOutput
from trd_kernels.statistics_request import StatisticsRequest
from trd_kernels.token_chunks import TokenChunks
from trd_kernels.vocab_parallel import VocabShard

BACKENDS = ("auto", "torch")
DEFAULT_WORKSPACE_MB = 1024


def linear_kl_div(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    vocab_size: int,
    token_weight: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_sq: bool = False,
    teacher_top_k: int = 0,
    top_k_mode: str = "renorm_both",
    token_clip: float | None = None,
    entry_clip: float | None = None,
    labels: Tensor | None = None,
    token_set: Tensor | None = None,
    stats: Sequence[str] = (),
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    grad_reduce_dtype: torch.dtype = torch.float32,
    workspace_mb: float = DEFAULT_WORKSPACE_MB,
    chunk: int | None = None,
    backend: str = "auto",
) -> LinearKLDivOutput:
    """Distil the head `teacher_input @ teacher_weight.T` into `student_input @ student_weight.T`.

    Collective over `tp_group`: all of its ranks call it with equal options, and with equal `token_weight`, `labels`
    and upstream gradients. Letters: N tokens, `V_l` weight rows per rank; the vocabulary is cut in rank order.

    Args:
        student_input: `[N, Hs]`, replicated on the ranks; with `sequence_parallel` `[N / tp, Hs]`, of which rank r
            holds tokens `[r N / tp, (r + 1) N / tp)`. All four are float64, float32 or bfloat16, the same in each.
        student_weight: `[V_l, Hs]`, rows `[r V_l, (r + 1) V_l)`. Its gradient is computed only if it requires one.
        teacher_input: `[N, Ht]` or `[N / tp, Ht]`; a constant.
        teacher_weight: `[V_l, Ht]`, the same vocabulary rows as `student_weight`; a constant.
        vocab_size: Columns from here on are padding and take no part.
        token_weight: `[N]` constant (None = ones). A token of weight 0 costs no work; its outputs are 0.
        divergence: `forward_kl` KL(p||q), `reverse_kl` KL(q||p), `jsd` beta KL(p||m) + (1 - beta) KL(q||m) with
            m = beta p + (1 - beta) q, or `mixed` beta KL(p||q) + (1 - beta) KL(q||p); p teacher, q student.
        temperature: Divides the logits of both sides.
        scale_by_temperature_sq: Multiply the (clipped) divergence by temperature squared.
        teacher_top_k: Restrict forward or reverse KL to the teacher's K likeliest ids (lowest ids among ties).
        top_k_mode: `renorm_both`, `renorm_teacher` (forward KL only) or `tail_bucket` (the rest is one outcome).
        token_clip: Cap each token's divergence; a capped token has no gradient.
        entry_clip: Cap each p log(p / q) before the sum; a capped entry has no gradient. Forward KL only.
        labels: `[N]` int64 ids for the log-probabilities in `stats` (NaN where a label is no vocabulary id).
        token_set: int64 ids for `teacher_mass`.
        stats: Any of `student_logprob`, `teacher_logprob`, `student_entropy`, `teacher_entropy`, `argmax_match`,
            `teacher_mass`: all at temperature 1 over the full vocabulary, whatever the divergence does.
        grad_reduce_dtype: Dtype of the sum of hidden-state gradients over ranks (float64 inputs: always float64).
        workspace_mb: Bound in MiB on everything that scales with the vocabulary, except the gradient of the head.
        chunk: Tokens per chunk instead of `workspace_mb`.
        backend: `torch`, or `auto`, which takes the fastest that is available.

    Returns:
        Loss (differentiable once), token losses and statistics, identical on all ranks: fp64 for fp64 inputs, or fp32.

    Raises:
        ValueError: an argument that is malformed or a combination that is undefined.
    """
    spec = Divergence(
        name=divergence,
        beta=beta,
        temperature=temperature,
        scale_by_temperature_sq=scale_by_temperature_sq,
        top_k=teacher_top_k,
        top_k_mode=top_k_mode,
        token_clip=token_clip,
        entry_clip=entry_clip,
    )
    require(backend in BACKENDS, "backend", backend, _backend_reason(backend))
    require(
        not sequence_parallel or tp_group is not None,
        "sequence_parallel",
        True,
        "needs tp_group, the ranks it shards over",
    )
    require(
        grad_reduce_dtype in (torch.float32, torch.bfloat16),
        "grad_reduce_dtype",
        grad_reduce_dtype,
        "must be float32 or bfloat16",
    )
    _check_heads(student_input, student_weight, teacher_input, teacher_weight)
    shard = VocabShard.of(num_rows=student_weight.shape[0], vocab_size=vocab_size, group=tp_group)
    require(teacher_top_k <= vocab_size, "teacher_top_k", teacher_top_k, f"the vocabulary has only {vocab_size} ids")
    shards = shard.world_size if sequence_parallel else 1
    num_tokens = student_input.shape[0] * shards
    _check_tokens(token_weight, labels, num_tokens, student_input.device)
    request = StatisticsRequest.of(
        stats, labels=labels, token_set=token_set, vocab_size=vocab_size, shard=shard, device=student_input.device
    )
    require(chunk is None or chunk >= 1, "chunk", chunk, "give a positive number of tokens")
    require(workspace_mb > 0, "workspace_mb", workspace_mb, "give a positive number of MiB")

    want_input_grad = torch.is_grad_enabled() and student_input.requires_grad
    want_weight_grad = torch.is_grad_enabled() and student_weight.requires_grad
    with torch.no_grad(), torch.autocast(student_input.device.type, enabled=False):
        heads = Heads.of(student_input, student_weight, teacher_input, teacher_weight, shard.num_valid)
        chunks = TokenChunks.plan(
            token_weight,
            num_tokens=num_tokens,
            shards=shards,
            shard=shard.rank if sequence_parallel else 0,
            chunk=chunk or heads.rows_in(workspace_mb * 2**20, student_weight.shape[0]),
            device=student_input.device,
        )
        work = ChunkPass(
            spec=spec,
            heads=heads,
            shard=shard,
            request=request,
            chunks=chunks,
            token_weight=token_weight,
            num_tokens=num_tokens,
            sequence_parallel=sequence_parallel,
            grad_reduce_dtype=grad_reduce_dtype,
            want_input_grad=want_input_grad,
            want_weight_grad=want_weight_grad,
        )
        out = work.run()
    if want_input_grad or want_weight_grad:
        loss = _AttachGradients.apply(student_input, student_weight, out.loss, work.input_grad, work.weight_grad)
        out = out._replace(loss=loss)
    return out


class LinearKLDivLoss(nn.Module):
    """`linear_kl_div` with its options bound; what changes from batch to batch is passed to the call."""

    def __init__(self, *, vocab_size: int, **options: Any) -> None:
        super().__init__()
        self.options = {"vocab_size": vocab_size, **options}

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        *,
        token_weight: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> LinearKLDivOutput:
        """Return the loss of one batch; shapes as in `linear_kl_div`."""
        return linear_kl_div(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            token_weight=token_weight,
            labels=labels,
            **self.options,
        )

    def extra_repr(self) -> str:
        """Show the bound options."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class _AttachGradients(torch.autograd.Function):
    """Carries gradients that are already known to the inputs that they belong to."""

    @staticmethod
    def forward(
        ctx: Any,
        student_input: Tensor,
        student_weight: Tensor,
        loss: Tensor,
        input_grad: Tensor | None,
        weight_grad: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(input_grad, weight_grad)
        ctx.dtype = student_input.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The product stays on the device, in the precision of the accumulation, and is rounded once.
        scaled = (None if saved is None else (saved * grad).to(ctx.dtype) for saved in ctx.saved_tensors)
        return (*scaled, None, None, None)


def _check_heads(student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor) -> None:
    tensors = {
        "student_input": student_input,
        "student_weight": student_weight,
        "teacher_input": teacher_input,
        "teacher_weight": teacher_weight,
    }
    for name, x in tensors.items():
        require(x.ndim == 2, name, tuple(x.shape), "must have two dimensions")
        require(
            x.dtype in (torch.float64, torch.float32, torch.bfloat16),
            name,
            x.dtype,
            "must be float64, float32 or bfloat16 (float16 has too little range for unscaled gradients)",
        )
        require(
            x.dtype == student_input.dtype, name, x.dtype, f"must be the dtype of student_input, {student_input.dtype}"
        )
        require(
            x.device == student_input.device, name, x.device, f"must be on {student_input.device}, as student_input"
        )
    for side, x, weight in (("student", student_input, student_weight), ("teacher", teacher_input, teacher_weight)):
        require(
            weight.shape[1] == x.shape[1],
            f"{side}_weight",
            tuple(weight.shape),
            f"must have the {x.shape[1]} columns of {side}_input",
        )
    require(
        teacher_input.shape[0] == student_input.shape[0],
        "teacher_input",
        tuple(teacher_input.shape),
        f"must have the {student_input.shape[0]} rows of student_input",
    )
    require(
        teacher_weight.shape[0] == student_weight.shape[0],
        "teacher_weight",
        tuple(teacher_weight.shape),
        f"must hold the {student_weight.shape[0]} vocabulary rows of student_weight: load it in the student's ranges",
    )
    for name in ("teacher_input", "teacher_weight"):
        needs_grad = torch.is_grad_enabled() and tensors[name].requires_grad
        require(not needs_grad, name, "that requires grad", "the teacher is a constant; pass it through .detach()")


def _check_tokens(token_weight: Tensor | None, labels: Tensor | None, num_tokens: int, device: torch.device) -> None:
    for name, x in (("token_weight", token_weight), ("labels", labels)):
        if x is None:
            continue
        require(
            x.shape == (num_tokens,),
            name,
            tuple(x.shape),
            f"must be ({num_tokens},), one entry per token of all sequence shards",
        )
        require(x.device == device, name, x.device, f"must be on {device}, as student_input")
    if token_weight is not None:
        require(token_weight.is_floating_point(), "token_weight", token_weight.dtype, "must be floating point")
        needs_grad = torch.is_grad_enabled() and token_weight.requires_grad
        require(not needs_grad, "token_weight", "that requires grad", "it is a constant; pass it through .detach()")
    if labels is not None:
        require(labels.dtype == torch.int64, "labels", labels.dtype, "must be int64")


def _backend_reason(backend: str) -> str:
    known = f"choose one of {', '.join(BACKENDS)}"
    return f"these row kernels are not available yet; {known}" if backend == "triton" else known
