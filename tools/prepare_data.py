"""Make a file of problems from a published corpus, checked and accounted for.

    python tools/prepare_data.py aime24 --source test.jsonl --output data/aime24.jsonl
    python tools/prepare_data.py deepscaler --source hub --output data/deepscaler.jsonl --against data/aime24.jsonl

Beside the output lies `<output>.summary.json`: counts, hashes, and each record that was left out with the reason.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_trd.config.cli import exit_on_value_error
from megatron_trd.config.schema import DataConfig, RolloutConfig
from megatron_trd.records import Problem
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.vocabulary import load_tokenizer
from megatron_trd.tasks import TASKS
from megatron_trd.tasks.corpora.prepare import FINDINGS, prepare
from megatron_trd.tasks.corpora.table import CORPORA
from megatron_trd.tasks.prompts import PromptTemplates


def main(argv: list[str] | None = None) -> None:
    """Prepare one corpus."""
    arguments = _parser().parse_args(argv)
    corpus = CORPORA[arguments.name]
    with exit_on_value_error():
        if all(Path(source).exists() for source in arguments.source):
            sources = [Path(source) for source in arguments.source]
        else:
            sources = _download(arguments.name, arguments.source, arguments.hub_files or corpus.files)
        summary = prepare(
            arguments.name,
            corpus,
            sources,
            Path(arguments.output),
            prefix=arguments.prefix or arguments.name,
            against=[Path(path) for path in arguments.against],
            keep=arguments.keep,
            too_long=_too_long(arguments.tokenizer, arguments.max_prompt_tokens) if arguments.tokenizer else None,
            check_solutions=arguments.check_solutions,
        )
    print(_report(summary))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a file of problems from a published corpus.")
    parser.add_argument("name", choices=sorted(CORPORA), metavar="NAME", help=", ".join(sorted(CORPORA)))
    parser.add_argument(
        "--source",
        nargs="+",
        required=True,
        metavar="FILE",
        help="local files (JSON, JSONL, also .gz, or parquet), or one data set on the Hugging Face hub: its id, or "
        "`hub` for the usual one",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL file to write")
    parser.add_argument("--prefix", metavar="TEXT", help="start of every id, and the `source` in the metadata [NAME]")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files that this tool made: problems that are also in one of them are left out",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        default=[],
        choices=FINDINGS,
        help="report these without leaving the problem out",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="model whose solve prompts must fit --max-prompt-tokens [no check]"
    )
    parser.add_argument("--max-prompt-tokens", type=int, default=RolloutConfig().max_prompt_tokens, metavar="N")
    parser.add_argument(
        "--check-solutions",
        action="store_true",
        help="run the reference solution of each programming problem on its tests, in the sandbox; what fails is left "
        "out",
    )
    parser.add_argument("--hub-files", nargs="+", metavar="GLOB", help="files of the data set, if not the usual ones")
    return parser


def _too_long(tokenizer: str, max_prompt_tokens: int) -> Callable[[Problem], str]:
    """Return what says why the solve prompt of a problem is over budget, if it is."""
    budgets = {"max_prompt_tokens": max_prompt_tokens, "max_refine_prompt_tokens": max_prompt_tokens}
    switches = {"thinking": False, "refiner_thinking": False}
    templates = PromptTemplates.load(TASKS["code"](DataConfig()).template_dir)  # the longer of the two
    renderer = Renderer(load_tokenizer(tokenizer, "tokenizer"), templates, mode="opd", **switches, **budgets)

    def say_why(problem: Problem) -> str:
        try:
            renderer.solve(problem)
        except ValueError as error:
            return str(error)
        return ""

    return say_why


def _download(name: str, source: list[str], globs: tuple[str, ...] | list[str]) -> list[Path]:
    """Return the local copies of a data set's files."""
    wanted = CORPORA[name].hub if source == ["hub"] else source[0]
    missing = [path for path in source if not Path(path).exists()]
    if wanted is None or len(source) > 1 or wanted.count("/") != 1:
        known = "" if wanted else f"; {name} is not on the hub in this form, give a file"
        raise ValueError(f"--source {' '.join(missing)}: no such file, and no id of a data set{known}")
    if find_spec("huggingface_hub") is None:
        raise ValueError(f"--source {wanted}: downloading needs package huggingface_hub; pip install it, or give files")
    hub: Any = import_module("huggingface_hub")
    failures = (OSError, *((import_module("httpx").HTTPError,) if find_spec("httpx") else ()))
    try:
        names = hub.list_repo_files(wanted, repo_type="dataset")
        chosen = [path for path in names if any(fnmatch.fnmatch(path, glob) for glob in globs)]
        if not chosen:
            raise ValueError(f"--hub-files {' '.join(globs)}: {wanted} has none such; it has {', '.join(names[:20])}")
        return [Path(hub.hf_hub_download(wanted, path, repo_type="dataset")) for path in chosen]
    except failures as error:
        raise ValueError(f"--source {wanted}: cannot be fetched ({error}); give local files instead") from error


def _report(summary: dict[str, Any]) -> str:
    lines = [f"{summary['output']['path']}: {summary['problems']} problems of {summary['records']} records"]
    if summary["problems_expected"] not in (None, summary["problems"]):
        lines.append(f"  WARNING: {summary['corpus']} has {summary['problems_expected']} problems")
    for what in ("left_out", "kept_anyway"):
        lines += [f"  {what.replace('_', ' ')}: {n} {finding}" for finding, n in summary[what].items()]
    lines += [f"    {finding['record']}: {finding['why']}" for finding in summary["findings"][:10]]
    if hidden := summary["findings"][10:]:
        lines.append(f"    ... and {len(hidden)} more in the summary")
    if texts := summary["golds_compared_by_characters_only"]:
        lines.append(f"  {len(texts)} golds are no mathematics that a parser reads: {'; '.join(texts[:5])}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
