"""The form of an answer: one expression, or a list, set, tuple, interval or matrix of expressions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_trd.tasks.math_problems.brackets import outer_brackets, split_outside, tokens

_COMMAS = frozenset(",;")
_RELATIONS = frozenset(("<", ">", r"\le", r"\ge"))
_NAME = re.compile(r"\\?[a-zA-Z]+(?:_\{?[^{}=]*\}?)?(?:\([a-zA-Z, ]*\))?|\\(?:text|angle|overline)\b[^=]*")
_VARIABLE = re.compile(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\([a-z]\))?")
_MATRIX = re.compile(r"\\begin\{[pb]?matrix\}(.*)\\end\{[pb]?matrix\}", re.DOTALL)
_THOUSANDS = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d]|,\d)")
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
_WRAPPED = re.compile(r"\\text\{\s*(\d[^{}]*|[^{}]*[(,][^{}]*)\}")
_MAX_SIGNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One expression."""

    text: str
    name: str = ""
    """Left side of `x = 5` or `f(x) = 2x`, without spaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Several answers in one."""

    kind: str
    """`list` (unions too), `set`, `matrix 2x2`, or the brackets of a tuple or interval: `()`, `[)`, ..."""
    items: tuple[Form, ...]
    text: str
    name: str = ""


Form = Leaf | Group


def read_form(text: str) -> Form:
    r"""Read the form of a normalised answer; `1 \pm x` becomes a list of two, `0 < x \le 1` the interval `(0,1]`.

    `(0,1)` may be a point or an interval: both are the brackets `()` around two items.
    """
    text = text.strip()
    text = wrapped[1].strip() if (wrapped := _WRAPPED.fullmatch(text)) else text
    pieces = [piece for _, piece in split_outside(text, frozenset((*_COMMAS, r"\cup"))) if piece]
    if len(pieces) > 1 or (len(_signs(text)) > 1 and outer_brackets(text) is None):
        return _flat("list", tuple(read_form(signed) for piece in pieces for signed in _signs(piece)), text)
    return _read_brackets(text) or _read_relation(text) or Leaf(text=text)


def join_thousands(text: str) -> str:
    """Return `text` with `1,234` read as 1234 where no bracket makes the commas separators of a tuple or a set."""
    if outer_brackets(text) or not _THOUSANDS.search(text):
        return text
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def _signs(text: str) -> list[str]:
    count = text.count(r"\pm")
    if not 0 < count <= _MAX_SIGNS:
        return [text]
    parts = [part.strip() for part in text.split(r"\pm")]
    return [
        parts[0] + "".join(sign + part for sign, part in zip(signs, parts[1:], strict=True))
        for signs in itertools.product("+-", repeat=count)
    ]


def _flat(kind: str, items: tuple[Form, ...], text: str) -> Group:
    inner = [item.items if isinstance(item, Group) and item.kind == "list" else (item,) for item in items]
    return Group(kind=kind, items=tuple(itertools.chain(*inner)), text=text)


def _read_brackets(text: str) -> Form | None:
    if text == r"\mathbb{R}":
        return read_form(r"(-\infty,\infty)")
    if text == r"\emptyset":
        return Group(kind="set", items=(), text=text)
    if matrix := _MATRIX.fullmatch(text):
        rows = [[cell.strip() for cell in row.split("&")] for row in matrix[1].split(r"\\") if row.strip()]
        cells = tuple(read_form(cell) for row in rows for cell in row)
        return Group(kind=f"matrix {len(rows)}x{len(rows[0]) if rows else 0}", items=cells, text=text)
    brackets = outer_brackets(text)
    if brackets is None:
        return None
    opening, inside, closing = brackets
    pieces = [piece for _, piece in split_outside(inside, _COMMAS) if piece]
    if opening == r"\{" and closing == r"\}" and not re.search(r"[|:<>=]|\\mid|\\[lg]e", inside):
        return _flat("set", tuple(read_form(signed) for piece in pieces for signed in _signs(piece)), text)
    opening, closing = opening.replace(r"\langle", "("), closing.replace(r"\rangle", ")")
    if len(pieces) > 1 and opening in "([" and closing in ")]":
        return Group(kind=opening + closing, items=tuple(map(read_form, pieces)), text=text)
    if opening in ("(", "{") and len(pieces) == 1:
        return read_form(inside)
    return None


