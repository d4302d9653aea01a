"""What the processes of a job use, read from /proc."""

from __future__ import annotations

import os

_PAGE = os.sysconf("SC_PAGE_SIZE")


def tree(root: int) -> list[int]:
    """Return the process ids of `root` and its descendants. Those that end meanwhile may be missing."""
    found, index = [root], 0
    while index < len(found):
        task = f"/proc/{found[index]}/task"
        for thread in _listed(task):
            found += [int(child) for child in _read(f"{task}/{thread}/children").split()]
        index += 1
    return found


def resident_bytes(root: int) -> int:
    """Return the resident memory of `root` and its descendants; shared pages count once for each."""
    fields = [_read(f"/proc/{pid}/statm").split() for pid in tree(root)]
    return sum(int(resident) * _PAGE for _, resident, *_ in filter(None, fields))


def waited_s(root: int) -> float:
    """Return the longest time that one of `root` and its descendants was ready to run but had no core."""
    fields = [_read(f"/proc/{pid}/schedstat").split() for pid in tree(root)]
    return max((int(waited) / 1e9 for _, waited, _ in filter(None, fields)), default=0.0)


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # it has ended
        return []


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:  # it has ended
        return ""
