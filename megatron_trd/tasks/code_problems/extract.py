"""The program of a response."""

from __future__ import annotations

import re

from megatron_trd.tasks.math_problems.extract import after_thinking

_FENCE = re.compile(r"[ \t]*(?P<marks>`{3,}|~{3,})[ \t]*(?P<tag>[^`\s]*)[^`]*")
_PYTHON = ("python", "python3", "py")


def extract_program(response: str) -> tuple[str | None, bool]:
    """Return (program, whether the response breaks off in its thinking or inside a fence).

    The program is the last fenced block behind the thinking that is marked as Python; without any such, the last block
    without a mark. (Models like to show sample output in unmarked blocks.)
    """
    text = after_thinking(response)
    if text is None:
        return None, True
    blocks: list[tuple[str, str]] = []  # (tag, content)
    fence, tag, start = "", "", 0
    lines = text.split("\n")
    for number, line in enumerate(lines):
        match = _FENCE.fullmatch(line.rstrip("\r"))
        if match is None:
            continue
        if not fence:
            fence, tag, start = match["marks"], match["tag"].lower(), number + 1
        elif match["marks"].startswith(fence) and not match["tag"]:
            blocks.append((tag, "\n".join(lines[start:number]) + "\n"))
            fence = ""
    if fence:
        return None, True
    for wanted in (_PYTHON, ("",)):
        for tag, program in reversed(blocks):
            if tag in wanted and program.strip():
                return program, False
    return None, False


def extract_as_livecodebench(response: str) -> str | None:
    """Return what lies between the last two lines that hold a fence, whatever they open or close."""
    lines = response.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) >= 2 else None
