"""Which row kernels run: chosen once a call, said once a process."""

from __future__ import annotations

import functools
import importlib
import logging

import torch

from trd_kernels.checks import require
from trd_kernels.row_kernels import RowKernels
from trd_kernels.torch_rows import TorchRows

BACKENDS = ("auto", "torch", "triton")


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype) -> RowKernels:
    """Return the row kernels for `name`; `auto` takes Triton wherever it can run on a GPU, and says so once."""
    require(name in BACKENDS, "backend", name, f"choose one of {', '.join(BACKENDS)}")
    if name == "torch":
        return TorchRows()
    if name == "auto" and device.type != "cuda":
        _say(f"row kernels: torch, the choice for a {device.type} device")
        return TorchRows()
    obstacle = _obstacle_to_triton(device.type, dtype)
    if name == "triton":
        require(obstacle is None, "backend", name, f"{obstacle}; use backend='torch'")
    else:
        _say(f"row kernels: {'triton' if obstacle is None else f'torch, as {obstacle}'}")
    return _triton_rows() if obstacle is None else TorchRows()


def _obstacle_to_triton(device_type: str, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 and the inputs are float64"
    try:
        triton_rows = importlib.import_module("trd_kernels.triton_rows")
    except ImportError as error:
        return f"triton does not import ({error})"
    if device_type == "cuda" or triton_rows.INTERPRETED:
        return None
    return f"Triton needs a CUDA device, or TRITON_INTERPRET=1 in the environment, and the inputs are on {device_type}"


def _triton_rows() -> RowKernels:
    return importlib.import_module("trd_kernels.triton_rows").TritonRows()


@functools.cache
def _say(message: str) -> None:
    logging.getLogger(__name__).info(message)
