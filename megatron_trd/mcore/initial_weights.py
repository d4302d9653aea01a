"""The weights that a model starts from: a Hugging Face directory, or a distributed checkpoint of any grid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_trd.mcore import hf_weights
from megatron_trd.mcore.conversion.fit import require_none_more
from megatron_trd.mcore.conversion.storage import CheckpointReader, find_checkpoint
from megatron_trd.mcore.gpt import GPTChunks
from megatron_trd.mcore.groups import Groups

_State = dict[str, ShardedTensor | ShardedTensorFactory]


def load_initial_weights(model: GPTChunks, groups: Groups, megatron_checkpoint: str | None, flag: str) -> None:
    """Fill this rank's part of every base parameter. Adapters stay as they are. Collective over all ranks.

    Args:
        megatron_checkpoint: read in place of the weights of the model's own Hugging Face directory, if given.
        flag: the one that gives it, for error messages.

    Raises:
        ValueError: a tensor is missing, too many, or has another shape than the model's config.json says.
    """
    if megatron_checkpoint is None:
        hf_weights.load(model, groups)
        return
    reader = CheckpointReader(weights_directory(model, megatron_checkpoint, flag))
    metadata = {"dp_cp_group": groups.dp_cp}
    states = [_base_parameters(chunk.sharded_state_dict(metadata=metadata)) for chunk in model.chunks]
    _require_fit(reader, states, model, groups)
    loaded = dist_checkpointing.load({f"chunk {i}": state for i, state in enumerate(states)}, str(reader.directory))
    for i, chunk in enumerate(model.chunks):
        result = chunk.load_state_dict(loaded[f"chunk {i}"], strict=False)
        left = [name for name in result.missing_keys if "lora_" not in name and "_extra_state" not in name]
        assert not left and not result.unexpected_keys, result


def weights_directory(model: GPTChunks, megatron_checkpoint: str | None, flag: str) -> Path:
    """Return the directory that `load_initial_weights` reads."""
    return model.hf.path if megatron_checkpoint is None else find_checkpoint(Path(megatron_checkpoint), flag)


def _base_parameters(state: dict[str, Any]) -> _State:
    """Leave out adapters, and what Transformer Engine keeps besides: a checkpoint need not have it."""
    return {
        name: entry
        for name, entry in state.items()
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)) and "lora_" not in entry.key
    }


def _require_fit(reader: CheckpointReader, states: list[_State], model: GPTChunks, groups: Groups) -> None:
    wanted = list(_tensors(states))
    for tensor in wanted:
        if tensor.key not in reader.tensors:
            raise ValueError(f"{reader.directory}: tensor {tensor.key} is missing, which {model.hf.path} describes")
        found, expected = tuple(reader.tensors[tensor.key].size), tuple(tensor.global_shape)
        if tensor.allow_shape_mismatch:  # a vocabulary, padded in any way
            expected = (found[0] if found[0] >= model.hf.geometry.vocab_size else expected[0], *expected[1:])
        if found != expected:
            raise ValueError(f"{reader.directory}: tensor {tensor.key} is {found}; by {model.hf.path} it is {expected}")
    of_stages: list[set[str]] = [set()] * groups.pp_size
    dist.all_gather_object(of_stages, {tensor.key for tensor in wanted}, group=groups.pp)
    require_none_more(reader, set().union(*of_stages), model.hf.path)


def _tensors(states: list[_State]) -> Iterator[ShardedTensor]:
    for state in states:
        for entry in state.values():
            yield from [entry] if isinstance(entry, ShardedTensor) else entry.build()
