"""Weights from and to Hugging Face safetensors, straight through the table of `layouts`, on any grid of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_trd.config.schema import LoraConfig
from megatron_trd.mcore.experts import name_on_rank
from megatron_trd.mcore.gpt import GPTChunks
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.layouts import EMBEDDING, HEAD, Geometry, Row, merge, rows, shard
from megatron_trd.mcore.lora import LoRALinear
from megatron_trd.mcore.stages import Home
from megatron_trd.weight_sync.adapter import adapter_config
from megatron_trd.weight_sync.disk import save_readable

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class SafetensorsDirectory:
    """Lazy access by name to the tensors of a Hugging Face model directory, sharded or not."""

    def __init__(self, path: Path) -> None:
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if index.is_file():
            self._file_of = {k: path / v for k, v in json.loads(index.read_text())["weight_map"].items()}
        elif single.is_file():
            with _opened(single) as file:
                self._file_of = dict.fromkeys(file.keys(), single)
        else:
            raise ValueError(
                f"{path}: no model.safetensors(.index.json) there; give a directory with safetensors weights"
            )
        self._path = path

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self._path}: tensor {name} is missing; the checkpoint does not fit its config.json")
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name)

    def describe(self) -> dict[str, Tensor]:
        """Return every tensor's shape and dtype, as a tensor without data.

        Raises:
            ValueError: a file is missing or damaged, or a tensor's dtype is not a floating-point type of torch.
        """
        found: dict[str, Tensor] = {}
        for path in sorted(set(self._file_of.values())):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    header = file.get_slice(name)
                    if header.get_dtype() not in _DTYPES:
                        raise ValueError(
                            f"{path}: tensor {name} is {header.get_dtype()}; use a checkpoint in {', '.join(_DTYPES)}"
                        )
                    found[name] = torch.empty(header.get_shape(), dtype=_DTYPES[header.get_dtype()], device="meta")
        for name, path in self._file_of.items():
            if name not in found:
                raise ValueError(f"{path}: tensor {name} is missing, which the index says is there")
        return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy the file anew") from error


def load(model: GPTChunks, groups: Groups) -> None:
    """Fill this rank's part of every base parameter from the model's own directory. Adapters stay as they are.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    source = SafetensorsDirectory(model.hf.path)
    parameters = [dict(chunk.named_parameters()) for chunk in model]
    with torch.no_grad():
        for row in _rows(model):
            _, size, rank = _sharers(row, groups)
            for home in _copies(model, row, groups):
                part = shard(row, [source[name] for name in row.hf], model.hf.geometry, size, rank)
                target = parameters[home.chunk].pop(home.name)
                if part.shape != target.shape:
                    raise ValueError(
                        f"{model.hf.path}: {', '.join(row.hf)} do not fit config.json: "
                        f"{tuple(part.shape)} on this rank instead of {tuple(target.shape)}"
                    )
                target.copy_(part)
    leftover = [name for names in parameters for name in names if "lora_" not in name]
    assert not leftover, f"parameters without a row in the layout table: {leftover}"


