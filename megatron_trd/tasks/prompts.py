"""The words around a problem: template files and their one-pass filling."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_trd.records import Problem

Mode = Literal["opd", "opsd"]

_PLACEHOLDER = re.compile(r"\{(problem|y_o|reference_solution)\}")
_PLACEHOLDERS_OF = {
    "solve": {"problem"},
    "vanilla_opsd": {"problem", "reference_solution"},
    "refine_opd": {"problem", "y_o"},
    "refine_opsd": {"problem", "y_o", "reference_solution"},
}
"""Template file (without .txt) -> every placeholder it must show; none may show another."""


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace `{problem}`, `{y_o}` and `{reference_solution}` in one pass over the template.

    What is filled in is never looked at again, so a y_o that contains `{problem}` stays as it is. All other
    braces of the template are plain text.

    Raises:
        ValueError: the template shows a placeholder that `values` lacks.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            raise ValueError(f"placeholder {{{name}}}: has no value here; use one of {sorted(values)}")
        return values[name]

    return _PLACEHOLDER.sub(value_of, template)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplates:
    """The four templates of a task; each gives the text of one user message."""

    solve_template: str
    """Shown to the student, to the OPD teacher along y_o, and to everyone in evaluation."""
    vanilla_opsd_template: str
    """The OPSD teacher's context along y_o."""
    refine_opd_template: str
    refine_opsd_template: str

    @classmethod
    def load(cls, directory: Path) -> PromptTemplates:
        """Read `solve.txt`, `vanilla_opsd.txt`, `refine_opd.txt` and `refine_opsd.txt`, less a trailing newline each.

        Raises:
            ValueError: a file is missing, lacks a placeholder or shows one that it cannot fill.
        """
        return cls(
            **{f"{name}_template": _read(directory / f"{name}.txt", known) for name, known in _PLACEHOLDERS_OF.items()}
        )

    def solve(self, problem: Problem) -> str:
        """Ask for a solution of x."""
        return fill(self.solve_template, {"problem": problem.prompt})

    def vanilla(self, problem: Problem, mode: Mode) -> str:
        """What the teacher reads before y_o: x alone in OPD, x and y* in OPSD."""
        if mode == "opd":
            return self.solve(problem)
        return fill(self.vanilla_opsd_template, {"problem": problem.prompt, "reference_solution": _reference(problem)})

    def refine(self, problem: Problem, mode: Mode, y_o_text: str, reference_solution: str | None = None) -> str:
        """Ask for y_r: y_o rewritten, in OPSD in the light of y*.

        Args:
            y_o_text: decoded y_o, cut by the caller if it is too long.
            reference_solution: y* if the caller had to cut it too; None = the problem's. OPD never shows it.
        """
        values = {"problem": problem.prompt, "y_o": y_o_text}
        if mode == "opd":
            return fill(self.refine_opd_template, values)
        values["reference_solution"] = _reference(problem) if reference_solution is None else reference_solution
        return fill(self.refine_opsd_template, values)


def _reference(problem: Problem) -> str:
    if problem.reference_solution is None:
        raise ValueError(f"problem {problem.id}: has no reference solution, which --mode opsd needs; use --mode opd")
    return problem.reference_solution


def _read(path: Path, known: set[str]) -> str:
    if not path.is_file():
        raise ValueError(f"--prompt-dir {path.parent}: {path.name} is missing; the files are {_file_names()}")
    text = path.read_text(encoding="utf-8").removesuffix("\n")
    shown = set(re.findall(r"\{([A-Za-z_]\w*)\}", text))
    for name in sorted(shown - known):
        raise ValueError(f"{path}: unknown placeholder {{{name}}}; this file may show {_listed(known)}")
    for name in sorted(known - shown):
        raise ValueError(f"{path}: placeholder {{{name}}} is missing; this file must show {_listed(known)}")
    return text


def _listed(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))


def _file_names() -> str:
    return ", ".join(f"{name}.txt" for name in _PLACEHOLDERS_OF)
