"""The weights of the embedded server: replaced, compared, released. All of it in the engine's thread."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_trd.weight_sync.names import listed

MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class ServedWeights:
    """The parameters of a model, under the names of its Hugging Face checkpoint."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Take over the parameters."""
        self._parameters = dict(model.named_parameters())
        self._whole_shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self._places = dict(_places(self._parameters))
        self._shapes = {name: tuple(self._tensor(name).shape) for name in self._places}
        self._tied = {"lm_head.weight"} - self._places.keys()
        self._released: set[str] = set()
        self._undefined: set[str] = set()

    @property
    def trouble(self) -> str | None:
        """Why the model cannot run now."""
        if self._released:
            return f"memory is released: {', '.join(sorted(self._released))}; POST /resume_memory_occupation first"
        if self._undefined:
            names = listed(sorted(self._undefined))
            return f"weights are undefined since /resume_memory_occupation and must be sent: {names}"
        return None

    @torch.no_grad()
    def copy(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Copy some of the weights.

        Raises:
            ValueError: a name or a shape is not the model's; nothing was copied.
        """
        self._require_memory()
        problems = self._misfits((name, tuple(tensor.shape)) for name, tensor in named)
        if problems:
            raise ValueError(f"{listed(problems)}; no weight was changed")
        for name, tensor in named:
            self._set(name, tensor)

    @torch.no_grad()
    def copy_directory(self, directory: str) -> None:
        """Copy all weights from safetensors; all names and shapes are checked before the first copy.

        Raises:
            ValueError: files, names or shapes are not those of the model, which then keeps its weights.
        """
        self._require_memory()
        files = sorted(Path(directory).glob("*.safetensors"))
        if not files:
            raise ValueError(f"no *.safetensors in {directory}")
        shapes = [entry for file in files for entry in _shapes(file)]
        names = [name for name, _ in shapes]
        problems = self._misfits(shapes)
        problems += [f"{name} is there twice" for name in sorted({name for name in names if names.count(name) > 1})]
        problems += [f"missing {name}" for name in sorted(self._places.keys() - set(names))]
        if problems:
            raise ValueError(f"weights in {directory} do not fit: {listed(problems)}")
        for file in files:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a mapping
                    self._set(name, shard.get_tensor(name))

    def _set(self, name: str, tensor: Tensor) -> None:
        if name not in self._tied:
            self._tensor(name).copy_(tensor)
            self._undefined.discard(name)

    def _tensor(self, name: str) -> Tensor:
        parameter, part = self._places[name]
        return self._parameters[parameter].detach()[part]

    def _misfits(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
        return [
            f"{name} is {shape}, not {self._shapes[name]}" if name in self._shapes else f"unknown {name}"
            for name, shape in shapes
            if name not in self._tied and self._shapes.get(name) != shape
        ]

    def checksums(self) -> dict[str, str]:
        """Return a SHA-256 of every weight's bytes."""
        self._require_memory()
        return {
            name: hashlib.sha256(self._tensor(name).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name in self._places
        }

    def rows(self, name: str, num: int) -> list[Any] | None:
        """Return the first `num` rows of a weight as numbers; None if there is none of that name."""
        self._require_memory()
        name = "model.embed_tokens.weight" if name in self._tied else name
        return self._tensor(name)[:num].float().tolist() if name in self._places else None

    def release_memory(self, tags: Iterable[str]) -> None:
        """Free what the tags name; the caches are empty anyway when nothing decodes."""
        tags = set(tags)
        if tags & self._released:
            raise ValueError(f"{', '.join(sorted(tags & self._released))}: released already; resume first")
        self._released |= tags
        if "weights" in tags:
            for p in self._parameters.values():
                p.data = torch.empty(0, dtype=p.dtype)

    def resume_memory(self, tags: Iterable[str]) -> None:
        """Take it again; what weights hold now is nobody's, so each must be sent before the model runs."""
        tags = set(tags)
        if tags - self._released:
            raise ValueError(f"{', '.join(sorted(tags - self._released))}: not released")
        self._released -= tags
        if "weights" in tags:
            for name, p in self._parameters.items():
                p.data = torch.full(self._whole_shapes[name], torch.nan, dtype=p.dtype)
            self._undefined = set(self._places)

    def _require_memory(self) -> None:
        if "weights" in self._released:
            raise ValueError("the weights' memory is released; POST /resume_memory_occupation first")


def _places(parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yield for every name of a checkpoint the parameter that holds the weight, and which part of it is it.

    transformers keeps one tensor for a projection of all experts of a layer; a checkpoint has one for each.
    """
    for name, parameter in parameters.items():
        layer, _, held = name.rpartition(".experts.")
        if not layer or held not in _STACKED:
            yield name, (name, ...)
            continue
        width = parameter.size(1) // len(_STACKED[held])
        for expert in range(parameter.size(0)):
            for i, projection in enumerate(_STACKED[held]):
                rows = slice(i * width, (i + 1) * width)
                yield f"{layer}.experts.{expert}.{projection}.weight", (name, (expert, rows))


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with safe_open(file, framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118 - not a mapping
            yield name, tuple(shard.get_slice(name).get_shape())
