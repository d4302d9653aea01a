"""Weights from and to Hugging Face safetensors, straight through the table of `layouts`, at any tensor parallelism."""

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
from megatron_trd.mcore.gpt import HiddenStatesGPT
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.layouts import ADAPTED, Row, merge, rows, shard
from megatron_trd.mcore.lora import LoRALinear


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


def load(model: HiddenStatesGPT, groups: Groups) -> None:
    """Fill this rank's part of every base parameter from the model's own directory. Adapters stay as they are.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    source = SafetensorsDirectory(model.hf.path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for row in _rows(model):
            part = shard(row, [source[name] for name in row.hf], model.hf.geometry, groups.tp_size, groups.tp_rank)
            target = parameters.pop(row.megatron)
            if part.shape != target.shape:
                raise ValueError(
                    f"{model.hf.path}: {', '.join(row.hf)} do not fit config.json: "
                    f"{tuple(part.shape)} on this rank instead of {tuple(target.shape)}"
                )
            target.copy_(part)
    leftover = [name for name in parameters if "lora_" not in name]
    assert not leftover, f"parameters without a row in the layout table: {leftover}"


def export(model: HiddenStatesGPT, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its Hugging Face name, whole, adapters merged, padding rows cut, tied head once.

    Collective over the tensor-parallel group: every rank must exhaust it. One row is gathered at a time.
    """
    for row in _rows(model):
        parts = _gather(_local(model, row), groups)
        yield from zip(row.hf, merge(row, parts, model.hf.geometry), strict=True)


def export_adapter(model: HiddenStatesGPT, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Yield the LoRA adapter under PEFT's names, whole. Collective over the tensor-parallel group.

    The A of a fused linear is repeated for each Hugging Face projection in it; B is split like the weight.
    """
    for row in _rows(model):
        module = model.get_submodule(row.megatron.rpartition(".")[0])
        if not isinstance(module, LoRALinear) or not row.megatron.endswith(".weight"):
            continue
        lora_a, lora_b = (
            _gather(part.detach(), groups) if name in module.tp_dims else [part.detach()]
            for name, part in (("lora_a", module.lora_a), ("lora_b", module.lora_b))
        )
        a = torch.cat(lora_a, 1)
        for name, b in zip(row.hf, lora_b if row.kind == "row" else merge(row, lora_b, model.hf.geometry), strict=True):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            yield f"{prefix}.lora_A.weight", a
            yield f"{prefix}.lora_B.weight", b


def write_adapter(tensors: dict[str, Tensor], directory: str | Path, lora: LoraConfig, base: Path) -> None:
    """Write a PEFT adapter directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu().clone() for k, v in tensors.items()}, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": sorted(name.rpartition(".")[2] for names in ADAPTED.values() for name in names),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _rows(model: HiddenStatesGPT) -> Iterator[Row]:
    return rows(model.hf.family, model.hf.geometry, tied=model.hf.tied)


def _local(model: HiddenStatesGPT, row: Row) -> Tensor:
    module_name, _, parameter = row.megatron.rpartition(".")
    module = model.get_submodule(module_name)
    if isinstance(module, LoRALinear) and parameter == "weight":
        return module.merged_weight().detach()
    return getattr(module, parameter).detach()


def _gather(part: Tensor, groups: Groups) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(groups.tp_size)]
    dist.all_gather(parts, part.contiguous(), group=groups.tp)
    return parts
