"""Values as text: what the sandbox sends, and Python literals."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """An object that is no plain data. It equals nothing."""

    type_name: str


def decode(encoded: Any) -> Any:
    """Return the value that `call_driver.encode` made JSON of.

    Raises:
        ValueError, TypeError: it was not made there.
    """
    if not isinstance(encoded, list):
        if isinstance(encoded, (dict, float)):
            raise ValueError("no encoded value")
        return encoded
    match encoded:
        case ["int", str(text)]:
            return int(text, 16)
        case ["float", str(text)]:
            return float.fromhex(text)
        case ["complex", str(real), str(imaginary)]:
            return complex(float.fromhex(real), float.fromhex(imaginary))
        case ["bytes", str(text)]:
            return text.encode("latin-1")
        case ["list", *items]:
            return [decode(item) for item in items]
        case ["tuple", *items]:
            return tuple(decode(item) for item in items)
        case ["set", *items]:
            return {decode(item) for item in items}
        case ["dict", *pairs]:
            return {decode(key): decode(item) for key, item in pairs}
        case ["object", str(name)]:
            return Opaque(name)
    raise ValueError("no encoded value")


def to_literal(value: Any) -> str:
    """Return text from which `parse_literal` makes `value`.

    Raises:
        ValueError: it holds an object that is no plain data.
    """
    match value:
        case bool() | str() | bytes() | complex() | None:
            return repr(value)
        case int():
            return str(value) if abs(value) < 2**63 else hex(value)  # long decimal numbers are refused
        case list():
            return f"[{', '.join(map(to_literal, value))}]"
        case tuple():
            return f"({''.join(f'{to_literal(item)}, ' for item in value)})"
        case set():
            return f"{{{', '.join(map(to_literal, value))}}}" if value else "set()"
        case dict():
            return f"{{{', '.join(f'{to_literal(key)}: {to_literal(item)}' for key, item in value.items())}}}"
        case float():
            return repr(value)
    raise ValueError(f"{value}: has no literal")


def parse_literal(text: str) -> Any:
    """Return the value of a Python literal; `inf` and `nan` are numbers.

    Raises:
        ValueError: it is none.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return ast.literal_eval(_Names().visit(tree) if "inf" in text or "nan" in text else tree)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text[:80]}: is no Python literal ({error})") from error


class _Names(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        value = {"inf": math.inf, "nan": math.nan}.get(node.id)
        return node if value is None else ast.Constant(value)
