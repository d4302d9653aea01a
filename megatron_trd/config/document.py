"""Writes the reference of all flags: `python -m megatron_trd.config.document > docs/configuration.md`."""

from __future__ import annotations

import sys
from typing import Any

from megatron_trd.config.cli import Flag, flags, section_title, sections

_PREFACE = """# Configuration

Generated from `megatron_trd/config/schema.py` by `python -m megatron_trd.config.document > docs/configuration.md`;
a test keeps it current.

Values come from, in rising precedence: the defaults below, a YAML file given with `--config run.yaml`, flags. The
file is nested by section: the heading is the section, the key is the flag with underscores. A run saves its resolved
configuration as `config.yaml` in its run directory, and that file is itself a valid `--config`. Flags cannot be
abbreviated. Where the default is unset, `none` on the command line unsets what the file sets.
"""


def render() -> str:
    """Return the reference as Markdown: one table per section."""
    parts = [_PREFACE]
    for section, cls in sections().items():
        rows = [_row(flag) for flag in flags() if flag.section == section]
        head = f"## `{section}`\n\n{section_title(cls)}\n\n| flag | value | default | meaning |\n|---|---|---|---|\n"
        parts.append(head + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(flag: Flag) -> str:
    name = f"`{flag.flag}`" + (f", `--no-{flag.flag[2:]}`" if flag.kind is bool else "")
    kinds = {bool: "switch", int: "integer", float: "number", str: "text", tuple: "texts, space-separated"}
    value = ", ".join(f"`{choice}`" for choice in flag.choices) or kinds[flag.kind]
    return f"| {name} | {value} | {_default(flag.default)} | {flag.help.replace('|', '&#124;')} |"


def _default(value: Any) -> str:
    if value in (None, "", ()):
        return "unset"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(render())
