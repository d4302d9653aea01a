r"""String equality after Hendrycks' normalisation: the rule behind published scores on MATH, AIME and HMMT.

It reads the last `\boxed` of the whole response, thinking included, and calls `73` wrong where the gold is `073`.
Every quirk is kept, for comparison with those scores alone.
"""

from __future__ import annotations

import re


def strict_box(response: str) -> str | None:
    r"""Return what the last `\boxed` holds; None when it never closes, even if an earlier one does."""
    if r"\boxed " in response:
        return response.rpartition(r"\boxed ")[2].split("$")[0]
    start = response.rfind(r"\boxed")
    if start < 0:
        return None  # the rule finds \fbox as well, and then fails to open it
    depth = 0
    for index in range(start, len(response)):
        depth += {"{": 1, "}": -1}.get(response[index], 0)
        if depth == 0 and response[index] == "}":
            box = response[start : index + 1]
            return box[len(r"\boxed{") : -1] if box.startswith(r"\boxed{") else None
    return None


def strictly_equal(gold: str, answer: str) -> bool:
    """Return whether both are the same string once normalised; as they stand if the rule trips over one."""
    try:
        return _strip(gold) == _strip(answer)
    except _TripsError:
        return gold == answer


class _TripsError(Exception):
    pass


def _strip(text: str) -> str:
    for old, new in (("\n", ""), (r"\!", ""), (r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")):
        text = text.replace(old, new)
    for removed in (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$"):
        text = text.replace(removed, "")
    if text.count(r"\text{ ") > 1:
        raise _TripsError
    text = text.split(r"\text{ ")[0].replace(r"\\%", "").replace(r"\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    if text.count("=") == 1 and text.index("=") <= 2:
        text = text.partition("=")[2]
    text = _brace_roots(text).replace(" ", "")
    text = _brace_fractions(text)
    text = r"\frac{1}{2}" if text == "0.5" else text
    quotient = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text)
    return rf"\frac{{{quotient[1]}}}{{{quotient[2]}}}" if quotient else text


def _brace_roots(text: str) -> str:
    if text.endswith(r"\sqrt") or r"\sqrt\sqrt" in text:
        raise _TripsError
    return re.sub(r"\\sqrt(?!\{)(.)", r"\\sqrt{\1}", text)


def _brace_fractions(text: str) -> str:
    first, *rest = text.split(r"\frac")
    if "" in rest:
        raise _TripsError
    out = [first]
    for piece in rest:
        if piece[0] == "{":
            out.append(piece)
        elif len(piece) < 2:
            return text
        else:
            bottom = piece[1:] if piece[1] == "{" else f"{{{piece[1]}}}{piece[2:]}"
            out.append(f"{{{piece[0]}}}{bottom}")
    return r"\frac".join(out)
