"""Floating-point operations of a step, sequence by sequence, by the planner's formulas."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_trd.config.schema import Config
from megatron_trd.data.packing import stream_lengths
from megatron_trd.planning import flops
from megatron_trd.planning.memory import Models
from megatron_trd.planning.model_shape import feed_forward_linears
from megatron_trd.records import Sample


def step_flops(config: Config, models: Models, samples: Sequence[Sample]) -> tuple[float, float]:
    """Return what a step asks for, over all ranks: of the model, and with what is computed again (`--recompute-*`).

    Padding is not counted. Attention's backward pass counts as 2.5 forward passes, as flash attention takes.
    """
    model = again = 0.0
    for sample in samples:
        student, teacher = map(float, stream_lengths(sample))
        for layer in range(models.student.num_layers):
            model += flops.layer_training(
                models.student, layer, tokens=student, mean_length=student, lora_rank=models.precision.lora_rank
            ).total
            again += _computed_again(config, models, layer, student)
        for layer in range(models.teacher.num_layers):
            model += flops.layer_forward(models.teacher, layer, tokens=teacher, mean_length=teacher).total
        model += flops.loss_heads(
            models.student,
            models.teacher,
            response_tokens=len(sample.response_ids),
            head_learns=not models.precision.lora_rank,
        )
    return model, model + again


def _computed_again(config: Config, models: Models, layer: int, length: float) -> float:
    """Forward FLOPs of the parts of a layer that the backward pass computes again, over one sequence."""
    shape, wanted, parallel = models.student, config.model, config.parallel
    forward = flops.layer_forward(shape, layer, tokens=length, mean_length=length)
    if wanted.recompute_granularity == "full":
        chunks = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
        if wanted.recompute_method == "block" and layer % (shape.num_layers // chunks) >= wanted.recompute_num_layers:
            return 0.0
        rank = models.precision.lora_rank
        return forward.total + 2 * length * (flops.adapter_products(shape, layer, rank) if rank else 0)
    total = 0.0
    if wanted.recompute_granularity == "selective":
        if "core_attn" in wanted.recompute_modules:
            total += forward.attention
        sparse = shape.is_sparse(layer)
        if ("moe" if sparse else "mlp") in wanted.recompute_modules:
            experts = shape.experts if sparse else None
            width = experts.top_k * experts.ffn_hidden_size if experts else shape.ffn_hidden_size
            total += 2 * length * sum(out * inside for out, inside in feed_forward_linears(shape, width))
    return total
