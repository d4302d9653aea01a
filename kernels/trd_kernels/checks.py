"""Argument checks."""

from __future__ import annotations


def require(ok: bool, argument: str, value: object, reason: str) -> None:
    """Raise a ValueError that names the argument, its value and what is wrong with it, unless `ok`."""
    if not ok:
        raise ValueError(f"{argument} {value}: {reason}")
