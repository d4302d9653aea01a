r"""The final answer of a response: what follows the thinking, then the last balanced `\boxed{}`."""

from __future__ import annotations

import re

from megatron_trd.tasks.math_problems.brackets import closing_braces

_BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)")


def after_thinking(response: str) -> str | None:
    """Return the text after the last `</think>`; None when the thinking never ends."""
    answer = response.rpartition("</think>")[2]
    return None if "<think>" in answer else answer


def last_box(text: str) -> str | None:
    r"""Return what the last balanced `\boxed{}` or `\fbox{}` holds, boxes inside it opened; None if there is none."""
    closing = closing_braces(text)
    content, last_end = None, -1
    for match in _BOX.finditer(text):
        end = closing.get(match.end())
        if end is not None and end > last_end:  # a box inside the one before ends earlier
            content, last_end = text[match.end() + 1 : end], end
    return None if content is None else open_boxes(content).strip()


def open_boxes(text: str) -> str:
    r"""Replace every balanced `\boxed{x}` by `x`."""
    closing = closing_braces(text)
    dropped: set[int] = set()
    for match in _BOX.finditer(text):
        if match.end() in closing:
            dropped.update(range(match.start(), match.end() + 1), [closing[match.end()]])
    return "".join(char for index, char in enumerate(text) if index not in dropped)
