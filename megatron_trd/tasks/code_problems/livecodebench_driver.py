"""Runs inside the sandbox, alone: a program the way LiveCodeBench's published harness runs it.

The program's imports and the harness' own come first, everything else becomes the body of one function (so `global`
finds nothing), without its main guard. The function is called once for each test, in this process, with a stand-in for
sys.stdin, and its output is collected in memory. /work holds `program.py` and `inputs.json` (texts). Each test
is one line of JSON on the descriptor that is the only argument: {"output"}, or {"error"}, which is the last.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType, ModuleType, TracebackType
from typing import Any
from unittest.mock import mock_open, patch

NAMES = """string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys
json"""
PRELUDE = "".join(f"from {name} import *\n" for name in [*NAMES.split(), "builtins", "typing"]) + "".join(
    f"import {name}\n" for name in NAMES.split()
)
PRELUDE += "sys.setrecursionlimit(50000)\n"
TEST_S = 6


class TimeLimitError(Exception):
    """A program may catch it and go on, as it may in the harness."""


class Caught:
    """Notes how a block failed and goes on; only what is an Exception."""

    error: str | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        signal.alarm(0)
        if kind is not None and issubclass(kind, Exception):
            self.error = f"{kind.__name__}: {error}"[:300]
        return self.error is not None


class Buffer:
    """sys.stdin.buffer: reading never moves on."""

    def __init__(self, text: str) -> None:
        self._content = text.encode()

    def read(self, *_: object) -> bytes:
        return self._content

    def readline(self, *_: object) -> bytes:
        return self._content.split(b"\n")[0] + b"\n"


class Stdin:
    """sys.stdin: it cannot be iterated, and only readline moves on."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._stream = io.StringIO(text)
        self.buffer = Buffer(text)

    def read(self, *_: object) -> str:
        return self._text

    def readline(self, *arguments: int) -> str:
        return self._stream.readline(*arguments)

    def readlines(self, *_: object) -> list[str]:
        return self._text.split("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def wrap(source: str) -> str:
    """Return the program as a function; as it is, and so with nothing to call, if it does not parse."""
    caught = Caught()
    with caught:
        body = ast.parse(source).body
        if isinstance(body[-1], ast.If) and ast.unparse(body[-1].test).strip() == "__name__ == '__main__'":
            body = body[:-1] + body[-1].body
        imports: list[ast.stmt] = [
            statement for statement in body if isinstance(statement, (ast.Import, ast.ImportFrom))
        ]
        wrapped = ast.parse("def wrapped_function(): pass")
        wrapped.body[0].body = [statement for statement in body if statement not in imports]  # type: ignore[attr-defined]
        return f"{PRELUDE}\n{ast.unparse(ast.Module(imports, []))}\n{ast.unparse(wrapped)}"
    return source


def on_alarm(number: int, frame: FrameType | None) -> None:
    raise TimeLimitError


def run_test(function: Any, text: str) -> str:
    """Return what the function prints."""
    printed = io.StringIO()
    printed.close = lambda: None  # type: ignore[method-assign]
    before, sys.stdout = sys.stdout, printed
    signal.alarm(TEST_S)
    with patch("builtins.open", mock_open(read_data=text)), patch("sys.stdin", Stdin(text)):
        try:
            function()
        except SystemExit:
            pass
        finally:
            signal.alarm(0)
            sys.stdout = before
    return printed.getvalue()


def main() -> None:
    descriptor = int(sys.argv[1])
    with open("/work/inputs.json") as file:
        inputs = json.load(file)
    with open("/work/program.py") as file:
        source = wrap(file.read())

    def send(record: Mapping[str, str]) -> None:
        line = memoryview(json.dumps(record).encode() + b"\n")
        while line:
            line = line[os.write(descriptor, line) :]

    signal.signal(signal.SIGALRM, on_alarm)
    builtins.quit = None  # type: ignore[assignment]  # as in the harness, which leaves exit alone
    module, caught = ModuleType("tmp_sol"), Caught()
    with caught:
        signal.alarm(TEST_S)
        exec(compile(source, "<string>", "exec", dont_inherit=True), module.__dict__)
        function = module.Solution().wrapped_function if "class Solution" in source else module.wrapped_function
    for text in inputs:
        with caught:
            record = {"output": run_test(function, text)} if caught.error is None else {}
        if caught.error is not None:
            send({"error": caught.error})
            return
        send(record)


main()
