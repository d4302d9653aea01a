"""Trajectories on disk: one JSON object a line, each complete in itself, so a killed run loses at most one line."""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypeVar

from megatron_trd.log import get_logger
from megatron_trd.records import (
    Candidate,
    Completion,
    FinishReason,
    KeptPrefix,
    Outcome,
    PrefixProbe,
    Problem,
    Reasoning,
    Selection,
    SelectionReason,
    Trajectory,
    Verdict,
    VersionSpan,
)

logger = get_logger(__name__)

SCHEMA = 2
Fingerprint = Mapping[str, str]
"""What the trajectories of a file have in common (model, prompts, sampling, ...); values are compared as they are."""


class TrajectoryWriter:
    """Appends trajectories to a file. A context manager."""

    def __init__(self, path: str | Path, fingerprint: Fingerprint) -> None:
        """Open a new file, or one to go on with; a last line that was cut off is removed.

        Raises:
            ValueError: the file is malformed, or was made with other models, prompts or sampling.
        """
        self.path, self.fingerprint = Path(path), dict(fingerprint)
        self.done_ids: set[str] = set()
        """Problems the file already holds."""
        if self.path.exists():
            drop_torn_line(self.path)
            for number, record in json_records(self.path):
                require_same(self.path, number, record["fingerprint"], self.fingerprint)
                self.done_ids.add(_parse(self.path, number, record).problem.id)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self.path.open("ab")

    def __enter__(self) -> TrajectoryWriter:
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the file."""
        self._file.close()

    def append(self, trajectory: Trajectory) -> None:
        """Write one line and hand it to the operating system."""
        record = {"schema": SCHEMA, "fingerprint": self.fingerprint, **asdict(trajectory)}
        self._file.write(json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.done_ids.add(trajectory.problem.id)


def read_trajectories(path: str | Path) -> Iterator[Trajectory]:
    """Yield the trajectories of a file. Raises ValueError naming file, line and what is wrong with it."""
    for number, record in json_records(Path(path)):
        yield _parse(Path(path), number, record)


def read_fingerprint(path: str | Path) -> Fingerprint:
    """Return what the trajectories of a file have in common. Raises ValueError if it holds none."""
    for _, record in json_records(Path(path)):
        return record["fingerprint"]
    raise ValueError(f"{path}: holds no trajectory; make it anew with python -m megatron_trd.generate")


def json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and content of each line. Raises ValueError: it is not of this schema or has no fingerprint."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                raise ValueError(
                    f"{path}:{number}: the line is cut off; resume megatron_trd.generate to repair the file"
                )
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error}); remove or repair the line") from error
            if not isinstance(record, dict) or record.get("schema") != SCHEMA:
                raise ValueError(
                    f"{path}:{number}: not a trajectory of schema {SCHEMA}; make the file anew with python -m "
                    "megatron_trd.generate"
                )
            if not isinstance(record.get("fingerprint"), dict):
                raise ValueError(f"{path}:{number}: has no fingerprint; make the file anew")
            yield number, record


def require_same(path: Path, number: int, found: Fingerprint, wanted: Fingerprint) -> None:
    """Raise ValueError naming each difference."""
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differing:
        details = ", ".join(f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}" for key in differing)
        raise ValueError(
            f"--output {path}: line {number} was made otherwise: {details}; give another file or restore the settings"
        )


def _parse(path: Path, number: int, record: Mapping[str, Any]) -> Trajectory:
    try:
        return Trajectory(
            problem=Problem(**record["problem"]),
            y_o=parse_completion(record["y_o"]),
            y_o_verdict=_optional(_verdict, record["y_o_verdict"]),
            solve_prompt_ids=_ids(record["solve_prompt_ids"]),
            vanilla_prompt_ids=_ids(record["vanilla_prompt_ids"]),
            y_r=_optional(parse_completion, record["y_r"]),
            y_r_verdict=_optional(_verdict, record["y_r_verdict"]),
            refine_prompt_ids=_ids(record["refine_prompt_ids"]),
            refine_cut_tokens=record["refine_cut_tokens"],
            vanilla_cut_tokens=record["vanilla_cut_tokens"],
            y_r_reasoning=_optional(_reasoning, record["y_r_reasoning"]),
            kept=_optional(_kept, record["kept"]),
            selection=_optional(_selection, record["selection"]),
        )
    except KeyError as error:
        raise ValueError(f"{path}:{number}: field {error} is missing; remove or repair the line") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}:{number}: {error}; remove or repair the line") from error


def parse_completion(record: Mapping[str, Any]) -> Completion:
    """Return a completion from its JSON. Raises KeyError, TypeError or ValueError."""
    return Completion(
        **{
            **record,
            "token_ids": _ids(record["token_ids"]),
            "finish_reason": _one_of(FinishReason, "finish_reason", record),
            "logprobs": tuple(record["logprobs"]),
            "weight_spans": tuple(VersionSpan(**span) for span in record["weight_spans"]),
        }
    )


T = TypeVar("T")


def _optional(parse: Callable[[Mapping[str, Any]], T], record: Mapping[str, Any] | None) -> T | None:
    return None if record is None else parse(record)


def _verdict(record: Mapping[str, Any]) -> Verdict:
    return Verdict(**{**record, "outcome": _one_of(Outcome, "outcome", record)})


def _reasoning(record: Mapping[str, Any]) -> Reasoning:
    suffixes = {name: _ids(record[name]) for name in ("student_suffix_ids", "teacher_suffix_ids")}
    return Reasoning(**{**record, **suffixes})


def _kept(record: Mapping[str, Any]) -> KeptPrefix:
    return KeptPrefix(**{**record, "probes": tuple(_probe(probe) for probe in record["probes"])})


def _probe(record: Mapping[str, Any]) -> PrefixProbe:
    return PrefixProbe(**{**record, "verdicts": tuple(_optional(_verdict, verdict) for verdict in record["verdicts"])})


def _selection(record: Mapping[str, Any]) -> Selection:
    rejected = tuple(
        Candidate(
            completion=parse_completion(candidate["completion"]), verdict=_optional(_verdict, candidate["verdict"])
        )
        for candidate in record["rejected"]
    )
    return Selection(**{**record, "reason": _one_of(SelectionReason, "reason", record), "rejected": rejected})


def _one_of(choices: Any, name: str, record: Mapping[str, Any]) -> Any:
    if record[name] not in typing.get_args(choices):
        raise ValueError(f"{name} {record[name]!r} is unknown")
    return record[name]


def _ids(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"token ids must be a list of non-negative integers, not {str(values)[:60]}")
    return tuple(values)


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline: a line whose writer was killed."""
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < size:
            logger.warning("%s: removed an incomplete last line of %d bytes", path, size - end)
            file.truncate(end)
