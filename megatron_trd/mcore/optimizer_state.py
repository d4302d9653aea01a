"""Optimizer state in checkpoints: written by one kind of Megatron's optimizers, read by any.

All kinds save a parameter's moments under the same keys, in the parameter's shape. They differ in where its fp32 value
is, and in everything around the tensors; so only the tensors and the number of steps are read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")


def main_value_prefix(*, distributed: bool, bf16: bool) -> str:
    """What stands before a parameter's key in the key of its fp32 value; nothing if the parameter is that."""
    if distributed:
        return "optimizer.state.param."
    return "optimizer.state.fp32_param." if bf16 else ""


def steps_taken(optimizer: MegatronOptimizer) -> int:
    """Return how often the optimizer has updated."""
    for part in _parts(optimizer):
        for state in (*part.optimizer.state.values(), *part.optimizer.param_groups):
            if "step" in state:
                return int(state["step"])
    return 0


def read_from(state: dict[str, Any], ours: str, saved: str) -> dict[str, Any]:
    """Let a sharded state that is to be loaded look for fp32 values where the checkpoint has them.

    Args:
        ours, saved: `main_value_prefix` of this run and of the checkpoint.
    """

    def is_main_value(leaf: Any) -> bool:
        return isinstance(leaf, (ShardedTensor, ShardedTensorFactory)) and leaf.key.startswith(ours)

    def renamed(leaf: Any) -> Any:
        return replace(leaf, key=saved + leaf.key.removeprefix(ours)) if is_main_value(leaf) else leaf

    if not ours or ours == saved:
        return state
    # Without a prefix they are the parameters, which are loaded with the model.
    return dict_list_map_inplace(renamed, state) if saved else extract_matching_values(state, is_main_value)[1]


def restore(optimizer: MegatronOptimizer, tensors: dict[Any, Any], steps: int) -> None:
    """Put loaded tensors and the number of steps into an optimizer; its settings stay those of this run."""
    parts = _parts(optimizer)
    for index, part in enumerate(parts):
        loaded = tensors.get(index, {}) if len(parts) > 1 else tensors  # a stage without experts has none of theirs
        state = part.state_dict()
        inner = state.get("optimizer", state)
        torch_adam = isinstance(part.optimizer, torch.optim.Adam)
        if distributed := isinstance(part, DistributedOptimizer):  # it keeps tensors apart
            param_state = loaded.get("param_state", {})
            parameters = (parameter for buffer in part.buffers for parameter in buffer.param_index_map)
            for values, parameter in zip(param_state.values(), parameters, strict=True):
                values.setdefault("param", parameter.detach())
            state |= {"param_state": param_state, "param_state_sharding_type": "fully_reshardable"}
        else:
            moments = loaded.get("optimizer", loaded).get("state", {})
            for number, values in inner["state"].items():
                values.update({name: moments[number][name] for name in _MOMENTS})
                if torch_adam:
                    values["step"] = torch.tensor(float(steps))
            if "fp32_from_fp16_params" in loaded:
                state["fp32_from_fp16_params"] = loaded["fp32_from_fp16_params"]
        if distributed or not torch_adam:
            for group in inner["param_groups"]:
                group["step"] = float(steps) if torch_adam else steps
        part.load_state_dict(state)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
