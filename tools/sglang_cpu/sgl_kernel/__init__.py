"""Stand-in for SGLang's kernel package, of which no CPU wheel exists.

As it registers no `torch.ops.sgl_kernel`, SGLang finds no AMX support and takes its plain-torch branches. These call
the one function below; every other name can be imported and raises when called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0.0.0+stand.in"


def assign_req_to_token_pool_cpu(
    request_rows: torch.Tensor,
    request_to_token: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    cache_locations: torch.Tensor,
    pool_length: int,
) -> None:
    """Write each request's new cache slots, which lie one after another, into its row from start to end, in place."""
    lengths = (ends - starts).tolist()
    pieces = cache_locations[: sum(lengths)].to(request_to_token.dtype).split(lengths)
    for row, start, piece in zip(request_rows.tolist(), starts.tolist(), pieces, strict=True):
        request_to_token[row, start : start + len(piece)] = piece


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU stand-in")

    return missing