def _read_relation(text: str) -> Form | None:
    found = {token for _, token, depth in tokens(text) if depth == 0} & {"=", r"\in", r"\approx", *_RELATIONS}
    if r"\in" in found:
        (_, left), (_, right), *rest = split_outside(text, frozenset((r"\in",)))
        return _named(read_form(right), left) if not rest and _VARIABLE.fullmatch(left) else None
    if "=" in found and not found & _RELATIONS:
        pieces = [piece for _, piece in split_outside(text, frozenset("="))]
        if _VARIABLE.fullmatch(pieces[-1]) and not _VARIABLE.fullmatch(pieces[0]):
            pieces.reverse()  # 5 = x
        if all(pieces) and _NAME.fullmatch(pieces[0]):
            return _named(read_form(pieces[-1]), pieces[0])  # x = 1 + 1 = 2
        if all(pieces) and (len(pieces) > 2 or not _LETTER.search(pieces[0])):  # 6^2 = 36
            return read_form(pieces[-1])
        return None
    if r"\approx" in found and not text.startswith(r"\approx"):
        return read_form(split_outside(text, frozenset((r"\approx",)))[0][1])
    return _read_inequality(text) if found & _RELATIONS else None


def _read_inequality(text: str) -> Form | None:
    pieces = split_outside(text, _RELATIONS)
    values, relations = [value for _, value in pieces], [relation for relation, _ in pieces[1:]]
    if relations[0] in (">", r"\ge"):
        values, relations = values[::-1], [{">": "<", r"\ge": r"\le"}.get(sign, "") for sign in relations[::-1]]
    if len(values) == 2:
        if _VARIABLE.fullmatch(values[0]):
            values, relations = [r"-\infty", *values], ["<", *relations]
        elif _VARIABLE.fullmatch(values[1]):
            values, relations = [*values, r"\infty"], [*relations, "<"]
    if len(values) != 3 or not set(relations) <= {"<", r"\le"} or not _VARIABLE.fullmatch(values[1]):
        return None
    low, variable, high = values
    kind = ("(" if relations[0] == "<" else "[") + (")" if relations[1] == "<" else "]")
    return Group(kind=kind, items=(read_form(low), read_form(high)), text=text, name=variable)


def _named(form: Form, name: str) -> Form:
    name = re.sub(r"\s", "", name)
    if isinstance(form, Leaf):
        return Leaf(text=form.text, name=name)
    return Group(kind=form.kind, items=form.items, text=form.text, name=name)


LeafTest = Callable[[str, str], bool | None]
"""(gold, answer) -> equal, different or, None, not decided."""


def equal_forms(gold: Form, answer: Form, equal_leaves: LeafTest) -> bool | None:
    """Compare two forms item by item; lists and sets in any order.

    A tuple, a set and an interval never equal each other, nor does a bare list equal a tuple; a bare list may
    stand for a set. `x = 5` equals `5` and not `y = 5`.
    """
    if gold.name and answer.name and gold.name != answer.name:
        return (gold.name, gold.text) == (answer.text, answer.name)  # AB = AC is AC = AB
    if isinstance(gold, Leaf) and isinstance(answer, Leaf):
        return equal_leaves(_beside(gold, answer), _beside(answer, gold))
    golds, answers = _items(gold), _items(answer)
    kinds = {_kind(gold), _kind(answer)}
    if kinds <= {"set", "list", "leaf"}:
        return _equal_unordered(golds, answers, equal_leaves)
    if "leaf" in kinds:
        return equal_leaves(gold.text, answer.text)
    if len(kinds) > 1 or len(golds) != len(answers):
        return False
    return _all(equal_forms(left, right, equal_leaves) for left, right in zip(golds, answers, strict=True))


def _beside(leaf: Leaf, other: Leaf) -> str:
    """Return the text of a leaf, with its name when the other one is an equation: `y = 2x` beside `2x - y = 0`."""
    return f"{leaf.name} = {leaf.text}" if leaf.name and "=" in other.text else leaf.text


def _kind(form: Form) -> str:
    return form.kind if isinstance(form, Group) else "leaf"


def _items(form: Form) -> tuple[Form, ...]:
    return form.items if isinstance(form, Group) else (form,)


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided |= verdict is None
    return None if undecided else True


def _equal_unordered(golds: Sequence[Form], answers: Sequence[Form], equal_leaves: LeafTest) -> bool | None:
    """Every gold has its answer and every answer its gold; how often one is named does not matter."""
    table = [[equal_forms(gold, answer, equal_leaves) for answer in answers] for gold in golds]
    rows = [_any(row) for row in table]
    columns = [_any([row[column] for row in table]) for column in range(len(answers))]
    return _all([*rows, *columns])


def _any(verdicts: Sequence[bool | None]) -> bool | None:
    if any(verdicts):
        return True
    return None if None in verdicts else False
