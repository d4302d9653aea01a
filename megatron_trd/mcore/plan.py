"""What a run will hold in memory, from its configuration alone: no GPU, no weights."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.config.schema import Config
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.layouts import ADAPTED
from megatron_trd.mcore.stages import cut_into_stages
from trd_kernels import DEFAULT_WORKSPACE_MB


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank that do not depend on the batch, by purpose."""

    bytes_of: dict[str, int]
    trainable_parameters: int
    """Over the whole model, not one rank."""

    def table(self) -> str:
        """Render in MiB."""
        rows = [*self.bytes_of.items(), ("total before activations", sum(self.bytes_of.values()))]
        return "\n".join(f"  {name:<32} {size / 2**20:12,.1f} MiB" for name, size in rows)


def memory_plan(config: Config, student: HFModel, teacher: HFModel, world_size: int) -> MemoryPlan:
    """Estimate the fixed memory of one rank of the last pipeline stage, which holds most.

    Weights, gradients (fp32), AdamW's two moments and, in bf16, the fp32 main weights; the teacher where it needs a
    copy of its own; the workspace of the loss (an upper bound). Activations are not in it.

    Raises:
        ValueError: the layers cannot be cut into the stages.
    """
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cut_into_stages(student, pp, parallel.num_virtual_stages_per_pipeline_rank)
    cut_into_stages(teacher, pp)
    weight = 2 if config.model.bf16 else 4
    base = num_parameters_of_last_stage(student, pp)
    rank = config.lora.lora_rank
    trainable = num_adapter_parameters(student, rank) // pp if rank else base
    own_teacher = config.method.mode == "opd" or (config.method.opsd_teacher == "initial" and rank == 0)
    optimizer = 8 + (4 if config.model.bf16 else 0)
    optimizer_shards = max(1, world_size // (tp * pp)) if parallel.use_distributed_optimizer else 1
    return MemoryPlan(
        bytes_of={
            "student weights": (base + (trainable if rank else 0)) * weight // tp,
            "gradients (fp32)": trainable * 4 // tp,
            "optimizer": trainable * optimizer // tp // optimizer_shards,
            "teacher weights": num_parameters_of_last_stage(teacher, pp) * weight // tp if own_teacher else 0,
            "workspace of the loss (at most)": (config.objective.kl_workspace_mb or DEFAULT_WORKSPACE_MB // tp) * 2**20,
        },
        trainable_parameters=num_adapter_parameters(student, rank) if rank else num_parameters(student),
    )


def num_parameters(model: HFModel) -> int:
    """Count a model's parameters, vocabulary padding included."""
    vocabulary = model.geometry.padded_vocab_size * model.hidden_size
    layers = model.geometry.num_layers * _num_layer_parameters(model)
    return layers + vocabulary * (1 if model.tied else 2) + model.hidden_size


def num_parameters_of_last_stage(model: HFModel, pp_size: int) -> int:
    """Count the parameters of the stage with the head, or with its copy of the embedding."""
    if pp_size == 1:
        return num_parameters(model)
    layers = model.geometry.num_layers // pp_size * _num_layer_parameters(model)
    return layers + model.geometry.padded_vocab_size * model.hidden_size + model.hidden_size


def _num_layer_parameters(model: HFModel) -> int:
    sizes = _linear_sizes(model)
    number = sum(out * inside for out, inside in sizes.values()) + 2 * model.hidden_size
    if model.family.qkv_bias:
        number += sizes["self_attention.linear_qkv"][0]
    if model.family.qk_norm:
        number += 2 * model.geometry.head_dim
    return number


def num_adapter_parameters(model: HFModel, rank: int) -> int:
    """Count the parameters of a LoRA on all seven projections (fused linears share one A)."""
    return model.geometry.num_layers * sum(rank * (out + inside) for out, inside in _linear_sizes(model).values())


def _linear_sizes(model: HFModel) -> dict[str, tuple[int, int]]:
    """Fused linear -> (outputs, inputs)."""
    geometry = model.geometry
    heads = geometry.num_query_groups * geometry.heads_per_group * geometry.head_dim
    kv = geometry.num_query_groups * geometry.head_dim
    sizes = (
        (heads + 2 * kv, model.hidden_size),
        (model.hidden_size, heads),
        (2 * model.ffn_hidden_size, model.hidden_size),
        (model.hidden_size, model.ffn_hidden_size),
    )
    return dict(zip(ADAPTED, sizes, strict=True))
