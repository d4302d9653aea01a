"""Metrics of a run: sums that are divided once, seconds per stage, and where both are written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter


class MetricSums:
    """Numerators and denominators of named means, kept on the device until one reduction over the ranks.

    The names are fixed at construction and must be the same, in the same order, on every rank, so the ranks agree
    without talking; a rank that adds nothing to a name contributes 0/0.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        assert len(set(names)) == len(names), f"names given twice: {names}"
        self._index = {name: i for i, name in enumerate(names)}
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)

    def add(self, name: str, numerator: torch.Tensor | float, denominator: torch.Tensor | float) -> None:
        """Add to both sums of `name`. Tensors are scalars on the device; nothing waits for it."""
        for row, value in enumerate((numerator, denominator)):
            self._sums[row, self._index[name]] += value.detach() if isinstance(value, torch.Tensor) else value

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Return the means over all ranks of `group`: one all-reduce, then one division per name.

        Collective over `group` (None = all ranks; without `torch.distributed`, this process alone). The local sums
        stay as they are. A name whose denominator is 0 everywhere is missing from the result, never 0.
        """
        sums = self._sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums, group=group)
        numerators, denominators = sums.tolist()
        return {name: numerators[i] / denominators[i] for name, i in self._index.items() if denominators[i]}


class StageClock:
    """Wall-clock seconds per stage of the run: `with clock("rollout"): ...`.

    A stage that leaves work on a GPU is charged when something waits for that work.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        """Seconds of each stage since the run began."""
        self._lap: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Charge the body's wall-clock to `stage`, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            for record in (self.totals, self._lap):
                record[stage] = record.get(stage, 0.0) + seconds

    def note(self, part: str, seconds: float) -> None:
        """Add seconds measured elsewhere, a part of some stage, to the totals alone."""
        self.totals[part] = self.totals.get(part, 0.0) + seconds

    def lap(self) -> dict[str, float]:
        """Return the seconds of each stage since the last call."""
        lap, self._lap = self._lap, {}
        return lap


_CONSOLE = (
    ("train/loss", "loss", ".4E"),
    ("rollout/y_o_pass", "y_o pass", ".1%"),
    ("rollout/y_r_pass", "y_r pass", ".1%"),
    ("train/grad_norm", "grad norm", ".3f"),
    ("train/lr", "learning rate", ".3E"),
    ("weights/logprob_gap_max", "log-prob gap", ".1E"),
)


class Reporter:
    """Writes the metrics of each iteration to TensorBoard, `metrics.jsonl` and the console. On rank 0 only."""

    def __init__(self, run_dir: str | Path, num_iterations: int | None = None) -> None:
        """Prepare to write below `run_dir`; `num_iterations` is only shown on the console."""
        self._run_dir = Path(run_dir)
        self._path = self._run_dir / "metrics.jsonl"
        self._num_iterations = num_iterations
        self._lines: IO[str] | None = None
        self._board: SummaryWriter | None = None

    def rewind(self, iteration: int) -> None:
        """Forget what was written after `iteration`, so that an iteration which runs again appears once."""
        self.close()
        self._run_dir.mkdir(parents=True, exist_ok=True)
        kept = [line for number, line in _lines_of(self._path) if number <= iteration]
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self._path)
        self._lines = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=iteration + 1)

    def report(self, iteration: int, step: int, metrics: Mapping[str, float]) -> None:
        """Write one iteration. The first call of a process forgets this and later iterations of an earlier one."""
        if self._lines is None or self._board is None:
            self.rewind(iteration - 1)
        assert self._lines is not None and self._board is not None
        self._lines.write(json.dumps({"iteration": iteration, "step": step, **metrics}) + "\n")
        self._lines.flush()
        for tag, value in metrics.items():
            self._board.add_scalar(tag, value, iteration)
        self._board.flush()
        print(console_line(iteration, self._num_iterations, metrics), flush=True)

    def close(self) -> None:
        """Close the files; a later `report` opens them again."""
        for file in (self._lines, self._board):
            if file is not None:
                file.close()
        self._lines = self._board = None


def console_line(iteration: int, num_iterations: int | None, metrics: Mapping[str, float]) -> str:
    """Render one iteration as one line; a metric that was not measured is left out."""
    of = "" if num_iterations is None else f"/{num_iterations:8d}"
    parts = [f" iteration {iteration:8d}{of}"]
    parts += [f"{label}: {metrics[tag]:{form}}" for tag, label, form in _CONSOLE if tag in metrics]
    parts += [f"{tag.removeprefix('eval/')}: {v:.1%}" for tag, v in metrics.items() if _is_score(tag)]
    seconds = [value for tag, value in metrics.items() if tag.startswith("time/")]
    if seconds:
        parts.append(f"elapsed time (s): {sum(seconds):.1f}")
    return " | ".join(parts) + " |"


def _is_score(tag: str) -> bool:
    return tag.startswith("eval/") and tag.rsplit("/", 1)[-1].startswith(("avg@", "pass@")) and "interval" not in tag


def read_metrics(run_dir: str | Path, tag: str) -> list[float]:
    """Return what a metric was in each iteration that has it. Raises ValueError naming file and line."""
    return [metrics[tag] for metrics in read_iterations(run_dir) if tag in metrics]


def read_iterations(run_dir: str | Path) -> list[dict[str, float]]:
    """Return all metrics of each iteration, `iteration` among them. Raises ValueError naming file and line."""
    return [json.loads(line) for _, line in _lines_of(Path(run_dir) / "metrics.jsonl")]


def _lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (iteration, line) of a metrics file; a last line torn by a killed process is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)["iteration"], line
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a line of metrics; mend or remove the file") from error
