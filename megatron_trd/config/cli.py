"""Command line and YAML for the configuration tree: the only place that knows `argparse` and `yaml`.

Flags are generated from `schema.py`. Precedence: defaults < `--config run.yaml` < flags. The YAML file is nested
by section, exactly as `to_yaml` writes it, so the configuration saved with a run is itself a valid `--config`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import os
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

import yaml

from megatron_trd.config.schema import Config

_CONFIG_HELP = "YAML file with values underneath the flags, nested by section as the saved `config.yaml` of a run."
_PACKAGES = ("megatron_trd", "trd_kernels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One field of the tree (or one extra of a main) as a flag."""

    section: str | None
    """Section of the tree; None for an extra."""
    name: str
    kind: type
    """bool, int, float, str or tuple (of strings)."""
    choices: tuple[str, ...] = ()
    optional: bool = False
    """Accepts `none`, which stands for unset."""
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def key(self) -> str:
        """The name in the YAML file."""
        return f"{self.section}.{self.name}"

    @property
    def expects(self) -> str:
        """What a value must be, as a remedy."""
        if self.choices:
            what = "use one of " + ", ".join(self.choices)
        else:
            kinds = {bool: "true or false", int: "an integer", float: "a number", tuple: "a list of strings"}
            what = "give " + kinds.get(self.kind, "a string")
        return what + (", or none for unset" if self.optional else "")

    def parse(self, raw: Any, where: str) -> Any:
        """Return `raw` (text of a flag, or a YAML value) as the field's type; ValueError names `where`."""
        if raw is None or (raw == "none" and "none" not in self.choices):
            if self.optional:
                return None
        elif self.kind is tuple:
            if isinstance(raw, list) and all(isinstance(item, str) for item in raw):
                return tuple(raw)
        elif self.kind in (bool, str):
            if isinstance(raw, self.kind) and (not self.choices or raw in self.choices):
                return raw
        elif isinstance(raw, (str, int, float)) and not isinstance(raw, bool):
            # YAML reads 5e-6 as a string: float() takes it.
            try:
                value = self.kind(raw)
            except (ValueError, OverflowError):
                value = None
            if value is not None and (isinstance(raw, str) or value == raw):
                return value
        raise ValueError(f"{where} {raw}: {self.expects}")


def flags() -> tuple[Flag, ...]:
    """Return every field of the tree as a flag, in order; names are unique over the tree."""
    found = [
        _flag(section, field.name, hint, field.default, helps[field.name])
        for section, cls in sections().items()
        for helps, hints in [(_field_docstrings(cls), typing.get_type_hints(cls))]
        for field in dataclasses.fields(cls)
        for hint in [hints[field.name]]
    ]
    names = [flag.name for flag in found]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"fields in more than one section: {sorted(twice)}"
    return tuple(found)


def sections() -> dict[str, type]:
    """Return the section dataclasses by their name in the tree."""
    return typing.get_type_hints(Config)


def section_title(cls: type) -> str:
    """Return the first line of a section's docstring."""
    return inspect.cleandoc(cls.__doc__ or "").splitlines()[0]


Extra = Mapping[str, tuple[Any, Any, str]]


@overload
def parse_config(
    argv: Sequence[str] | None = None, *, description: str = "", extra: None = None
) -> Config: ...  # pragma: no cover
@overload
def parse_config(
    argv: Sequence[str] | None = None, *, description: str = "", extra: Extra
) -> tuple[Config, argparse.Namespace]: ...  # pragma: no cover


def parse_config(
    argv: Sequence[str] | None = None, *, description: str = "", extra: Extra | None = None
) -> Config | tuple[Config, argparse.Namespace]:
    """Build the configuration from flags and the YAML file they name.

    A wrong flag, key or value ends the process with one line on stderr and exit code 2.

    Args:
        argv: arguments without the program's name; None = `sys.argv[1:]`.
        extra: flags of this main that are not part of the tree: name -> (type, default, help). They are returned
            as a namespace beside the configuration.
    """
    tree = flags()
    extras = tuple(_flag(None, name, *rest) for name, rest in (extra or {}).items())
    with exit_on_value_error():
        parser = _parser(tree, extras, description)
        given, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(_unknown_flag(unknown[0], ["--config", *(f.flag for f in (*tree, *extras))]))
        texts = {name: value for name, value in vars(given).items() if name != "config"}
        from_flags = {flag.name: flag.parse(texts[flag.name], flag.flag) for flag in tree if flag.name in texts}
        from_yaml = _read_yaml(given.config, tree) if given.config else {}
        config = _build(tree, from_yaml, from_flags, given.config)
        if extra is None:
            return config
        values = {f.name: f.parse(texts[f.name], f.flag) if f.name in texts else f.default for f in extras}
        return config, argparse.Namespace(**values)


