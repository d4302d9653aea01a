"""The published rule of AMO-Bench: its extraction, then Math-Verify in both directions with four decimals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

_PREFIXES = tuple(  # the first of them that occurs, not the last
    f"{sign}{article}final answer{verb}{colon}"
    for sign in ("### ", "")
    for colon in (":", "")
    for article in ("the ", "")
    for verb in (" is", "")
)
_SIZES = re.compile(r"\\(?:[bB]igg?[lr]?(?![a-zA-Z])|left|right)")
_PUNCTUATION = str.maketrans(
    {
        **{"‘": "'", "’": "'", "“": '"', "”": '"', "（": "(", "）": ")", "，": ", ", "：": ": ", "；": "; "},
        **{"。": ". ", "！": "! ", "？": "? ", "…": "...", "–": "-", "−": "-"},
    }
)
_NUMBER_DECIMALS = 4
_POINT_DECIMALS = 8


def equal_by_amo(gold: str, answer: str, answer_type: str, points: Sequence[dict[str, int]]) -> bool:
    """Return whether AMO-Bench's parser would accept a response.

    Args:
        gold: reference answer, with or without its box.
        answer: the response after its thinking.
        answer_type: `number`, `set` or `variable`.
        points: values of the variables at which a `variable` answer must agree to 8 decimals.

    Raises:
        ValueError: a `variable` answer without points.
    """
    if answer_type == "variable" and not points:
        raise ValueError("points: none given; a variable answer is compared at points such as {'n': 1}")
    gold = gold if r"\boxed" in gold else rf"\boxed{{{gold}}}"
    full = extract_by_amo(answer, answer_type)
    for text in dict.fromkeys((full, full.split(r"\medskip")[0].split("\n---")[0].strip())):
        parsed_gold, parsed = parse(gold, parsing_timeout=None), parse(text, parsing_timeout=None)
        if answer_type == "variable":
            if parsed and _equal_at(points, parsed_gold[-1], parsed[-1]):
                return True
        elif _equal_either_way(parsed_gold, parsed, _NUMBER_DECIMALS):
            return True
        elif parsed and "=" in str(parsed[-1]):
            last = parse(rf"\boxed{{{str(parsed[-1]).rpartition('=')[2]}}}", parsing_timeout=None)
            if _equal_either_way(parsed_gold, last, _NUMBER_DECIMALS):
                return True
    return False


def extract_by_amo(answer: str, answer_type: str) -> str:
    """Return what follows the last "### The final answer is:", cleaned as AMO-Bench cleans it."""
    text = answer.replace("：", ": ").strip()
    prefix = next((prefix for prefix in _PREFIXES if prefix in text.lower()), None)
    if prefix is not None:
        text = text[len(text) - len(text.lower().rpartition(prefix)[2]) :].strip()
    text = _SIZES.sub("", text).translate(_PUNCTUATION)
    text = re.sub(r"[ .]+\}", "}", text) if re.search(r" \}|\.\}", text) else text
    text = text.replace(r"\,", "").replace(r"\;", "").replace("\n", " ")
    if answer_type != "set":
        text = text.replace(",", "").replace(r"\{", "(").replace(r"\}", ")").replace(r"\[", "(").replace(r"\]", ")")
    return text.strip()


def _equal_either_way(gold: Any, answer: Any, decimals: int) -> bool:
    options = {"float_rounding": decimals, "timeout_seconds": None}
    return verify(gold, answer, **options) or verify(answer, gold, **options)


def _equal_at(points: Sequence[dict[str, int]], gold: str, answer: str) -> bool:
    expressions = []
    for text in (gold, re.split(r"\\q?quad", answer)[0]):
        parsed = parse(rf"\boxed{{{text.rpartition('=')[2]}}}", parsing_timeout=None)
        if not parsed or not hasattr(parsed[0], "evalf"):
            return False
        expressions.append(parsed[0])
    for point in points:
        values = [
            expression.subs({symbol: point[symbol.name] for symbol in expression.free_symbols if symbol.name in point})
            for expression in expressions
        ]
        if not _equal_either_way(values[0].evalf(), values[1].evalf(), _POINT_DECIMALS):
            return False
    return True
