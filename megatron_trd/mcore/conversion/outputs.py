"""A directory that appears under its name only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_trd.weight_sync.disk import bring_to_disk


def require_new(output: Path) -> None:
    """Refuse to write over something.

    Raises:
        ValueError: there is something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output}: is already there; give another name, or remove it")


@contextmanager
def complete_directory(output: Path) -> Iterator[Path]:
    """Give a directory to write into, which becomes `output` when all ranks are done. Collective over all ranks."""
    output = output.absolute()
    partial = output.with_name(f".tmp-{output.name}")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # what an interrupted conversion left
        partial.mkdir(parents=True)
    dist.barrier()
    yield partial
    dist.barrier()
    if dist.get_rank() == 0:
        for path in (*partial.rglob("*"), partial):
            bring_to_disk(path)
        partial.replace(output)
        bring_to_disk(output.parent)
    dist.barrier()