def to_yaml(config: Config) -> str:
    """Return the whole tree as YAML, nested by section; `--config` reads it back."""
    tree = {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def save_resolved(config: Config, path: str | Path) -> None:
    """Write `to_yaml(config)` to a file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(to_yaml(config), encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def exit_on_value_error() -> Iterator[None]:
    """Turn a ValueError of the project's own code into one line on stderr and exit code 2.

    Those name a flag or a file and a remedy. A ValueError raised inside a library keeps its traceback.
    """
    try:
        yield
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        origin = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
        if origin != "__main__" and origin.split(".")[0] not in _PACKAGES:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def _flag(section: str | None, name: str, hint: Any, default: Any, help: str) -> Flag:
    options = typing.get_args(hint)
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) in options
    if optional:
        (hint,) = (option for option in options if option is not type(None))
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    kind = str if choices else typing.get_origin(hint) or hint
    assert kind in (bool, int, float, str, tuple), f"{name}: no flag for a field of type {hint}"
    return Flag(section=section, name=name, kind=kind, choices=choices, optional=optional, default=default, help=help)


def _field_docstrings(cls: type) -> dict[str, str]:
    """Read the string under each field of a dataclass, which Python itself does not keep."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for pair in itertools.pairwise(tree.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def _parser(tree: Sequence[Flag], extras: Sequence[Flag], description: str) -> argparse.ArgumentParser:
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", default=None, help=_CONFIG_HELP)
    groups: dict[str | None, Any] = {None: parser}
    for section, cls in sections().items():
        groups[section] = parser.add_argument_group(section, section_title(cls))
    for flag in (*extras, *tree):
        default = " ".join(flag.default) if isinstance(flag.default, tuple) else flag.default
        shown = "" if default in (None, "") else f" [{default}]"
        options: dict[str, Any] = {"help": flag.help.replace("%", "%%") + shown}
        if flag.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            metavars = {int: "N", float: "X", tuple: "TEXT"}
            options["metavar"] = "{" + ",".join(flag.choices) + "}" if flag.choices else metavars.get(flag.kind, "TEXT")
            options["nargs"] = "+" if flag.kind is tuple else None
        groups[flag.section].add_argument(flag.flag, **options)
    return parser


def _unknown_flag(argument: str, known: Sequence[str]) -> str:
    if not argument.startswith("-"):
        return f"{argument}: there are no positional arguments; flags start with --"
    name = argument.split("=")[0]
    return f"{name}: unknown flag" + _did_you_mean(name, {flag: flag for flag in known})


def _did_you_mean(name: str, known: Mapping[str, str]) -> str:
    """Suggest the nearest of `known`: what a user may have meant -> how to write it."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {known[nearest[0]]}?" if nearest else "; --help lists them"


def _read_yaml(path: str, tree: Sequence[Flag]) -> dict[str, Any]:
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}; give a readable YAML file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    known = {flag.key: flag for flag in tree}
    right_places = {flag.name: flag.key for flag in tree} | {section: section for section in sections()}
    values: dict[str, Any] = {}
    for section, entries in _mapping(document, path).items():
        if section not in sections():
            raise ValueError(f"{path}: {section}: unknown section{_did_you_mean(str(section), right_places)}")
        for name, raw in _mapping(entries, f"{path}: {section}").items():
            key = f"{section}.{name}"
            if key not in known:
                raise ValueError(f"{path}: {key}: unknown key{_did_you_mean(str(name), right_places)}")
            values[name] = known[key].parse(raw, f"{path}: {key}")
    return values


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: {value!r} is not a mapping; nest `name: value` lines by section")
    return value or {}


def _build(tree: Sequence[Flag], from_yaml: dict[str, Any], from_flags: dict[str, Any], path: str | None) -> Config:
    values = from_yaml | from_flags
    try:
        return Config(
            **{
                section: cls(**{f.name: values[f.name] for f in tree if f.section == section and f.name in values})
                for section, cls in sections().items()
            }
        )
    except ValueError as error:
        only_in_file = {flag.flag for flag in tree if flag.name in from_yaml.keys() - from_flags.keys()}
        if str(error).split(" ")[0] in only_in_file:
            raise ValueError(f"{error} (set in {path})") from error
        raise
