"""LoRA adapters of the embedded server: every row of a batch may wear its own, y = W x + (alpha / r) B A x."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from megatron_trd.weight_sync.names import listed

_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """What one adapter adds to the linear layers it names."""

    name: str
    path: str
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """module -> (A [r, in], B [out, r] times alpha / r)"""


class LoraModel:
    """A causal language model and the adapters that its rows may name."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap the model; without adapters it costs nothing."""
        self.base = model
        self.adapters: dict[str, Adapter] = {}
        self._linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
        self._hooked: set[str] = set()
        self._rows: list[tuple[Adapter, Tensor]] = []

    def __call__(self, adapters: Sequence[Adapter | None], **inputs: Any) -> Any:
        """Run the model; row i wears adapters[i]."""
        self._rows = [
            (adapter, torch.tensor([i for i, other in enumerate(adapters) if other is adapter]))
            for adapter in dict.fromkeys(adapters)
            if adapter is not None
        ]
        return self.base(**inputs)

    def load(self, name: str, path: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Add an adapter, given as PEFT's adapter_config.json and adapter_model.safetensors.

        Raises:
            ValueError: the name is taken, or the adapter does not fit the model.
        """
        if name in self.adapters:
            raise ValueError(f"Failed to load LoRA adapter {name} because it is already loaded")
        adapter = Adapter(name=name, path=path, pairs=self._pairs(name, config, tensors))
        for module in adapter.pairs.keys() - self._hooked:
            self._linears[module].register_forward_hook(partial(self._add, module))
            self._hooked.add(module)
        self.adapters[name] = adapter

    def load_directory(self, name: str, path: str) -> None:
        """Add an adapter from a directory that PEFT wrote; raises like `load`, or OSError."""
        config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
        self.load(name, path, config, load_file(Path(path) / "adapter_model.safetensors"))

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that wear it keep it to their end."""
        if name not in self.adapters:
            raise ValueError(f"LoRA with name {name} does not exist. Loaded LoRAs: {list(self.adapters)}")
        del self.adapters[name]

    def _add(self, module: str, _: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for adapter, rows in self._rows:
            if module in adapter.pairs:
                a, b = adapter.pairs[module]
                output.index_add_(0, rows, linear(linear(inputs[0][rows], a), b))
        return output

    def _pairs(
        self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        unsupported = [key for key in _UNSUPPORTED if config.get(key)]
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if unsupported or type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
            raise ValueError(f"adapter {name}: needs r and lora_alpha and none of {', '.join(_UNSUPPORTED)}")
        expected: dict[str, tuple[int, int]] = {}
        modules = {key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors}
        for module in sorted(modules & self._linears.keys()):
            linear_ = self._linears[module]
            expected[f"{_PREFIX}{module}.lora_A.weight"] = (rank, linear_.in_features)
            expected[f"{_PREFIX}{module}.lora_B.weight"] = (linear_.out_features, rank)
        problems = [f"unknown {key}" for key in sorted(tensors.keys() - expected.keys())]
        problems += [f"missing {key}" for key in sorted(expected.keys() - tensors.keys())]
        problems += [
            f"{key} is {tuple(tensors[key].shape)}, not {shape}"
            for key, shape in expected.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ]
        if problems or not expected:
            raise ValueError(f"adapter {name} does not fit: {listed(problems) or 'it is empty'}")
        dtype = self.base.dtype
        return {
            module: (
                tensors[f"{_PREFIX}{module}.lora_A.weight"].to(dtype, copy=True),
                tensors[f"{_PREFIX}{module}.lora_B.weight"].to(dtype) * (alpha / rank),
            )
            for module in sorted(modules)
        }
