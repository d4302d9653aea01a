"""The hidden tests of LiveCodeBench: JSON, or base64 of zlib of a pickle of JSON text.

A pickle can run code when it is opened. This one may hold a text and nothing else, and no name is ever looked up.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from typing import Any, NoReturn

MAX_BYTES = 2**30
"""Longest decompressed text."""
_DAMAGE = (
    *(binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, AttributeError, ImportError),
    *(IndexError, KeyError, MemoryError, OverflowError, TypeError),
)
"""What opening a damaged or hostile text may raise, besides ValueError."""


class _TextUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_private_tests(text: str) -> Any:
    """Return what the tests' JSON holds.

    Raises:
        ValueError: it is neither form, or its pickle holds something else than a text.
    """
    if text.lstrip().startswith(("[", "{")):
        return json.loads(text)
    try:
        unpacker = zlib.decompressobj()
        packed = unpacker.decompress(base64.b64decode(text, validate=True), MAX_BYTES)
        if not unpacker.eof:
            raise ValueError(f"it is cut off, or longer than {MAX_BYTES} bytes")
        content = _TextUnpickler(io.BytesIO(packed)).load()
    except _DAMAGE as error:
        raise ValueError(f"hidden tests: not base64 of zlib of a pickled text ({error})") from error
    if not isinstance(content, str):
        raise ValueError(f"hidden tests: the pickle holds a {type(content).__name__}, not a text")
    return json.loads(content)
