"""Tensors out of pickles that strangers sent: only what a tensor is made of can be built, everything else is refused.

A plain tensor pickles as a call of `torch._utils._rebuild_tensor_v2` on a storage, which itself is bytes for
`torch.load`. Both are replaced here: the storage is read with `weights_only=True` onto the CPU, and the view is
checked against its bounds. Shared-memory and CUDA handles are refused: data must lie in the payload.
"""

from __future__ import annotations

import base64
import io
import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FLATTENED_BUCKET = "flattened_bucket"
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Call:
    """A function for pickles. Unlike a real one it has no attribute that a pickle could set."""

    __slots__ = ()


class _LoadStorage(_Call):
    __slots__ = ()

    def __call__(self, data: bytes) -> Any:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _RebuildTensor(_Call):
    __slots__ = ()

    def __call__(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, torch.storage.TypedStorage):
            raise pickle.UnpicklingError(f"a tensor cannot be made of {type(storage).__name__}")
        whole = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
        return whole.as_strided(size, stride, offset)  # checks the bounds


class _RebuildParameter(_Call):
    __slots__ = ()

    def __call__(self, data: Tensor, *_: Any) -> Tensor:
        return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch.storage", "_load_from_bytes"): _LoadStorage(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
    # Both are bags of attributes; C code owns this one, so a pickle cannot change the class itself.
    ("types", "SimpleNamespace"): SimpleNamespace,
    ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"): SimpleNamespace,
} | {("torch", name): dtype for name, dtype in _DTYPES.items()}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a tensor") from None


def read_tensors(payloads: Any, load_format: str | None) -> list[tuple[str, Tensor]]:
    """Decode a `serialized_named_tensors` field of one rank.

    Args:
        payloads: a list of one base64 pickle of [(name, tensor)] or {name: tensor}; with load_format
            `flattened_bucket` of {"flattened_tensor": bytes of all, "metadata": [name, dtype, shape, start, end]}.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(payloads, list) or len(payloads) != 1 or not isinstance(payloads[0], str):
        raise ValueError("serialized_named_tensors must be a list with one base64 string for the one rank")
    if load_format not in (None, FLATTENED_BUCKET):
        raise ValueError(f"load_format {load_format!r} is unknown; leave it out or use {FLATTENED_BUCKET}")
    try:
        content = _TensorUnpickler(io.BytesIO(base64.b64decode(payloads[0], validate=True))).load()
        named = _split_bucket(content) if load_format else list(dict(content).items())
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in named):
            raise TypeError("not pairs of a name and a tensor")
    except (  # what a pickle can raise has no common base
        pickle.UnpicklingError,
        EOFError,
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"serialized_named_tensors cannot be read: {type(error).__name__}: {error}") from error
    return named


def _split_bucket(bucket: Any) -> list[tuple[str, Tensor]]:
    flat = bucket["flattened_tensor"].view(torch.uint8)
    return [
        (part.name, flat[part.start_idx : part.end_idx].view(part.dtype).reshape(tuple(part.shape)))
        for part in bucket["metadata"]
    ]
