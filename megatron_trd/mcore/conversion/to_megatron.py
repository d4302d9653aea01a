"""From a Hugging Face directory to a checkpoint that Megatron loads on any grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.log import get_logger
from megatron_trd.mcore.checkpoint_files import TRACKER
from megatron_trd.mcore.conversion.fit import HF_HEAD, require_directory_fits
from megatron_trd.mcore.conversion.outputs import complete_directory, require_new
from megatron_trd.mcore.conversion.sharing import Conversion, share
from megatron_trd.mcore.conversion.slots import Slot, slots_of
from megatron_trd.mcore.conversion.storage import RELEASE, LazyTensor, file_sizes, write_checkpoint
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel, padded_vocab_size, read_hf_model
from megatron_trd.mcore.hf_weights import SafetensorsDirectory
from megatron_trd.mcore.layouts import Geometry, Row, rows, shard

logger = get_logger(__name__)


def to_megatron(
    source: Path,
    output: Path,
    groups: Groups,
    *,
    divisible_by: int,
    dtype: torch.dtype | None,
    common: Callable[[HFModel], Mapping[str, Any]],
) -> Conversion:
    """Plan the conversion of a Hugging Face directory; every rank reads and writes its share of the layers.

    Args:
        groups: without model parallelism: the checkpoint does not depend on it.
        divisible_by: the vocabulary is padded to a multiple of this.
        dtype: of all tensors; None keeps the ones they have.
        common: what the checkpoint says besides, from which Megatron-LM takes its arguments.

    Raises:
        ValueError: a model type we do not know; a tensor is missing, too many, or has another shape than config.json
            says; the output exists.
    """
    require_new(output)
    hf = read_hf_model(source, "hf-checkpoint", tp_size=1)
    hf = hf.padded_to(padded_vocab_size(hf.geometry.vocab_size, divisible_by, tp_size=1))
    weights = SafetensorsDirectory(source)
    slots = slots_of(hf, groups)
    table = list(rows(hf.family, hf.geometry, tied=hf.tied, moe=hf.moe))
    found = weights.describe()
    require_directory_fits(found, table, slots, hf)
    if hf.tied and HF_HEAD in found:
        _require_equal_head(weights, table[0], hf)
    if dtype is None:
        _require_one_dtype(found, table, slots, source)
    tensors = [
        LazyTensor(
            slot=slots[row.megatron],
            dtype=dtype or found[row.hf[0]].dtype,
            make=partial(_fused, row, weights, hf.geometry),
        )
        for row in table
    ]
    shares = share(tensors, [tensor.nbytes for tensor in tensors], dist.get_world_size())

    def write() -> None:
        with complete_directory(output) as directory:
            write_checkpoint(directory / RELEASE, shares[dist.get_rank()], common(hf))
            if dist.get_rank() == 0:
                (directory / TRACKER).write_text(RELEASE)

    files = {name: size for rank, part in enumerate(shares) for name, size in file_sizes(part, rank).items()}
    return Conversion(files={f"{RELEASE}/{name}": size for name, size in files.items()}, write=write)


def _fused(row: Row, weights: SafetensorsDirectory, geometry: Geometry) -> Tensor:
    return shard(row, [weights[name] for name in row.hf], geometry, tp_size=1, tp_rank=0)


def _require_equal_head(weights: SafetensorsDirectory, embedding: Row, hf: HFModel) -> None:
    """A head that is stored though it is tied may be left out only if it is the embedding."""
    if not torch.equal(weights[HF_HEAD], weights[embedding.hf[0]]):
        raise ValueError(
            f"{hf.path}: tensor {HF_HEAD} differs from the embedding, to which config.json ties it; set "
            "tie_word_embeddings to false there, or remove the tensor"
        )
    logger.info("%s: leaving out %s, which is the embedding", hf.path, HF_HEAD)


def _require_one_dtype(
    found: Mapping[str, Tensor], table: Sequence[Row], slots: Mapping[str, Slot], source: Path
) -> None:
    """Megatron keeps a parameter of all layers in one tensor, so it has one dtype."""
    dtypes: dict[str, torch.dtype] = {}
    for row in table:
        for name in row.hf:
            dtype = found[name].dtype
            if dtypes.setdefault(slots[row.megatron].key, dtype) != dtype:
                raise ValueError(
                    f"{source}: tensor {name} is {dtype}, others that Megatron keeps in one with it are "
                    f"{dtypes[slots[row.megatron].key]}; give one for all with --dtype"
                )
