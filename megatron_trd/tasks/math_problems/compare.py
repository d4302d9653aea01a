"""Whether two answers are the same: read both forms, compare numbers exactly, leave the rest to a symbolic test."""

from __future__ import annotations

import re

from megatron_trd.tasks.math_problems.brackets import tokens
from megatron_trd.tasks.math_problems.form import Leaf, LeafTest, equal_forms, join_thousands, read_form
from megatron_trd.tasks.math_problems.normalise import normalise
from megatron_trd.tasks.math_problems.quantity import equal_quantities, read_quantity, units_differ

MAX_ANSWER_CHARS = 2000
"""Longer answers, and deeper ones, are right only when they are the gold's own characters."""
MAX_NESTING = 30

_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z][A-Za-z .:'-]*|\d{1,2}(?::\d\d)?\s*[AaPp]\.?\s?[Mm]\.?")


def equal_answers(gold: str, answer: str, equal_expressions: LeafTest | None = None) -> bool | None:
    """Return whether `answer` is `gold`; None when only a symbolic test can tell and there is none.

    Args:
        gold: reference answer, LaTeX or plain, without its box.
        answer: what the response's box holds.
        equal_expressions: decides between two expressions that are no rational numbers.
    """
    if gold.strip() == answer.strip():
        return True
    if any(len(text) > MAX_ANSWER_CHARS or _nesting(text) > MAX_NESTING for text in (gold, answer)):
        return _same_integer(gold, answer)

    def equal_leaves(gold_leaf: str, leaf: str) -> bool | None:
        verdict = _equal_plainly(gold_leaf, leaf)
        return equal_expressions(gold_leaf, leaf) if verdict is None and equal_expressions else verdict

    golds, answers = normalise(gold), normalise(answer)
    forms = read_form(join_thousands(golds)), read_form(join_thousands(answers))
    may_be_list = not re.search(r",0\d", golds + answers)
    if may_be_list and not all(isinstance(form, Leaf) for form in forms):  # beside a list, 1,234 may be one as well
        as_lists = equal_forms(read_form(golds), read_form(answers), equal_leaves)
        if as_lists is not False:
            return as_lists
    return equal_forms(*forms, equal_leaves)


def _same_integer(gold: str, answer: str) -> bool:
    texts = [text.strip().lstrip("0") for text in (gold, answer)]
    return texts[0].isdecimal() and texts[0] == texts[1]


def _nesting(text: str) -> int:
    return max((depth for _, _, depth in tokens(text)), default=0)


def _equal_plainly(gold: str, answer: str) -> bool | None:
    """Decide without algebra: the same characters, words, or rational numbers."""
    if _squeezed(gold) == _squeezed(answer):
        return True
    gold_word, word = _as_word(gold), _as_word(answer)
    if gold_word or word:
        same = gold_word == word
        product_of_letters = r"\text" not in gold + answer and sorted(gold_word or "") == sorted(word or "")
        return None if not same and product_of_letters else same
    golds, answers = read_quantity(gold), read_quantity(answer)
    verdict = equal_quantities(golds, answers)
    return False if verdict is None and units_differ(golds.unit, answers.unit) else verdict


def _squeezed(text: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", _TEXT.sub(r"\1", text)).strip()


def _as_word(text: str) -> str | None:
    """Return words, names and times of day without case, spaces and dots; None for formulas."""
    plain = _TEXT.sub(r"\1", text).strip()
    if not _WORD.fullmatch(plain):
        return None
    word = re.sub(r"[ .'-]", "", plain).casefold()
    return word if len(word) > 3 or word in ("yes", "no") or not word.isalpha() else None
