"""Runs inside the sandbox, alone: calls a function on each input and writes what it returns, as plain data.

/work holds `program.py`, `function` and `inputs.json` (a list of Python literals of tuples of arguments). Each call is
one line of JSON on the descriptor that is the only argument: {"seconds", "value"} or {"seconds", "error"}. Only data
leaves: an object with methods of its own cannot decide here whether it is equal to something.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from types import TracebackType
from typing import Any


class Caught:
    """Notes how a block failed and goes on."""

    error: str | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is not None:
            self.error = f"{kind.__name__}: {error}"[:300]
        return True


def encode(value: Any) -> Any:
    """Return JSON for `value`: [kind, ...] for whatever JSON has no word for. Subclasses count as what they extend."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__int__(value)
        return number if -(2**63) < number < 2**63 else ["int", hex(number)]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).decode("latin-1")]
    sequences: tuple[tuple[str, Any], ...] = (("list", list), ("tuple", tuple), ("set", set), ("set", frozenset))
    for name, kind in sequences:
        if isinstance(value, kind):
            return [name, *map(encode, kind.__iter__(value))]
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(item)] for key, item in dict.items(value))]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist())
    return ["object", type(value).__name__]


def load_function() -> Any:
    """Run the program as a module that is not the main one and return the function."""
    with open("/work/program.py", "rb") as file:
        source = file.read()
    namespace: dict[str, Any] = {"__name__": "program", "__file__": "/work/program.py"}
    try:
        code = compile(source, "/work/program.py", "exec", dont_inherit=True)
    except SyntaxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    exec(code, namespace)
    with open("/work/function") as file:
        return eval(file.read(), namespace)


def main() -> None:
    descriptor = int(sys.argv[1])
    with open("/work/inputs.json") as file:
        inputs = json.load(file)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    function = load_function()
    names = {"__builtins__": {}, "inf": math.inf, "nan": math.nan, "set": set}
    for text in inputs:
        arguments = eval(text, names)
        caught, started = Caught(), time.perf_counter()
        record: dict[str, Any] = {}
        with caught:
            value = function(*arguments)
            record["seconds"] = time.perf_counter() - started
            record["value"] = encode(value)
        if caught.error is not None:
            record = {"seconds": time.perf_counter() - started, "error": caught.error}
        line = memoryview(json.dumps(record).encode() + b"\n")
        while line:
            line = line[os.write(descriptor, line) :]
    os._exit(0)  # threads of the program may still run


main()
