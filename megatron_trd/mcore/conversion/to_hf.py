"""From a distributed checkpoint, of Megatron-LM or of a run, to a Hugging Face directory or a PEFT adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_trd.config.schema import LoraConfig
from megatron_trd.mcore.conversion.fit import hf_tensors, require_checkpoint_fits, require_directory_fits
from megatron_trd.mcore.conversion.outputs import complete_directory, require_new
from megatron_trd.mcore.conversion.sharing import Conversion, cut, share
from megatron_trd.mcore.conversion.slots import Slot, slots_of
from megatron_trd.mcore.conversion.storage import CheckpointReader, find_checkpoint
from megatron_trd.mcore.fingerprint import fingerprint
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel, read_hf_model
from megatron_trd.mcore.hf_weights import SafetensorsDirectory, peft_tensors, write_adapter
from megatron_trd.mcore.layouts import EMBEDDING, Row, merge, rows, shard
from megatron_trd.mcore.lora import merged
from megatron_trd.weight_sync.disk import copy_template, save_readable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """A checkpoint with all weights, and the model that they are of."""

    hf: HFModel
    table: Sequence[Row]
    slots: Mapping[str, Slot]
    reader: CheckpointReader

    def dtype(self, row: Row) -> torch.dtype:
        """The dtype of `whole`."""
        return self.reader.dtype(self.slots[row.megatron].key)

    def whole(self, row: Row) -> list[Tensor]:
        """Read the Hugging Face tensors of a row."""
        return merge(row, [self.reader.read(self.slots[row.megatron])], self.hf.geometry)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapters(_Weights):
    """A checkpoint with adapters alone, and the weights that they belong to."""

    lora: LoraConfig
    base: Callable[[Row], list[Tensor]]

    def dtype(self, row: Row) -> torch.dtype:
        """The precision of the run, in which it held the base too."""
        first = next(row for row in self.table if row.adapted)
        return self.reader.dtype(self.adapter_slots(first)[0].key)

    def whole(self, row: Row) -> list[Tensor]:
        """Read the Hugging Face tensors of a row from the base, and merge its adapter, if it has one."""
        base = [tensor.to(self.dtype(row)) for tensor in self.base(row)]
        if not row.adapted:
            return base
        fused = shard(row, base, self.hf.geometry, tp_size=1, tp_rank=0)
        scale = self.lora.lora_alpha / self.lora.lora_rank
        return merge(row, [merged(fused, *self.adapter(row), scale)], self.hf.geometry)

    def adapter(self, row: Row) -> tuple[Tensor, Tensor]:
        """Read A and B of an adapted row, whole."""
        a, b = self.adapter_slots(row)
        return self.reader.read(a), self.reader.read(b)

    def adapter_slots(self, row: Row) -> tuple[Slot, Slot]:
        """Where A and B are."""
        module = row.megatron.removesuffix("weight")
        return self.slots[f"{module}lora_a"], self.slots[f"{module}lora_b"]


def to_hf(
    checkpoint: Path, template: Path, output: Path, groups: Groups, *, shard_bytes: int, dtype: torch.dtype | None
) -> Conversion:
    """Plan the conversion to a Hugging Face directory; every rank writes some of its files, one at a time.

    Adapters are merged with the weights of the template, in the precision of the run that trained them.

    Args:
        checkpoint: directory with a tracker, or one checkpoint in it.
        template: directory whose config, tokenizer and generation config accompany the weights.
        groups: without model parallelism; the checkpoint may be of any grid.
        shard_bytes: a file is closed before it would grow beyond this; one parameter may be larger.
        dtype: of all tensors; None keeps the ones they have.

    Raises:
        ValueError: the checkpoint is not of a model of the template's config.json, or not whole; the output exists.
    """
    require_new(output)
    source = _open(checkpoint, template, groups)
    contents = [
        hf_tensors(row, source.slots[row.megatron], source.hf.geometry, dtype or source.dtype(row))
        for row in source.table
    ]
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in contents]
    runs = cut(range(len(contents)), sizes, shard_bytes)
    files = {_file_name(number, len(runs)): run for number, run in enumerate(runs)}
    file_sizes = {name: sum(sizes[i] for i in run) for name, run in files.items()}

    def write() -> None:
        mine = share(list(files), list(file_sizes.values()), dist.get_world_size())[dist.get_rank()]
        with complete_directory(output) as directory:
            for name in mine:
                save_readable(_read(source, files[name], dtype), directory / name)
            if dist.get_rank() == 0:
                weight_map = {tensor: name for name, run in files.items() for i in run for tensor in contents[i]}
                _write_index(directory, weight_map, sum(sizes))
                dtypes = {str(t.dtype).removeprefix("torch.") for tensors in contents for t in tensors.values()}
                copy_template(template, directory, dtypes)

    return Conversion(files=file_sizes, write=write)


def to_adapter(checkpoint: Path, template: Path, output: Path, groups: Groups) -> Conversion:
    """Plan the conversion of a run's adapters to a PEFT directory, which rank 0 writes. See `to_hf`.

    Raises:
        ValueError: as `to_hf`, and where the checkpoint has no adapters.
    """
    require_new(output)
    source = _open(checkpoint, template, groups)
    if not isinstance(source, _Adapters):
        raise ValueError(f"--adapter {checkpoint}: the checkpoint holds no adapters; leave the flag out")
    adapted = [row for row in source.table if row.adapted]

    def write() -> None:
        with complete_directory(output) as directory:
            if dist.get_rank() == 0:
                tensors: dict[str, Tensor] = {}
                for row in adapted:
                    a, b = source.adapter(row)
                    tensors |= peft_tensors(row, a, [b], source.hf.geometry)
                write_adapter(tensors, directory, source.lora, template)

    slots = [(slot, source.dtype(row)) for row in adapted for slot in source.adapter_slots(row)]
    size = sum(prod(slot.shape) * dtype.itemsize for slot, dtype in slots)
    return Conversion(files={"adapter_model.safetensors": size}, write=write)


def _open(checkpoint: Path, template: Path, groups: Groups) -> _Weights:
    reader = CheckpointReader(find_checkpoint(checkpoint, "megatron-checkpoint"))
    hf = read_hf_model(template, "hf-template", tp_size=1)
    if not any(key.endswith(".lora_a") for key in reader.tensors):
        return _open_weights(reader, hf, groups)
    common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(reader.directory))
    lora = LoraConfig(**common["lora"])
    slots = slots_of(hf, groups, lora)
    require_checkpoint_fits(reader, [slot for name, slot in slots.items() if "lora_" in name], template)
    base = _base(common["base"], hf, groups, slots)
    return _Adapters(hf=hf, table=_table(hf), slots=slots, reader=reader, lora=lora, base=base)


def _open_weights(reader: CheckpointReader, hf: HFModel, groups: Groups) -> _Weights:
    if EMBEDDING in reader.tensors:  # padded in any way
        hf = hf.padded_to(max(reader.tensors[EMBEDDING].size[0], hf.geometry.vocab_size))
    slots = slots_of(hf, groups)
    require_checkpoint_fits(reader, list(slots.values()), hf.path)
    return _Weights(hf=hf, table=_table(hf), slots=slots, reader=reader)


def _base(
    trained: Mapping[str, Any], hf: HFModel, groups: Groups, slots: Mapping[str, Slot]
) -> Callable[[Row], list[Tensor]]:
    """Return what reads the weights that adapters were trained on.

    Args:
        trained: what the checkpoint says of them: `path`, and `files`, their fingerprint.
    """
    path = Path(trained["path"])
    if fingerprint(hf.path) == trained["files"]:
        weights = SafetensorsDirectory(hf.path)
        require_directory_fits(weights.describe(), _table(hf), slots, hf)
        return lambda row: [weights[name] for name in row.hf]
    if (path / ".metadata").is_file() and fingerprint(path) == trained["files"]:
        return _open_weights(CheckpointReader(path), hf, groups).whole
    raise ValueError(
        f"--hf-template {hf.path}: the adapters were trained on other weights, those of {path}; give that directory"
        + (" (a distributed checkpoint must be at its old place)" if ".metadata" in trained["files"] else "")
    )


def _table(hf: HFModel) -> list[Row]:
    return list(rows(hf.family, hf.geometry, tied=hf.tied, moe=hf.moe))


def _read(source: _Weights, numbers: Sequence[int], dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number in numbers:
        row = source.table[number]
        for name, tensor in zip(row.hf, source.whole(row), strict=True):
            tensors[name] = tensor.to(dtype or tensor.dtype).contiguous()
    return tensors


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _write_index(directory: Path, weight_map: Mapping[str, str], num_bytes: int) -> None:
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
