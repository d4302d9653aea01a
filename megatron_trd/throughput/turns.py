"""Several measurements in turns, each in processes of its own, and what one is over another."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_trd.config.cli import flags
from megatron_trd.log import get_logger
from megatron_trd.throughput.measure import spread
from megatron_trd.throughput.result import Result

logger = get_logger(__name__)

LAYOUT_FLAGS = {
    "TP": "tensor-model-parallel-size",
    "SP": "sequence-parallel",
    "PP": "pipeline-model-parallel-size",
    "VPP": "num-virtual-stages-per-pipeline-rank",
    "CP": "context-parallel-size",
    "EP": "expert-model-parallel-size",
    "ETP": "expert-tensor-parallel-size",
    "DO": "use-distributed-optimizer",
}
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative difference of the first step's losses, up to which both compute the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One contender."""

    name: str
    arguments: tuple[str, ...]
    """Of the script that measures."""
    num_ranks: int


def read_layout(text: str) -> list[str]:
    """Turn `TP=2,SP` into flags; any other flag of the trainer may stand there as `name=value`.

    Raises:
        ValueError: an unknown name.
    """
    known = {flag.flag.removeprefix("--") for flag in flags()}
    arguments = []
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        flag = LAYOUT_FLAGS.get(name, name)
        if flag not in known:
            raise ValueError(f"--sweep {item}: give {', '.join(LAYOUT_FLAGS)} or a flag of the trainer, as name=value")
        arguments += [f"--{flag}", *([value] if value else [])]
    return arguments


def take_turns(turns: Sequence[Turn], repeats: int, script: str, scratch: Path) -> dict[str, list[Result]]:
    """Measure every contender, then every one again, `repeats` times; one that failed has an `error`, and no turn
    more."""
    results: dict[str, list[Result]] = {turn.name: [] for turn in turns}
    for repeat in range(repeats):
        for turn in turns:
            if not any("error" in result for result in results[turn.name]):
                result = _measure(turn, script, scratch / "result.json")
                results[turn.name].append(result)
                told = result.get("error") or f"{result['tokens_per_s_per_gpu']['median']:,.1f} tokens/s/GPU"
                logger.info("turn %d of %d, %s: %s", repeat + 1, repeats, turn.name, told)
    return results


def _measure(turn: Turn, script: str, target: Path) -> Result:
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
    command = [sys.executable, "-m", *launcher, str(turn.num_ranks), script, *turn.arguments, "--json", str(target)]
    target.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if target.exists() and done.returncode == 0:
        return json.loads(target.read_text(encoding="utf-8"))
    print(done.stderr, file=sys.stderr)
    lines = [line.strip() for line in done.stderr.splitlines()]
    named = [line for line in lines if "rror: " in line and "ChildFailedError" not in line]
    return {"error": (named or lines or ["no output"])[-1]}


def middle(results: Sequence[Result]) -> Result:
    """Return the run with the median speed, or the first failed one."""
    failed = [result for result in results if "error" in result]
    if failed:
        return failed[0]
    ranked = sorted(results, key=lambda result: result["tokens_per_s_per_gpu"]["median"])
    return ranked[(len(ranked) - 1) // 2]


def compare(ours: Sequence[Result], baseline: Sequence[Result]) -> dict[str, object]:
    """Return ours over the baseline: speed (pair by pair), memory, and whether both had the same loss at first.

    Raises:
        ValueError: the losses differ: the two do not compute the same.
    """
    first, other = ours[0]["first_loss"], baseline[0]["first_loss"]
    tolerance = LOSS_TOLERANCE[ours[0]["precision"]]
    if not math.isclose(first, other, rel_tol=tolerance):
        raise ValueError(
            f"--baseline: its first loss is {other:.8g}, ours {first:.8g}, more than a {tolerance:g} part apart: they "
            "do not compute the same, so nothing is compared"
        )

    def ratios(numerators: Sequence[Result], denominators: Sequence[Result], name: str) -> dict[str, float]:
        pairs = zip(numerators, denominators, strict=True)
        return spread(a[name]["median"] / b[name]["median"] for a, b in pairs)

    peaks = [statistics.median(result["peak_gib"] for result in results) for results in (ours, baseline)]
    compared: dict[str, object] = {
        "first_loss": {"ours": first, "baseline": other},
        "tokens_per_s_per_gpu": ratios(ours, baseline, "tokens_per_s_per_gpu"),
        "peak_gib": peaks[0] / peaks[1],
    }
    if "step_cpu_seconds" in ours[0]:
        compared["tokens_per_cpu_second"] = ratios(baseline, ours, "step_cpu_seconds")  # of the same tokens
    return compared
