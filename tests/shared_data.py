"""Data that lies beside a checkout, not in it: tests that need it are skipped where it is absent."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(name: str) -> Path:
    """Return the path of a shared file or folder; skip the test where it is absent."""
    path = _FOLDER / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


@cache
def _load(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Return the published Qwen3 tokenizer, loaded once; it must not be changed."""
    return _load(shared("qwen_tokenizer"))
