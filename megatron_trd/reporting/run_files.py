"""What there is of a run: its directory's files, an evaluation, or a single file of trajectories or of an audit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_trd.benchmarks.samples_file import SAMPLES
from megatron_trd.metrics import read_iterations
from megatron_trd.records import Trajectory
from megatron_trd.rollout.trajectory_file import read_trajectories

AUDIT = "audit.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Everything found under one path."""

    path: Path
    name: str
    """Tells it from the other runs of a report."""
    summary: Mapping[str, Any]
    """Of a finished training run; else empty."""
    metrics: Sequence[Mapping[str, float]]
    """One entry per iteration."""
    trajectories: tuple[Path, ...]
    evaluations: tuple[Path, ...]
    """Directories of samples."""
    audits: tuple[Path, ...]

    def read_trajectories(self) -> Iterator[Trajectory]:
        """Yield all trajectories, file by file."""
        for path in self.trajectories:
            yield from read_trajectories(path)


def find_runs(paths: Sequence[str | Path]) -> list[RunFiles]:
    """Return what is under each path.

    Raises:
        ValueError: there is nothing to report, or a file is malformed.
    """
    folders = [Path(path) for path in paths]
    return [_find(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _find(path: Path, name: str) -> RunFiles:
    if path.is_file():
        is_audit = "along" in _first_record(path)
        return RunFiles(
            path=path,
            name=name,
            summary={},
            metrics=(),
            trajectories=() if is_audit else (path,),
            evaluations=(),
            audits=(path,) if is_audit else (),
        )
    found = RunFiles(
        path=path,
        name=name,
        summary=_training_summary(path / "summary.json"),
        metrics=read_iterations(path),
        trajectories=(*sorted(path.glob("trajectories/*.jsonl")), *path.glob("trajectories.jsonl")),
        evaluations=tuple(sorted(file.parent for file in (*path.glob(SAMPLES), *path.glob(f"*/{SAMPLES}")))),
        audits=tuple(path.glob(AUDIT)),
    )
    if not (found.summary or found.metrics or found.trajectories or found.evaluations or found.audits):
        raise ValueError(
            f"{path}: nothing to report there; give a --run-dir, the --output of an evaluation or of an audit, or a "
            "file of trajectories"
        )
    return found


def _training_summary(path: Path) -> Mapping[str, Any]:
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return summary if "method" in summary else {}


def _first_record(path: Path) -> Mapping[str, Any]:
    with path.open(encoding="utf-8") as file:
        try:
            record = json.loads(file.readline())
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON Lines file; give a file of trajectories or of an audit") from error
    return record if isinstance(record, dict) else {}


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, with as many parts before it as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError(f"{', '.join(map(str, paths))}: the same run is given twice; name each once")
    names = ["/".join(part[-1:]) for part in parts]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(part[-depth:]) for part in parts]
    return names
