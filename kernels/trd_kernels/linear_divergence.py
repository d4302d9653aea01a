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

from trd_kernels.backends import choose_backend
from trd_kernels.checks import check_heads, check_tokens, check_weight_out, refuse_head_options, require
from trd_kernels.chunk_pass import ChunkPass
from trd_kernels.divergence import Divergence
from trd_kernels.gradients import Gradients
from trd_kernels.heads import Heads, HeadTensors
from trd_kernels.output import LinearKLDivOutput
from trd_kernels.statistics_request import StatisticsRequest
from trd_kernels.token_chunks import TokenChunk
from trd_kernels.vocab_parallel import VocabShard
from trd_kernels.workspace import DEFAULT_WORKSPACE_MB, ChunkSizes


@torch.compiler.disable  # the loop is eager by design: a graph of it would be unrolled and rounded differently
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
    return_top_k: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    grad_reduce_dtype: torch.dtype = torch.float32,
    overlap_grad_reduce: bool = False,
    grad_weight_out: Tensor | None = None,
    grad_weight_factor: float | None = None,
    workspace_mb: float | None = None,
    chunk: int | tuple[int, int] | None = None,
    backend: str = "auto",
    bias: None = None,
    logit_scale: None = None,
    logit_softcap: None = None,
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
            `teacher_mass`: all at temperature 1 over the full vocabulary, whatever the divergence does; and
            `divergence`, the token's value before `token_clip`, for its quantiles.
        return_top_k: Add each side's K likeliest ids with their log-probabilities to the statistics.
        grad_reduce_dtype: Dtype of the sum of hidden-state gradients over ranks (float64 inputs: always float64).
        overlap_grad_reduce: Let that sum run while the next chunk is worked on; costs one more `[C_g, Hs]`.
        grad_weight_out: `[V_l, Hs]` fp32 (float64 for float64 inputs), such as Megatron's `main_grad`: the gradient of
            `student_weight` is added to it unrounded, and `student_weight` itself receives none.
        grad_weight_factor: The upstream gradient of `loss`, if it is known now. Chunks then add to `grad_weight_out`
            at once, in this forward pass, and no second `[V_l, Hs]` is held; backward asserts the factor.
        workspace_mb: Bound in MiB on everything that scales with the vocabulary, except the gradient of the head.
            None = 1200 divided by the ranks of `tp_group`.
        chunk: Tokens whose logits are held at a time, instead of `workspace_mb`; (C_l, C_g) to hold their rounded
            gradient for C_g tokens before it is multiplied out.
        backend: `torch`, `triton` (row kernels on the GPU; not for float64), or `auto`: triton where it can run on a
            GPU, else torch; logged once.
        bias, logit_scale, logit_softcap: Not supported: anything but None is refused.

    Returns:
        Loss (differentiable once), token losses and statistics, identical on all ranks: fp64 for fp64 inputs, or fp32.

    Raises:
        ValueError: an argument that is malformed, a combination that is undefined, an option that is not supported.
    """
    refuse_head_options(bias=bias, logit_scale=logit_scale, logit_softcap=logit_softcap)
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
    differentiable = student_input, student_weight
    tensors = _as_autocast_would((student_input, student_weight, teacher_input, teacher_weight))
    student_input, student_weight, teacher_input, teacher_weight = tensors
    check_heads(*tensors)
    check_weight_out(grad_weight_out, grad_weight_factor, differentiable[1], student_input.dtype)
    device = student_input.device
    shard = VocabShard.of(num_rows=student_weight.shape[0], vocab_size=vocab_size, group=tp_group)
    require(teacher_top_k <= vocab_size, "teacher_top_k", teacher_top_k, f"the vocabulary has only {vocab_size} ids")
    shards = shard.world_size if sequence_parallel else 1
    num_tokens = student_input.shape[0] * shards
    check_tokens(token_weight, labels, num_tokens, device)
    request = StatisticsRequest.of(
        stats,
        labels=labels,
        token_set=token_set,
        top_k=return_top_k,
        vocab_size=vocab_size,
        shard=shard,
        device=device,
    )
    row_kernels = choose_backend(backend, device=device, dtype=student_input.dtype)
    want_input_grad, want_weight_grad = (torch.is_grad_enabled() and x.requires_grad for x in differentiable)
    kept = TokenChunk.kept(
        token_weight,
        num_tokens=num_tokens,
        shards=shards,
        shard=shard.rank if sequence_parallel else 0,
        device=device,
    )
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        heads = Heads.of(tensors, valid=shard.num_valid)
        if chunk is not None:
            sizes = ChunkSizes.given(chunk)
        else:
            sizes = ChunkSizes.within(
                DEFAULT_WORKSPACE_MB / shard.world_size if workspace_mb is None else workspace_mb,
                heads=heads,
                rows=row_kernels,
                columns=student_weight.shape[0],
                with_grad=want_input_grad or want_weight_grad,
            )
        weight_grad = None
        if want_weight_grad:
            direct = grad_weight_out is not None and grad_weight_factor is not None
            weight_grad = grad_weight_out if direct else _zeros(student_weight, heads.compute_dtype)
        gradients = Gradients(
            heads=heads,
            shard=shard,
            sequence_parallel=sequence_parallel,
            reduce_dtype=grad_reduce_dtype,
            overlap=overlap_grad_reduce,
            input_grad=_zeros(student_input, heads.compute_dtype) if want_input_grad else None,
            weight_grad=weight_grad,
            weight_factor=1.0 if grad_weight_factor is None else grad_weight_factor,
        )
        weight = student_input.new_zeros(num_tokens + 1, dtype=heads.compute_dtype)
        weight[:-1] = 1.0 if token_weight is None else token_weight
        out = ChunkPass(
            spec=spec,
            heads=heads,
            rows=row_kernels,
            shard=shard,
            request=request,
            kept=kept,
            sizes=ChunkSizes(*(kept.rows_of_split(size) for size in sizes)),
            gradients=gradients,
            weight=weight,
            sequence_parallel=sequence_parallel,
        ).run()
    if gradients.wanted:
        loss = _AttachGradients.apply(
            *differentiable, out.loss, gradients.input_grad, weight_grad, grad_weight_out, grad_weight_factor
        )
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
        weight_out: Tensor | None,
        weight_factor: float | None,
    ) -> Tensor:
        added = weight_out is not None and weight_factor is not None
        ctx.save_for_backward(input_grad, None if added else weight_grad)
        ctx.dtypes = student_input.dtype, student_weight.dtype
        # No saved tensor: it is written to between this forward pass and its backward pass.
        ctx.weight_out, ctx.weight_factor = weight_out, weight_factor
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The product stays on the device, in the precision of the accumulation, and is rounded once.
        input_grad, weight_grad = ctx.saved_tensors
        nothing = (None,) * 5
        if input_grad is not None:
            input_grad = (input_grad * grad).to(ctx.dtypes[0])
        if ctx.weight_out is None:
            return input_grad, None if weight_grad is None else (weight_grad * grad).to(ctx.dtypes[1]), *nothing
        if weight_grad is not None:
            ctx.weight_out.addcmul_(weight_grad, grad)
        elif ctx.weight_factor is not None:
            # Without a wait for the device: on a GPU a wrong factor surfaces at the next synchronisation.
            same = torch.isclose(grad, torch.full_like(grad, ctx.weight_factor), rtol=1e-5)
            torch._assert_async(same, f"grad_weight_factor {ctx.weight_factor}: is not the upstream gradient of loss")
        return input_grad, None, *nothing


def _as_autocast_would(tensors: HeadTensors) -> HeadTensors:
    """Cast what a matrix product would under an active autocast: everything but float64."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    a, b, c, d = (x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    return a, b, c, d


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape, dtype=dtype, device=like.device)
