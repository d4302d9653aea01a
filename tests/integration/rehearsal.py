"""The parts of the rehearsal: twenty real problems, what each of them is to be answered with, and servers that do so.

Numbers that the tests assert are written down here, by hand, beside the script they follow from.
"""

from __future__ import annotations

import asyncio
import json
import runpy
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aiohttp import web
from transformers import PreTrainedTokenizerBase

from launch import ROOT
from megatron_trd.records import Problem
from megatron_trd.tasks.corpus import read_rows
from scripted_server import scripted
from shared_data import qwen_tokenizer, shared
from tiny_models import make_model

VOCAB, EOS = 151_936, 151_645
BUDGET = 128
Kind = Literal["right", "thought", "wrong", "none", "cut", "empty", "lost"]
Pair = tuple[Kind, Kind]
PREPARE: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "tools/prepare_data.py"))["main"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """A task's problems, in the order of its file, and what y_o and y_r of each are to be."""

    task: Literal["math", "code"]
    pairs: tuple[Pair, ...]
    table: dict[str, int]
    """Outcomes of y_o and y_r; problems with an ungraded one are in none."""
    passed: dict[str, int]
    """Trajectories that each filter lets through."""
    decided: dict[str, dict[str | None, int]]
    """--on-bad-refinement -> reason (None: the plain good case) -> trajectories."""


_BOTH: tuple[Pair, ...] = (
    ("right", "right"),
    ("right", "wrong"),
    ("right", "empty"),
    ("wrong", "right"),
    ("wrong", "thought"),
    ("none", "right"),
    ("cut", "right"),
    ("wrong", "wrong"),
    ("wrong", "cut"),
)
_TABLE = {"pass_pass": 1, "pass_fail": 2, "fail_pass": 4, "fail_fail": 2}
MATH = Rehearsal(
    task="math",
    pairs=(*_BOTH, ("right", "lost")),
    table=_TABLE,
    passed={"full": 10, "succ": 4, "fail": 6, "fail_to_succ": 4},
    decided={  # the empty, the cut and the lost y_r; the empty one still has the token that ends it
        "use_y_o": {None: 7, "bad_y_r_replaced": 3},
        "drop": {None: 7, "bad_y_r_dropped": 3},
        "keep": {None: 7, "bad_y_r_kept": 2, "bad_y_r_dropped": 1},
    },
)
CODE = Rehearsal(
    task="code",
    pairs=(*_BOTH, ("right", "right")),  # the last problem has several right outputs, so nobody knows
    table=_TABLE,
    passed={"full": 10, "succ": 3, "fail": 6, "fail_to_succ": 4},
    decided={
        "use_y_o": {None: 8, "bad_y_r_replaced": 2},
        "drop": {None: 8, "bad_y_r_dropped": 2},
        "keep": {None: 8, "bad_y_r_kept": 2},
    },
)


def records(name: str, *numbers: int) -> list[dict[str, Any]]:
    """Return records of a shared file, by their places from 0."""
    lines = shared(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[number]) for number in numbers]


