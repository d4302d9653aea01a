"""Is an output right? All of it is decided here, outside the sandbox."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_trd.tasks.code_problems.cases import Oracle

NEED_ARGUMENTS = ("polynomial_root", "pyramid", "digit_distance")
"""Oracles that look at the arguments of a call."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_TOLERANCE = 1e-6
_RELATIVE = 1e-7
"""EvalPlus compares floats by NumPy's rule |a - b| <= atol + 1e-7 |b|."""
_FLOAT_ATOL = 1e-6
"""Its absolute tolerance from the first expected float on, where a problem has none."""


def same_output(expected: str, printed: str) -> bool:
    """Compare printed texts token by token; white space and blank lines do not count.

    A number with a decimal point in the expected text may be off by 1e-6, absolutely or relatively.
    """
    wanted, found = expected.split(), printed.split()
    return len(wanted) == len(found) and all(map(_same_token, wanted, found))


def _same_token(wanted: str, found: str) -> bool:
    if wanted == found:
        return True
    if "." not in wanted or not (_NUMBER.fullmatch(wanted) and _NUMBER.fullmatch(found)):
        return False
    return math.isclose(float(wanted), float(found), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def same_output_as_livecodebench(expected: str, printed: str) -> bool:
    """Compare line by line without the white space around; unequal lines by their numbers, exactly."""
    wanted, found = ([line.strip() for line in text.strip().split("\n")] for text in (expected, printed))
    return len(wanted) == len(found) and all(map(_same_line, wanted, found))


def _same_line(wanted: str, found: str) -> bool:
    try:
        return wanted == found or [*map(Decimal, wanted.split())] == [*map(Decimal, found.split())]
    except InvalidOperation:
        return False


def same_value(expected: Any, returned: Any, atol: float) -> bool:
    """Compare returned values; tuples count as lists, and floats may be off by `atol`."""
    if isinstance(expected, (list, tuple)) and isinstance(returned, (list, tuple)):
        pairs = zip(expected, returned, strict=False)
        return len(expected) == len(returned) and all(same_value(*pair, atol) for pair in pairs)
    if isinstance(expected, dict) and isinstance(returned, dict):
        return expected.keys() == returned.keys() and all(same_value(expected[k], returned[k], atol) for k in expected)
    if isinstance(expected, float) and isinstance(returned, (float, int)):
        return (
            returned == expected or abs(returned - expected) <= atol or (returned != returned and expected != expected)
        )
    return bool(expected == returned)


def same_value_as_livecodebench(expected: Any, returned: Any) -> bool:
    """Python's ==; a tuple counts as a list, the tuples inside it do not."""
    return bool((list(returned) if isinstance(returned, tuple) else returned) == expected)


def same_value_as_evalplus(oracle: Oracle, arguments: Sequence[Any], expected: Any, returned: Any, atol: float) -> bool:
    """Compare as EvalPlus 0.3.1 does for the problem that `oracle` stands for."""
    if oracle == "polynomial_root":
        return abs(_polynomial(arguments[0], returned)) <= atol
    equal = _RULES[oracle](arguments, expected, returned, atol)
    if equal or atol == 0:
        return equal
    return type(expected) is type(returned) and _all_close(expected, returned, atol)


def tolerances_as_evalplus(expected: Sequence[Any], atol: float) -> list[float]:
    """Return each test's tolerance: once floats were expected, all further tests have one."""
    tolerances = []
    for value in expected:
        items = value if isinstance(value, (list, tuple)) and value else [value]
        atol = _FLOAT_ATOL if atol == 0 and all(isinstance(item, float) for item in items) else atol
        tolerances.append(atol)
    return tolerances


def _all_close(expected: Any, returned: Any, atol: float) -> bool:
    if isinstance(expected, (list, tuple)):
        if not isinstance(returned, (list, tuple)) or len(expected) != len(returned):
            return False
        return all(_all_close(*pair, atol) for pair in zip(expected, returned, strict=True))
    if not isinstance(expected, (int, float, complex)) or not isinstance(returned, (int, float, complex)):
        return False
    return expected == returned or abs(returned - expected) <= atol + _RELATIVE * abs(expected)


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    return sum(coefficient * math.pow(x, power) for power, coefficient in enumerate(coefficients))


def _surface_of_pyramid(edge: float, height: float) -> int:
    return round(edge**2 + 2 * edge * math.sqrt((edge / 2) ** 2 + height**2))


def _digit_distance(first: int, second: int) -> int:
    width = max(len(str(first)), len(str(second)))
    digits = (str(number).zfill(width) for number in (first, second))
    return sum(abs(int(one) - int(other)) for one, other in zip(*digits, strict=True))


_RULES: dict[Oracle, Callable[[Sequence[Any], Any, Any, float], bool]] = {
    "python": lambda arguments, expected, returned, atol: bool(returned == expected),
    "anything": lambda arguments, expected, returned, atol: True,
    "or_zero": lambda arguments, expected, returned, atol: returned == expected or returned == 0,
    "same_set": lambda arguments, expected, returned, atol: set(returned) == set(expected),
    "not_none": lambda arguments, expected, returned, atol: (
        returned == expected if isinstance(returned, bool) else expected == (returned is not None)
    ),
    "pyramid": lambda arguments, expected, returned, atol: (
        returned == expected or abs(returned - _surface_of_pyramid(*arguments)) <= atol
    ),
    "digit_distance": lambda arguments, expected, returned, atol: (
        returned == expected or returned == _digit_distance(*arguments)
    ),
}
"""Oracle -> whether a value is right, by (arguments, expected, returned, tolerance)."""
