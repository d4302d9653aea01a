"""Logging that knows its rank: rank 0 tells what happens, the others speak up only when something is wrong."""

from __future__ import annotations

import logging
import sys

_ROOT = "megatron_trd"
_LIBRARIES = ("trd_kernels",)  # ours too, with loggers of their own


def configure(rank: int) -> None:
    """Send this process's messages to stderr: from INFO on rank 0, from WARNING elsewhere. Call it once in a main."""
    speaker = "" if rank == 0 else f" rank {rank}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[%(asctime)s] %(levelname)s{speaker}: %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name in (_ROOT, *_LIBRARIES):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        logger.propagate = False


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is its `__name__`, a main's `__main__` included."""
    return logging.getLogger(name if name.split(".")[0] == _ROOT else f"{_ROOT}.{name}")
