from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_trd.config.schema import DataConfig
from megatron_trd.records import Problem
from megatron_trd.tasks import TASKS
from megatron_trd.tasks.prompts import PromptTemplates, fill

PROBLEM = Problem(id="p-7", prompt="17 +3", answer="20", reference_solution="+3 20 # 20")
WITHOUT_REFERENCE = Problem(id="p-8", prompt="17 +3", answer="20")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the toy's templates that a test may spoil."""
    return Path(shutil.copytree(TASKS["arithmetic"](DataConfig()).template_dir, tmp_path / "prompts"))


def test_fill_never_reads_what_it_filled_in() -> None:
    hostile = r"{problem} {reference_solution} {y_o} \1 \g<0> {} {0} R A"
    assert fill("<{y_o}|{problem}|{y_o}>", {"y_o": hostile, "problem": "{y_o}"}) == f"<{hostile}|{{y_o}}|{hostile}>"


def test_fill_leaves_other_braces_alone() -> None:
    assert fill(r"\boxed{} {{problem}} { y_o }", {"problem": "x"}) == r"\boxed{} {x} { y_o }"


def test_fill_without_a_value_names_the_placeholder() -> None:
    with pytest.raises(ValueError, match=r"\{y_o\}"):
        fill("{problem} {y_o}", {"problem": "x"})


def test_toy_templates_render_the_four_formats(directory: Path) -> None:
    templates = PromptTemplates.load(directory)
    assert templates.solve(PROBLEM) == "Q 17 +3 A"
    assert templates.vanilla(PROBLEM, "opd") == "Q 17 +3 A"
    assert templates.vanilla(PROBLEM, "opsd") == "Q 17 +3 S +3 20 # 20 A"
    assert templates.refine(PROBLEM, "opd", "+3 21 # 21") == "Q 17 +3 Y +3 21 # 21 R"
    assert templates.refine(PROBLEM, "opsd", "+3 21 # 21") == "Q 17 +3 S +3 20 # 20 Y +3 21 # 21 R"
    assert templates.refine(PROBLEM, "opsd", "+3", "# 20") == "Q 17 +3 S # 20 Y +3 R"
    assert templates.refine(PROBLEM, "opsd", "+3", "") == "Q 17 +3 S  Y +3 R", "an empty cut y* is not a missing one"


def test_opd_needs_and_shows_no_reference(directory: Path) -> None:
    templates = PromptTemplates.load(directory)
    assert templates.refine(WITHOUT_REFERENCE, "opd", "+3 20 # 20") == "Q 17 +3 Y +3 20 # 20 R"
    for render in (
        lambda: templates.vanilla(WITHOUT_REFERENCE, "opsd"),
        lambda: templates.refine(WITHOUT_REFERENCE, "opsd", "+3 20 # 20"),
    ):
        with pytest.raises(ValueError, match="p-8"):
            render()


def test_only_one_trailing_newline_is_stripped(directory: Path) -> None:
    (directory / "solve.txt").write_text("\n Q {problem}\n\n", encoding="utf-8")
    assert PromptTemplates.load(directory).solve(PROBLEM) == "\n Q 17 +3\n"


@pytest.mark.parametrize("name", ["solve", "vanilla_opsd", "refine_opd", "refine_opsd"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / f"{name}.txt").unlink()
    with pytest.raises(ValueError, match=rf"\b{name}\.txt is missing"):
        PromptTemplates.load(directory)


@pytest.mark.parametrize(
    ("name", "text", "culprit"),
    [
        ("solve", "{problem} {solution}", "solution"),
        ("solve", "{problem} {y_o}", "y_o"),
        ("refine_opd", "{problem} {y_o} {reference_solution}", "reference_solution"),
        ("refine_opsd", "{problem} {reference_solution}", "y_o"),
    ],
)
def test_a_wrong_placeholder_is_named_with_its_file(directory: Path, name: str, text: str, culprit: str) -> None:
    (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}\.txt.*\{{{culprit}\}}"):
        PromptTemplates.load(directory)
