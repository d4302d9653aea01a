"""Arguments of MBPP+ as its solutions expect them: its file holds lists in place of tuples, sets and complex numbers.

Which problem wants what is EvalPlus' table (version 0.3.1, MBPP+ v0.2.0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Arguments = list[Any]


def _tuples(arguments: Arguments) -> Arguments:
    return [tuple(argument) for argument in arguments]


def _lists_of_tuples(arguments: Arguments) -> Arguments:
    return [_tuples(argument) for argument in arguments]


def _tuples_of_tuples(arguments: Arguments) -> Arguments:
    return [_deep(argument, depth=2) for argument in arguments]


def _first_list_of_tuples(arguments: Arguments) -> Arguments:
    return [_tuples(arguments[0]), arguments[1]]


def _first_tuple(arguments: Arguments) -> Arguments:
    return [tuple(arguments[0]), *arguments[1:]]


def _second_tuple(arguments: Arguments) -> Arguments:
    return [arguments[0], tuple(arguments[1])]


def _sets(arguments: Arguments) -> Arguments:
    return [[set(item) if isinstance(item, list) and item else {} for item in arguments[0]]]


def _float_and_complex(arguments: Arguments) -> Arguments:
    return [float(arguments[0]), complex(arguments[1])]


def _complex(arguments: Arguments) -> Arguments:
    return [complex(arguments[0])]


def _tuple_with_tuples(arguments: Arguments) -> Arguments:
    return [tuple(tuple(item) if isinstance(item, list) else item for item in arguments[0])]


def _values_tuples(arguments: Arguments) -> Arguments:
    return [{key: tuple(value) for key, value in arguments[0].items()}, *arguments[1:]]


def _all_tuples(arguments: Arguments) -> Arguments:
    return list(_deep(arguments, depth=None))


def _deep(value: Any, depth: int | None) -> Any:
    """Make tuples of lists, `depth` levels of them or all."""
    if not isinstance(value, list) or depth == 0:
        return value
    return tuple(_deep(item, None if depth is None else depth - 1) for item in value)


_RULES: dict[Callable[[Arguments], Arguments], str] = {
    _tuples: "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
    _lists_of_tuples: "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
    _first_list_of_tuples: "75 413 444 753",
    _second_tuple: "106 750",
    _sets: "115",
    _float_and_complex: "124",
    _first_tuple: "250 307 405 446 617 720 763 808",
    _tuples_of_tuples: "259 401 445",
    _complex: "252",
    _tuple_with_tuples: "278",
    _all_tuples: "580 615 791",
    _values_tuples: "722",
}
_RULE_OF = {int(number): rule for rule, numbers in _RULES.items() for number in numbers.split()}


def mbpp_arguments(task_id: str, arguments: Arguments) -> Arguments:
    """Return the arguments of one call of problem `task_id` (`Mbpp/2`)."""
    rule = _RULE_OF.get(int(task_id.rpartition("/")[2]))
    return rule(arguments) if rule else arguments
