"""Hands Python objects from rank 0 to every rank.

Rank 0 may be busy with rollouts for hours while the others wait, so this goes over a gloo group of its own, whose
timeout is long; the timeout of the training collectives stays short.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def make_handout_group(timeout_minutes: float) -> dist.ProcessGroup:
    """Return a gloo group over all ranks whose collectives wait up to `timeout_minutes`. Collective over all ranks."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def broadcast_object(obj: T, group: dist.ProcessGroup, src: int = 0) -> T:
    """Return `obj` of global rank `src` on every rank (the other ranks' argument is ignored). Collective over `group`.

    The object is pickled, so its tensors must lie on the CPU.
    """
    box: list[Any] = [obj if dist.get_rank() == src else None]
    dist.broadcast_object_list(box, src=src, group=group)
    return box[0]


def run_on_rank_zero(fn: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Call `fn` on rank 0 and return its result on every rank. Collective over `group`.

    Raises:
        RuntimeError: on the other ranks, with rank 0's message, when `fn` raised; rank 0 raises the original.
    """
    if dist.get_rank() != 0:
        payload, failure = broadcast_object((b"", ""), group)
        if failure:
            raise RuntimeError(f"rank 0 failed: {failure}")
        return pickle.loads(payload)
    outcome = (b"", "ended without a result")
    try:
        result = fn()
        outcome = (pickle.dumps(result), "")  # here, so that an unpicklable result also reaches the other ranks
        return result
    except BaseException as error:
        outcome = (b"", "".join(traceback.format_exception_only(error)).strip())
        raise
    finally:
        broadcast_object(outcome, group)
