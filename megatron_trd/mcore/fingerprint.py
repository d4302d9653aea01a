"""Tells directories of weights apart without reading them whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECES = 16
_PIECE = 1 << 16


def fingerprint(directory: Path) -> dict[str, str]:
    """Return a digest of config.json and of each file of weights (safetensors, or of a checkpoint), by name.

    Of a large file only its size and 16 pieces of 64 KiB, evenly spaced from its beginning to its end, enter: that
    tells other shapes, other names and trained weights apart, in milliseconds.
    """
    patterns = ("config.json", "*.safetensors", "*.distcp")
    return {path.name: _digest(path) for pattern in patterns for path in sorted(directory.glob(pattern))}


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
