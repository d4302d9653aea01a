"""A run as one page, its charts and its numbers; several runs side by side.

    python -m megatron_trd.report RUN [RUN ...] [--output DIR] [--tokenizer DIR]

RUN is a --run-dir, the --output of an evaluation or of an audit, or a file of trajectories. Written are report.html, a
picture of each chart, and report.json with every number of the page, to `report/` of the first RUN or to --output.
--tokenizer, the student's directory, measures the reference solutions of trajectories.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_trd.config.cli import exit_on_value_error
from megatron_trd.reporting.figures import draw_all
from megatron_trd.reporting.numbers import numbers_of
from megatron_trd.reporting.page import render
from megatron_trd.reporting.run_files import find_runs
from megatron_trd.reporting.table import closing_table
from megatron_trd.reporting.theme import write_png
from megatron_trd.rollout.vocabulary import load_tokenizer


def report(paths: Sequence[str], output: str | None = None, tokenizer_path: str | None = None) -> Path:
    """Write the report of some runs; print the table of those that trained. Return the page's path.

    Raises:
        ValueError: a path holds nothing to report, or a malformed file.
    """
    runs = find_runs(paths)
    tokenizer = load_tokenizer(tokenizer_path, "tokenizer") if tokenizer_path is not None else None
    count = None if tokenizer is None else lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
    numbers = [numbers_of(run, count) for run in runs]
    first = Path(paths[0])
    folder = Path(output) if output else (first if first.is_dir() else first.parent) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw_all(numbers)
    summaries = [(run.name, run.summary) for run in runs if run.summary]
    (folder / "report.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    for name, figure in figures.items():
        write_png(figure, folder / f"{name}.png")
    page = folder / "report.html"
    page.write_text(render(numbers, summaries, figures), encoding="utf-8")
    if summaries:
        print(closing_table([summary for _, summary in summaries]))
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """Write a report of the runs that are named on the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return
    with exit_on_value_error():
        options = {flag: _taken(words, flag) for flag in ("--output", "--tokenizer")}
        unknown = [word for word in words if word.startswith("-")]
        if unknown or not words:
            raise ValueError(
                f"{unknown[0]}: unknown flag; --help shows them" if unknown else "RUN (none): give a directory"
            )
        print(f"wrote {report(words, options['--output'], options['--tokenizer'])}")


def _taken(words: list[str], flag: str) -> str | None:
    """Take a flag and its value out of the words."""
    if flag not in words:
        return None
    place = words.index(flag)
    if place + 1 == len(words):
        raise ValueError(f"{flag} (unset): give a directory")
    value = words[place + 1]
    del words[place : place + 2]
    return value


if __name__ == "__main__":
    main()
