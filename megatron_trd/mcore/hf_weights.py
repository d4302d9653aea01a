"""Weights from and to Hugging Face safetensors, straight through the table of `layouts`, on any grid of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_trd.config.schema import LoraConfig
from megatron_trd.mcore.gpt import GPTChunks
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.layouts import EMBEDDING, HEAD, Row, merge, rows, shard
from megatron_trd.mcore.lora import LoRALinear
from megatron_trd.mcore.stages import Home
from megatron_trd.weight_sync.adapter import adapter_config


class SafetensorsDirectory:
    """Lazy access by name to the tensors of a Hugging Face model directory, sharded or not."""

    def __init__(self, path: Path) -> None:
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if index.is_file():
            self._file_of = {k: path / v for k, v in json.loads(index.read_text())["weight_map"].items()}
        elif single.is_file():
            with safe_open(single, "pt") as file:
                self._file_of = dict.fromkeys(file.keys(), single)
        else:
            raise ValueError(
                f"{path}: no model.safetensors(.index.json) there; give a directory with safetensors weights"
            )
        self._path = path

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self._path}: tensor {name} is missing; the checkpoint does not fit its config.json")
        with safe_open(self._file_of[name], "pt") as file:
            return file.get_tensor(name)


def load(model: GPTChunks, groups: Groups) -> None:
    """Fill this rank's part of every base parameter from the model's own directory. Adapters stay as they are.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    source = SafetensorsDirectory(model.hf.path)
    parameters = [dict(chunk.named_parameters()) for chunk in model]
    with torch.no_grad():
        for row in _rows(model):
            for home in _copies(model, row, groups):
                part = shard(row, [source[name] for name in row.hf], model.hf.geometry, groups.tp_size, groups.tp_rank)
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

    Collective over tensor-parallel and pipeline groups: every rank must exhaust it. One row is gathered at a time.
    """
    for row in _rows(model):
        home = model.stages.home(row.megatron)
        module = _module_here(model, home, groups)
        part = None
        if isinstance(module, LoRALinear) and row.adapted:
            part = module.merged_weight().detach()
        elif module is not None:
            part = getattr(module, home.name.rpartition(".")[2]).detach()
        parts = _gather(_from_stage(part, home.pp_rank, model, groups), groups)
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
            _from_stage(None if module is None else getattr(module, name).detach(), home.pp_rank, model, groups)
            for name in ("lora_a", "lora_b")
        )
        if row.kind == "row":  # split by input, so is A
            a, outputs = torch.cat(_gather(lora_a, groups), 1), [lora_b]
        else:
            a, outputs = lora_a, merge(row, _gather(lora_b, groups), model.hf.geometry)
        for name, b in zip(row.hf, outputs, strict=True):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            yield f"{prefix}.lora_A.weight", a
            yield f"{prefix}.lora_B.weight", b


def write_adapter(tensors: dict[str, Tensor], directory: str | Path, lora: LoraConfig, base: Path) -> None:
    """Write a PEFT adapter directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu().clone() for k, v in tensors.items()}, directory / "adapter_model.safetensors")
    config = adapter_config(lora, base, tensors)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _rows(model: GPTChunks) -> Iterator[Row]:
    return rows(model.hf.family, model.hf.geometry, tied=model.hf.tied)


def _module_here(model: GPTChunks, home: Home, groups: Groups) -> torch.nn.Module | None:
    """Return the module that a parameter belongs to, if it is on this rank."""
    if home.pp_rank != groups.pp_rank:
        return None
    return model.chunks[home.chunk].get_submodule(home.name.rpartition(".")[0])


def _copies(model: GPTChunks, row: Row, groups: Groups) -> Iterator[Home]:
    """Yield this rank's copies of a row: one, none, or the tied head's beside the embedding's own."""
    homes = [model.stages.home(row.megatron)]
    if row.megatron == EMBEDDING and model.hf.tied and groups.pp_size > 1:
        homes.append(model.stages.home(HEAD))
    yield from (home for home in homes if home.pp_rank == groups.pp_rank)


def _from_stage(part: Tensor | None, pp_rank: int, model: GPTChunks, groups: Groups) -> Tensor:
    """Hand one stage's tensor (of one or two dimensions) to all stages."""
    if groups.pp_size == 1:
        assert part is not None
        return part
    shape = torch.tensor(part.shape if part is not None else (), dtype=torch.int64, device=groups.device)
    shape = torch.nn.functional.pad(shape, (0, 2 - shape.numel()))
    dist.broadcast(shape, group=groups.pp, group_src=pp_rank)
    if part is None:
        size = [n for n in shape.tolist() if n]
        part = torch.empty(size, dtype=model.config.params_dtype, device=groups.device)
    part = part.contiguous()
    dist.broadcast(part, group=groups.pp, group_src=pp_rank)
    return part


def _gather(part: Tensor, groups: Groups) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(groups.tp_size)]
    dist.all_gather(parts, part.contiguous(), group=groups.tp)
    return parts
