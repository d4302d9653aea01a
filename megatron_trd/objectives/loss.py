"""From the configured objective to one call of the KL operator."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_trd.config.schema import ObjectiveConfig
from trd_kernels import STATISTICS, LinearKLDivOutput, linear_kl_div


def distillation_loss(
    config: ObjectiveConfig,
    *,
    student_rows: Tensor,
    student_weight: Tensor,
    teacher_rows: Tensor,
    teacher_weight: Tensor,
    vocab_size: int,
    token_weight_R: Tensor,
    response_ids_R: Tensor,
    epistemic_ids: Tensor,
    tp_group: dist.ProcessGroup,
    sequence_parallel: bool,
    student_weight_grad: Tensor | None = None,
) -> LinearKLDivOutput:
    """Return sum_r weight_r D(p_r, q_r) over the response tokens, its tokens' values and their statistics.

    Args:
        student_rows, teacher_rows: [R, hidden], or this rank's [R / tp, hidden] under sequence parallelism.
        student_weight, teacher_weight: this rank's rows of each output layer, the same vocabulary range.
        token_weight_R, response_ids_R: [R], identical on all tensor-parallel ranks.
        epistemic_ids: token ids whose teacher probability is summed.
        student_weight_grad: fp32, shaped as `student_weight`: its gradient is added here, already in this forward pass,
            and the backward pass gives it none. The loss must then be the root of that pass.
    """
    return linear_kl_div(
        student_rows,
        student_weight,
        teacher_rows,
        teacher_weight,
        vocab_size=vocab_size,
        token_weight=token_weight_R,
        divergence=config.divergence.replace("-", "_"),
        beta=config.beta,
        temperature=config.distill_temperature,
        teacher_top_k=config.teacher_top_k,
        top_k_mode=config.top_k_mode,
        token_clip=config.token_clip,
        entry_clip=config.entry_clip,
        labels=response_ids_R,
        token_set=epistemic_ids,
        stats=STATISTICS,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        grad_weight_out=student_weight_grad,
        grad_weight_factor=None if student_weight_grad is None else 1.0,
        workspace_mb=config.kl_workspace_mb,
        backend=config.kl_backend,
    )
