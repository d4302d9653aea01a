"""Algebra on two expressions, with Math-Verify's LaTeX parser. May run for ever: only worker processes import it."""

from __future__ import annotations

import random
import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify

from megatron_trd.tasks.math_problems.brackets import closing_braces
from megatron_trd.tasks.math_problems.quantity import read_quantity

_DIGITS = 60
"""Decimal digits of a numeric evaluation; two values agree when 40 of them do."""
_AGREEMENT = sympy.Float("1e-40", _DIGITS)
_DIGITS_OF_DIFFERENCE = 1000
"""Tells e^{100} from e^{100} + 1."""
_POINTS = 8
_UNEVALUATED = (sympy.UnevaluatedExpr, sympy.Sum, sympy.Product, sympy.Integral)
_WHOLE_NUMBERS = frozenset("nmkNMK")
"""Variables that stand for positive integers by custom."""
_NOT_ALGEBRA = re.compile(
    r"\^\s*\{(?:T|\\top|\\prime|\*)\}|'|\\(?:text|mathbb|pmod|bmod|equiv|%|[lcd]?dots|approx)|(?<!_)\d \d|\.\.|:"
)
_DECIMAL = re.compile(r"(?<![\w.])(\d*)\.(\d+)")
_DEGREES = re.compile(r"(\d+|\([^()]*\))\s*\^\\circ")
_PRODUCTS = (  # the parser adds numbers that stand side by side: 2(3) would be 2 + 3
    (re.compile(r"(?<![\w_{.}])(\d+)\s*(\\frac\{\d+\}\{\d+\})"), r"(\1+\2)"),
    (re.compile(r"(\w|\([^()]*\))!\s*(?=\^)"), r"(\1!)"),
    (re.compile(r"\)\s*(?=[\d(]|\\frac|\\binom)"), r")\\cdot "),
    (re.compile(r"(?<![\w_{.}])(\d+)\s*(?=\(|\\binom)"), r"\1\\cdot "),
)
_QUOTIENT = re.compile(r"\\(?:frac|binom)(?=\{)")
_FACTOR = re.compile(r"\s*(?:[\d({]|\\frac|\\binom)")
_PARSER = ConversionConfig(lowercase_symbols=False)


class UnreadableError(ValueError):
    """The parser has no reading of a text."""


def equal_expressions(gold: str, answer: str) -> bool:
    """Return whether two normalised expressions are the same; False when one of them cannot be read."""
    try:
        left, right = _read(read_quantity(gold).bare), _read(read_quantity(answer).bare)
    except UnreadableError:
        return False
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return _equal_values(left, right)
    if isinstance(left, sympy.Eq) and isinstance(right, sympy.Eq):
        return _same_equation(left, right)
    if isinstance(left, sympy.Expr) or isinstance(right, sympy.Expr):
        return False
    if isinstance(left, sympy.FiniteSet) != isinstance(right, sympy.FiniteSet):
        return False  # Math-Verify calls the interval (1,2) and the set {1,2} equal
    return verify(left, right, timeout_seconds=None, allow_set_relation_comp=True)