def prepare(name: str, source: Sequence[dict[str, Any]], output: Path, *flags: str) -> dict[str, Any]:
    """Run tools/prepare_data.py on some records; return its account."""
    path = output.with_name(f"{output.stem}.source.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in source), encoding="utf-8")
    PREPARE([name, "--source", str(path), "--output", str(output), *flags])
    return json.loads(output.with_name(f"{output.name}.summary.json").read_text(encoding="utf-8"))


def prepare_math(benchmarks: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Make ten problems of thirteen records: the others are a repeated, a held-out and a broken one."""
    good = records("train/math_nonMATH500_solutions_2000.jsonl", 12, 20, 28, 30, 52, 56, 63, 66, 68, 70)
    spoilt = [good[0] | {"id": "again"}, *records("math/aime24.jsonl", 0), *records("math/hmmt25_nov.jsonl", 19)]
    output = folder / "math.jsonl"
    return output, prepare("math", good + spoilt, output, "--against", str(benchmarks / "aime24.jsonl"))


def prepare_code(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Make ten problems: seven with functions to call, two that read and print, one with several right outputs."""
    mbpp = records("code/mbpp_974.jsonl", 2, 3, 6, 7, 9, 16, 34)
    spoilt = [
        mbpp[0] | {"task_id": 9001, "text": "Fails its tests.", "code": "def is_not_prime(n):\n    return None"},
        mbpp[0] | {"task_id": 9002, "text": "Has none that count.", "test_list": ["assert is_not_prime(2) is False"]},
    ]
    stdin = records("code/taco_test_stdin_verified.jsonl", 310, 361)
    several = records("code/taco_test_stdin_tolerant_or_spj.jsonl", 31)
    paths, left_out = [folder / "mbpp.jsonl", folder / "taco.jsonl"], Counter[str]()
    for name, source, path in zip(("mbpp", "taco"), (mbpp + spoilt, stdin + several), paths, strict=True):
        left_out.update(prepare(name, source, path, "--check-solutions")["left_out"])
    return paths, left_out


def model_dir(path: Path, hidden: int, seed: int) -> Path:
    """Make a tiny random Qwen3 with the vocabulary and the tokenizer of the real ones."""
    make_model(path, hidden=hidden, seed=seed, vocab_size=VOCAB, max_position_embeddings=4096)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(shared("qwen_tokenizer") / name, path / name)
    return path


class Script:
    """What servers of student and teacher are to say to each problem."""

    def __init__(self, rehearsal: Rehearsal, paths: Sequence[Path]) -> None:
        """Read the prepared problems."""
        self.rehearsal = rehearsal
        self.problems = [row.problem for path in paths for _, row in read_rows(path)]
        self.tokenizer: PreTrainedTokenizerBase = qwen_tokenizer()
        self.kinds = {
            problem.id: dict(zip(("y_o", "y_r"), pair, strict=True))
            for problem, pair in zip(self.problems, rehearsal.pairs, strict=True)
        }
        self.refuse_once: set[str] = set()
        """Problems whose next y_o is refused."""

    def text(self, problem: Problem, kind: Kind) -> str:
        """Return what a response says: the reference solution, another answer, or none."""
        solution = (problem.reference_solution or "").replace("\r\n", "\n")
        right, wrong = solution, r"It can only be \boxed{-12345}."
        if self.rehearsal.task == "code":
            right, wrong = (f"```python\n{program}\n```" for program in (solution, "print('no idea')"))
        return {
            "right": right,
            "thought": f"<think>\nThe attempt is wrong.\n</think>\n\n{right}",
            "wrong": wrong,
            "none": "I do not know.",
            "cut": "Let me first look at the problem from",
            "empty": "",
        }[kind]

    def ids(self, problem: Problem, stage: Literal["y_o", "y_r"]) -> list[int]:
        """Return the ids that a server answers with; a response that is cut off has no end."""
        kind = self.kinds[problem.id][stage]
        if kind == "lost":
            return []
        ids = self.tokenizer(self.text(problem, kind))["input_ids"]
        assert len(ids) < BUDGET
        return ids if kind == "cut" else [*ids, EOS]

    def reply(self, stage: Literal["y_o", "y_r"]) -> Callable[[dict[str, Any]], Any]:
        """Return the way a server answers `/generate` at a stage."""

        def reply(body: dict[str, Any]) -> Any:
            prompt = self.tokenizer.decode(body["input_ids"])
            (problem,) = (problem for problem in self.problems if problem.prompt in prompt)
            kind = self.kinds[problem.id][stage]
            if kind == "lost" or (stage == "y_o" and problem.id in self.refuse_once):
                self.refuse_once.discard(problem.id)
                return web.json_response({"error": {"message": "refused as told"}}, status=400)
            ids = self.ids(problem, stage)
            return {
                "text": self.tokenizer.decode(ids, skip_special_tokens=True),
                "output_ids": ids,
                "meta_info": {
                    "finish_reason": {"type": "length" if kind == "cut" else "stop"},
                    "weight_version": "v1",
                    "output_token_logprobs": [[-1.0, token_id, None] for token_id in ids],
                },
            }

        return reply


@contextmanager
def serving(*replies: Callable[[dict[str, Any]], Any]) -> Iterator[list[str]]:
    """Run a scripted server for each reply in a thread with a loop of its own; yield their URLs."""
    ready: list[str] = []
    started, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with scripted(*replies) as servers:
            ready.extend(server.url for server in servers)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert started.wait(30), "the scripted servers did not start"
        yield ready
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def rendered(script: Script, problem: Problem, name: str, y_o: str = "") -> list[int]:
    """Fill a template and put it into Qwen3's chat format, by other means than the renderer's."""
    template = (ROOT / f"megatron_trd/tasks/templates/{script.rehearsal.task}/{name}.txt").read_text(encoding="utf-8")
    message = template.removesuffix("\n").replace("{reference_solution}", problem.reference_solution or "")
    message = message.replace("{y_o}", y_o).replace("{problem}", problem.prompt)
    prompt = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    return script.tokenizer(prompt)["input_ids"]
