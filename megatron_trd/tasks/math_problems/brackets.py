"""Brackets of LaTeX text: where each brace closes, and splitting outside of all brackets. One pass, no recursion."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPEN = {"(", "[", "{", r"\{", r"\langle", r"\begin", r"\lfloor", r"\lceil"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle", r"\end", r"\rfloor", r"\rceil"}


def closing_braces(text: str) -> dict[int, int]:
    r"""Return the index of the `}` of every balanced `{`; the escaped `\{` and `\}` are no braces."""
    closing, opened = {}, []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def tokens(text: str) -> Iterator[tuple[int, str, int]]:
    r"""Yield (index, token, depth outside of the token); `(`, `[`, `{`, `\{`, `\begin` open, either bracket closes."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _CLOSE:
            depth -= 1
        yield match.start(), token, depth
        if token in _OPEN:
            depth += 1


def split_outside(text: str, separators: frozenset[str]) -> list[tuple[str, str]]:
    """Split at separators that lie in no bracket; returns (the separator before the piece, the piece stripped)."""
    pieces, start, separator = [], 0, ""
    for index, token, depth in tokens(text):
        if depth == 0 and token in separators:
            pieces.append((separator, text[start:index].strip()))
            start, separator = index + len(token), token
    return [*pieces, (separator, text[start:].strip())]


def outer_brackets(text: str) -> tuple[str, str, str] | None:
    """Return (open, inside, close) when one pair of brackets holds the whole text, e.g. `(0,1]`."""
    spans = list(tokens(text))
    if len(spans) < 2 or spans[0][1] not in _OPEN or spans[-1][1] not in _CLOSE or spans[-1][2] != 0:
        return None
    if any(depth <= 0 for _, _, depth in spans[1:-1]):
        return None
    (_, opening, _), (end, closing, _) = spans[0], spans[-1]
    return opening, text[len(opening) : end].strip(), closing
