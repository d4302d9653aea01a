"""Mixtures of experts: what Megatron is told of them, and which rank holds which expert under which name."""

from __future__ import annotations

import re
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_trd.config.schema import ParallelConfig
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.router import BalancedRouter

_EXPERT = re.compile(r"experts\.local_experts\.\d+\.(linear_fc\d)\.weight$")


def require_expert_grid(parallel: ParallelConfig, models: dict[str, HFModel], aux_loss_coeff: float = 0.0) -> None:
    """Refuse a grid that the models' experts cannot be laid out on, and a loss that balances none.

    Args:
        models: student and teacher, by the flag that names their directory.

    Raises:
        ValueError: experts or their width cannot be divided, there are none, or sequence parallelism is missing.
    """
    student = models["hf-checkpoint"]
    if aux_loss_coeff and student.moe is None:
        raise ValueError(
            f"--moe-aux-loss-coeff {aux_loss_coeff}: {student.path} has no experts to balance; leave it out"
        )
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    etp = parallel.expert_tensor_parallel_size or tp
    with_experts = {flag: model for flag, model in models.items() if model.moe is not None}
    for flag, size in (
        ("expert-model-parallel-size", ep),
        ("expert-tensor-parallel-size", parallel.expert_tensor_parallel_size or 1),
    ):
        if size > 1 and not with_experts:
            paths = ", ".join(str(model.path) for model in models.values())
            raise ValueError(f"--{flag} {size}: no model has experts ({paths}); use 1")
    for flag, model in with_experts.items():
        assert model.moe is not None
        if model.moe.num_experts % ep:
            raise ValueError(
                f"--expert-model-parallel-size {ep}: must divide the {model.moe.num_experts} experts of {model.path}"
            )
        if model.moe.expert_ffn_hidden_size % etp:
            raise ValueError(
                f"--expert-tensor-parallel-size {etp}: must divide the width {model.moe.expert_ffn_hidden_size} of "
                f"an expert of {model.path}; 1 keeps experts whole"
            )
        if tp > 1 and not parallel.sequence_parallel:
            raise ValueError(
                f"--{flag} {model.path}: experts under --tensor-model-parallel-size {tp} would see each token {tp} "
                "times; add --sequence-parallel"
            )


def expert_config(hf: HFModel, groups: Groups, *, aux_loss_coeff: float, grouped: bool) -> dict[str, Any]:
    """Return the fields of Megatron's `TransformerConfig` that speak of experts; none for a dense model.

    Every token reaches its experts, however many choose the same one: there is no capacity to exceed.
    """
    if hf.moe is None:
        return {}
    return {
        "num_moe_experts": hf.moe.num_experts,
        "moe_router_topk": hf.moe.top_k,
        "moe_ffn_hidden_size": hf.moe.expert_ffn_hidden_size,
        "moe_layer_freq": 1 if all(hf.moe.sparse_layers) else [int(sparse) for sparse in hf.moe.sparse_layers],
        # A softmax over the chosen logits is one over all of them, scaled to sum to one.
        "moe_router_pre_softmax": not hf.moe.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss" if aux_loss_coeff else "none",
        "moe_aux_loss_coeff": aux_loss_coeff,
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": groups.ep_size,
        "expert_tensor_parallel_size": groups.etp_size,
    }


def local_experts() -> ModuleSpec:
    """Experts that run one after the other."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(SequentialMLP, submodules=linears)


def grouped_experts() -> ModuleSpec:
    """Experts that run in Transformer Engine's grouped matrix products."""
    from megatron.core.extensions import transformer_engine as te

    linears = MLPSubmodules(linear_fc1=te.TEColumnParallelGroupedLinear, linear_fc2=te.TERowParallelGroupedLinear)
    return ModuleSpec(TEGroupedMLP, submodules=linears)


def moe_layer(experts: ModuleSpec) -> ModuleSpec:
    """Describe a layer's router and experts to Megatron."""
    return ModuleSpec(MoELayer, submodules=MoESubmodules(experts=experts, router=BalancedRouter))


def sum_gradients_over_copies(model: nn.Module) -> None:
    """Have Megatron sum every expert's gradient over the ranks that hold a copy of it.

    Without expert parallelism it takes the data-parallel ranks for those, but with whole experts on tensor-parallel
    ranks (`--expert-tensor-parallel-size 1`) each of these has a copy too, and sees other tokens.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def name_on_rank(name: str, index: int, *, grouped: bool) -> str:
    """Return the name that an expert's parameter has on its rank.

    Args:
        name: the one it has in the whole model.
        index: of the expert among those of the rank.
    """
    place = rf"experts.\1.weight{index}" if grouped else rf"experts.local_experts.{index}.\1.weight"
    return _EXPERT.sub(place, name)