@lru_cache(maxsize=256)
def _read(text: str) -> Any:
    if _NOT_ALGEBRA.search(text):
        raise UnreadableError(text)
    text = _DECIMAL.sub(lambda match: rf"(\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}})", text)
    text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    for pattern, product in _PRODUCTS:
        text = pattern.sub(product, text)
    text = _multiply_quotients(text)
    try:
        parsed = latex2sympy(text, normalization_config=None, conversion_config=_PARSER)
    except Exception as error:  # the parser raises bare Exceptions
        raise UnreadableError(text) from error
    if not isinstance(parsed, sympy.Basic):
        raise UnreadableError(text)
    parsed = parsed.subs({symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"})
    return parsed.replace(_is_odd_root_of_negative, lambda power: -((-power.base) ** power.exp))


def _multiply_quotients(text: str) -> str:
    r"""Put `\cdot` behind every `\frac{}{}` and `\binom{}{}` that another number follows."""
    closing, ends = closing_braces(text), []
    for match in _QUOTIENT.finditer(text):
        end = closing.get(closing.get(match.end(), -2) + 1, -1) + 1
        if end and _FACTOR.match(text, end):
            ends.append(end)
    for end in sorted(ends, reverse=True):
        text = rf"{text[:end]}\cdot {text[end:]}"
    return text


def _is_odd_root_of_negative(expression: Any) -> bool:
    exponent = expression.exp if expression.is_Pow else sympy.Integer(1)
    return exponent.is_Rational and exponent.p == 1 and exponent.q % 2 == 1 < exponent.q and expression.base.is_negative


def _equal_values(left: Any, right: Any) -> bool:
    """Compare at random points: whole numbers for n, m, k and where the expression needs them, else all kinds."""
    if left == right:
        return True
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if left.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) or right.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan):
        return False
    if not symbols:
        return _agree(_value(left, {}), _value(right, {})) and _vanishes(_evaluated(left - right))
    points = _points(symbols, whole=_needs_whole_numbers(left) or _needs_whole_numbers(right))
    pairs = [(value, _value(right, point)) for point in points if (value := _value(left, point)) is not None]
    real = [pair for pair in pairs if pair[0].is_real]
    chosen = real if len(real) >= min(3, len(pairs)) else pairs  # where the gold is real lies its domain
    return bool(chosen) and all(_agree(*pair) for pair in chosen)


def _vanishes(difference: Any) -> bool:
    parts = difference.evalf(5, maxn=_DIGITS_OF_DIFFERENCE).as_real_imag()
    return all(part == 0 or (part.is_Float and part._prec == 1) for part in parts)


def _needs_whole_numbers(expression: Any) -> bool:
    kinds = (sympy.factorial, sympy.binomial, sympy.gamma, sympy.Sum, sympy.Product)
    return expression.has(*kinds) or any(
        power.base.is_negative and power.exp.free_symbols for power in expression.atoms(sympy.Pow)
    )


def _points(symbols: list[Any], *, whole: bool) -> list[dict[Any, Any]]:
    rng = random.Random(" ".join(map(str, symbols)))

    def draw(symbol: Any, index: int) -> Any:
        if whole or symbol.name in _WHOLE_NUMBERS or index % 4 == 3:
            return sympy.Integer(rng.randint(2, 9 + 3 * index))
        sign = 1 if index % 2 else rng.choice((1, -1))
        return sign * sympy.Rational(rng.randint(101, 997), rng.choice((211, 307, 401)))

    return [{symbol: draw(symbol, index) for symbol in symbols} for index in range(_POINTS)]


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """Evaluate with `_DIGITS` digits; None where there is no finite number."""
    if expression.has(*_UNEVALUATED):
        expression = expression.subs(point).doit()
    value = expression.evalf(_DIGITS, subs=point)
    value = value if not value.free_symbols else expression.subs(point).evalf(_DIGITS)
    return value if value.is_number and value.is_finite and not value.free_symbols else None


def _evaluated(expression: Any) -> Any:
    return expression.doit() if expression.has(*_UNEVALUATED) else expression


def _agree(left: Any, right: Any) -> bool:
    if left is None or right is None:
        return False
    sizes = [0 if value.is_Float and value._prec == 1 else abs(value) for value in (left, right)]
    if 0 in sizes:
        return sizes[0] == sizes[1]
    return bool(abs(left - right) <= _AGREEMENT * max(sizes))


def _same_equation(left: Any, right: Any) -> bool:
    """Two equations are the same when one is a constant multiple of the other."""
    first, second = left.lhs - left.rhs, right.lhs - right.rhs
    if first.free_symbols != second.free_symbols:
        return False
    points = _points(sorted(first.free_symbols, key=str), whole=_needs_whole_numbers(first))
    pairs = [(_value(first, point), _value(second, point)) for point in points]
    ratios = [one / other for one, other in pairs if one is not None and other]
    return len(ratios) >= 3 and all(_agree(ratios[0], ratio) for ratio in ratios)
