"""Tests written as `assert f(1, [2]) == 3`: read as data, never run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_trd.tasks.code_problems.literal import to_literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the tested function and what it must return, as Python literals."""

    function: str
    arguments: str
    """The tuple of arguments."""
    expected: str


def read_asserts(code: str) -> list[Call]:
    """Return the calls that the assertions of a module compare, in order.

    Names that the module binds to literals count as these; keyword arguments are taken in the order they are written
    in, which must be that of the parameters.

    Raises:
        ValueError: the code is no Python, or an assertion is no comparison of a call with literals.
    """
    try:
        module = ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"its tests are no Python: {error}") from error
    return list(_calls(module.body, {}))


def _calls(body: list[ast.stmt], names: dict[str, object]) -> Iterator[Call]:
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                if _is_literal(value, names):
                    names[name] = _literal(value, names)
            case ast.Assert(test=ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[expected])):
                yield _call(call, expected, names)
            case ast.Assert(test=ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call)):
                yield _call(call, ast.Constant(False), names)
            case ast.Assert(test=ast.Call() as call):
                yield _call(call, ast.Constant(True), names)
            case ast.FunctionDef(body=inner):
                yield from _calls(inner, names)
            case ast.Assert() | ast.For() | ast.While() | ast.If() | ast.With() | ast.Try():
                raise ValueError(f"a test is no comparison with a literal: {ast.unparse(statement)[:80]}")


def _call(call: ast.Call, expected: ast.expr, names: dict[str, object]) -> Call:
    function = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    arguments: list[object] = []
    for argument in call.args:
        arguments.append(_literal(argument, names))
    for keyword in call.keywords:
        value = _literal(keyword.value, names)
        if keyword.arg is not None:
            arguments.append(value)
        elif isinstance(value, dict):
            arguments.extend(value.values())
    return Call(
        function=function, arguments=to_literal(tuple(arguments)), expected=to_literal(_literal(expected, names))
    )


def _is_literal(node: ast.expr, names: dict[str, object]) -> bool:
    try:
        _literal(node, names)
    except ValueError:
        return False
    return True


def _literal(node: ast.expr, names: dict[str, object]) -> object:
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:
        raise ValueError(f"a test is no comparison with a literal: {ast.unparse(node)[:80]}") from error
