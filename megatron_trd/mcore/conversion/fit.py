"""Does a directory or a checkpoint hold the model that a config.json describes? Names and shapes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_trd.mcore.conversion.slots import Slot
from megatron_trd.mcore.conversion.storage import CheckpointReader
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.layouts import Geometry, Row, merge

HF_HEAD = "lm_head.weight"
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""How the names of a model's tensors begin in a checkpoint. An optimizer's begin otherwise."""


def hf_tensors(row: Row, slot: Slot, geometry: Geometry, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the Hugging Face tensors of a row, without data."""
    whole = torch.empty(slot.shape, dtype=dtype, device="meta")
    return dict(zip(row.hf, merge(row, [whole], geometry), strict=True))


def require_directory_fits(
    found: Mapping[str, Tensor], table: Sequence[Row], slots: Mapping[str, Slot], hf: HFModel
) -> None:
    """Compare the tensors of a Hugging Face directory with its config.json. A tied head may be stored.

    Raises:
        ValueError: a tensor is missing, has another shape, or is too many.
    """
    expected: dict[str, Tensor] = {}
    for row in table:
        expected |= hf_tensors(row, slots[row.megatron], hf.geometry, torch.float32)
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{hf.path}: tensor {name} is missing, which a model of its config.json has")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{hf.path}: tensor {name} is {tuple(found[name].shape)}; by its config.json it is "
                f"{tuple(tensor.shape)}"
            )
    _refuse(hf.path, found.keys() - expected.keys() - ({HF_HEAD} if hf.tied else set()), hf.path)


def require_checkpoint_fits(reader: CheckpointReader, slots: Sequence[Slot], template: Path) -> None:
    """Compare the tensors of a checkpoint with what a model of the template's config.json has there.

    Raises:
        ValueError: a tensor is missing, has another shape, or is too many.
    """
    for slot in slots:
        if slot.key not in reader.tensors:
            raise ValueError(
                f"{reader.directory}: tensor {slot.key} is missing, which a model of {template / 'config.json'} has"
            )
    require_none_more(reader, {slot.key for slot in slots}, template)
    for slot in slots:
        size = tuple(reader.tensors[slot.key].size)
        if size != slot.size:
            raise ValueError(
                f"{reader.directory}: tensor {slot.key} is {size}; by {template / 'config.json'} it is {slot.size}"
            )


def require_none_more(reader: CheckpointReader, expected: set[str], template: Path) -> None:
    """Refuse a checkpoint of a model that has more tensors than these.

    Raises:
        ValueError: it has.
    """
    _refuse(reader.directory, {key for key in reader.tensors if key.startswith(_MODEL_PREFIXES)} - expected, template)


def _refuse(where: Path, extra: set[str], template: Path) -> None:
    if extra:
        names = ", ".join(sorted(extra)[:3]) + (", ..." if len(extra) > 3 else "")
        raise ValueError(f"{where}: a model of {template / 'config.json'} has no {names} ({len(extra)} tensors in all)")
