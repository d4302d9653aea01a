"""Cutting a list of things with sizes: into files, and into the shares of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What will be written, checked as far as it can be without reading the weights."""

    files: Mapping[str, int]
    """Name -> bytes of the tensors in it."""
    write: Callable[[], None]
    """Do it. Collective over all ranks; the output appears under its name only when all of it is on disk."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.files.values())


def cut(items: Sequence[T], sizes: Sequence[int], limit: int) -> list[list[T]]:
    """Cut into runs that are no larger than `limit`, but for single items that are."""
    runs: list[list[T]] = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        if not runs or size > room:
            runs.append([])
            room = limit
        runs[-1].append(item)
        room -= size
    return runs


def share(items: Sequence[T], sizes: Sequence[int], num_ranks: int) -> list[list[T]]:
    """Cut into one run for each rank, about equal in size; a run may be empty."""
    runs: list[list[T]] = [[] for _ in range(num_ranks)]
    total, before = sum(sizes), 0
    for item, size in zip(items, sizes, strict=True):
        runs[(2 * before + size) * num_ranks // (2 * total + 1)].append(item)
        before += size
    return runs