def export(model: GPTChunks, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its Hugging Face name, whole, adapters merged, padding rows cut, tied head once.

    Collective over tensor-parallel, pipeline and expert groups: every rank must exhaust it. One row is gathered at a
    time.
    """
    for row in _rows(model):
        home = _home(model, row, groups)
        owner = _expert_owner(model, row, groups)
        module, part = _module_here(model, home, groups), None
        if isinstance(module, LoRALinear) and row.adapted:
            part = module.merged_weight().detach()
        elif module is not None and owner in (None, groups.ep_rank):
            part = getattr(module, home.name.rpartition(".")[2]).detach()
        if owner in (None, groups.ep_rank):
            part = _handed_out(part, groups.pp, home.pp_rank, model)
        if owner is not None:
            part = _handed_out(part, groups.ep, owner, model)
        assert part is not None
        parts = _gather(part, *_sharers(row, groups)[:2])
        yield from zip(row.hf, merge(row, parts, model.hf.geometry), strict=True)


def export_adapter(model: GPTChunks, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Yield the LoRA adapter under PEFT's names, whole. Collective over tensor-parallel and pipeline groups.

    The A of a fused linear is repeated for each Hugging Face projection in it; B is split like the weight.
    """
    for row in _rows(model):
        if not row.adapted:
            continue
        home = model.stages.home(row.megatron)
        module = _module_here(model, home, groups)
        lora_a, lora_b = (
            _handed_out(None if module is None else getattr(module, name).detach(), groups.pp, home.pp_rank, model)
            for name in ("lora_a", "lora_b")
        )
        if row.kind == "row":  # split by input, so is A
            lora_a, parts = torch.cat(_gather(lora_a, groups.tp, groups.tp_size), 1), [lora_b]
        else:
            parts = _gather(lora_b, groups.tp, groups.tp_size)
        yield from peft_tensors(row, lora_a, parts, model.hf.geometry)


def peft_tensors(
    row: Row, lora_a: Tensor, lora_b: Sequence[Tensor], geometry: Geometry
) -> Iterator[tuple[str, Tensor]]:
    """Yield one adapter under PEFT's names: for each Hugging Face projection in the row, A and its part of B.

    Args:
        lora_a: whole.
        lora_b: every tensor-parallel rank's part, where the row is split by output; else the whole.
    """
    outputs = lora_b if row.kind == "row" else merge(row, lora_b, geometry)
    for name, b in zip(row.hf, outputs, strict=True):
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        yield f"{prefix}.lora_A.weight", lora_a
        yield f"{prefix}.lora_B.weight", b


def write_adapter(tensors: dict[str, Tensor], directory: str | Path, lora: LoraConfig, base: Path) -> None:
    """Write a PEFT adapter directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_readable({k: v.cpu().clone() for k, v in tensors.items()}, directory / "adapter_model.safetensors")
    config = adapter_config(lora, base, tensors)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _rows(model: GPTChunks) -> Iterator[Row]:
    return rows(model.hf.family, model.hf.geometry, tied=model.hf.tied, moe=model.hf.moe)


def _sharers(row: Row, groups: Groups) -> tuple[dist.ProcessGroup, int, int]:
    """Return the group whose ranks share the row's matrix, its size and this rank's place in it."""
    if row.expert is None:
        return groups.tp, groups.tp_size, groups.tp_rank
    return groups.etp, groups.etp_size, groups.etp_rank


def _expert_owner(model: GPTChunks, row: Row, groups: Groups) -> int | None:
    """Return the expert-parallel rank that holds the row; None where all do."""
    if row.expert is None or model.hf.moe is None:
        return None
    return row.expert // (model.hf.moe.num_experts // groups.ep_size)


def _home(model: GPTChunks, row: Row, groups: Groups) -> Home:
    """Find the row's stage, and its name on the ranks that hold it."""
    home = model.stages.home(row.megatron)
    if row.expert is None or model.hf.moe is None:
        return home
    index = row.expert % (model.hf.moe.num_experts // groups.ep_size)
    return replace(home, name=name_on_rank(home.name, index, grouped=model.config.moe_grouped_gemm))


def _module_here(model: GPTChunks, home: Home, groups: Groups) -> torch.nn.Module | None:
    """Return the module that a parameter belongs to, if it is on this rank."""
    if home.pp_rank != groups.pp_rank:
        return None
    return model.chunks[home.chunk].get_submodule(home.name.rpartition(".")[0])


def _copies(model: GPTChunks, row: Row, groups: Groups) -> Iterator[Home]:
    """Yield this rank's copies of a row: one, none, or the tied head's beside the embedding's own."""
    homes = [_home(model, row, groups)] if _expert_owner(model, row, groups) in (None, groups.ep_rank) else []
    if row.megatron == EMBEDDING and model.hf.tied and groups.pp_size > 1:
        homes.append(model.stages.home(HEAD))
    yield from (home for home in homes if home.pp_rank == groups.pp_rank)


def _handed_out(part: Tensor | None, group: dist.ProcessGroup, source: int, model: GPTChunks) -> Tensor:
    """Hand one rank's tensor (of one or two dimensions) to all ranks of a group."""
    if group.size() == 1:
        assert part is not None
        return part
    device, dtypes = next(model.parameters()).device, list(_DTYPES.values())
    header = [dtypes.index(part.dtype), *part.shape] if part is not None else []
    described = torch.tensor(header + [0] * (3 - len(header)), dtype=torch.int64, device=device)
    dist.broadcast(described, group=group, group_src=source)
    if part is None:
        dtype, *size = described.tolist()
        part = torch.empty([n for n in size if n], dtype=dtypes[dtype], device=device)
    part = part.contiguous()
    dist.broadcast(part, group=group, group_src=source)
    return part


def _gather(part: Tensor, group: dist.ProcessGroup, size: int) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
