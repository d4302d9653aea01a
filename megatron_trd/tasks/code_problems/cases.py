"""What a program is tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Kind = Literal["stdin", "call"]
Oracle = Literal[
    "plain",
    "python",
    "same_set",
    "not_none",
    "or_zero",
    "pyramid",
    "digit_distance",
    "polynomial_root",
    "anything",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTests:
    """The tests of one problem."""

    kind: Kind
    """`stdin`: a program that reads and prints; `call`: a function that is called."""
    inputs: tuple[str, ...]
    """`stdin`: what it reads; `call`: the Python literal of the tuple of arguments."""
    outputs: tuple[str, ...]
    """`stdin`: what it must print; `call`: the Python literal of what it must return. As many as inputs."""
    function: str | None = None
    """`call`: its name, such as `two_sum` or `Solution().twoSum`."""
    setup: str = ""
    """Code in front of the program, such as the imports that a problem's starter code relies on."""
    timeout_s: float = 10.0
    """Seconds for each test."""
    atol: float = 0.0
    """`call`: absolute tolerance of returned floats."""
    oracle: Oracle = "plain"
    """`plain`: printed tokens agree; returned values agree and tuples count as lists. `python`: returned values are
    `==` as EvalPlus means it; the others are EvalPlus' rules for single problems (`compare.py`)."""
    special_judge: bool = False
    """Several outputs are right, which no comparison here decides: such a problem is not scored."""
    num_base: int = 0
    """How many tests, from the first, are the base tests of EvalPlus; 0 = no distinction."""

    def __post_init__(self) -> None:
        _require(self.kind in get_args(Kind), "kind", self.kind, f"use one of {', '.join(get_args(Kind))}")
        _require(self.oracle in get_args(Oracle), "oracle", self.oracle, f"use one of {', '.join(get_args(Oracle))}")
        num_inputs, num_outputs = len(self.inputs), len(self.outputs)
        _require(num_inputs == num_outputs, "outputs", num_outputs, f"there are {num_inputs} inputs; give one for each")
        named = self.function is not None
        _require(named == (self.kind == "call"), "function", self.function, "name it for kind call, and only there")
        _require(self.timeout_s > 0, "timeout_s", self.timeout_s, "give seconds above 0")
        _require(self.atol >= 0, "atol", self.atol, "give 0 or more")
        _require(0 <= self.num_base <= num_inputs, "num_base", self.num_base, f"give 0 to {num_inputs}")

    def as_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads."""
        record = asdict(self)
        return record | {"inputs": list(self.inputs), "outputs": list(self.outputs)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> CodeTests:
        """Read what `as_json` made; fields with a default may be missing.

        Raises:
            ValueError: a field is missing, unknown or holds something else than it should.
        """
        types = {field.name: _TYPES[str(field.type)] for field in fields(cls)}
        for name, value in record.items():
            _require(name in types, name, value, f"no such field; the fields are {', '.join(types)}")
            ok = isinstance(value, types[name]) and isinstance(value, bool) == (types[name] == (bool,))
            _require(ok, name, value, f"give {' or '.join(kind.__name__ for kind in types[name])}")
        for name in ("kind", "inputs", "outputs"):
            _require(name in record, name, "(missing)", "the tests of a problem need it")
        texts = {name: tuple(record[name]) for name in ("inputs", "outputs")}
        for name, values in texts.items():
            _require(all(isinstance(value, str) for value in values), name, values, "give texts")
        _require(bool(texts["inputs"]) or record.get("special_judge") is True, "inputs", 0, "give at least one test")
        return cls(**{**record, **texts})


_TYPES: dict[str, tuple[type, ...]] = {
    "Kind": (str,),
    "Oracle": (str,),
    "str": (str,),
    "str | None": (str, type(None)),
    "tuple[str, ...]": (list, tuple),
    "float": (float, int),
    "int": (int,),
    "bool": (bool,),
}


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"tests: {name} {str(value)[:80]}: {remedy}")
