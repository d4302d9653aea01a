"""A directory of samples: `settings.json` says what they have in common, `samples.jsonl` holds one line for each."""

from __future__ import annotations

import fcntl
import json
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_trd.records import FinishReason, Outcome
from megatron_trd.rollout.trajectory_file import drop_torn_line

SCHEMA = 1
SAMPLES, SETTINGS = "samples.jsonl", "settings.json"
Settings = Mapping[str, Any]
"""Model, checksum of its weights, sampling, seed; under `benchmarks`, `Benchmark.describe` and `samples` of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One graded response. A request that failed has none."""

    bench: str
    problem_id: str
    sample_id: int
    """0, 1, ... among the samples of the problem."""
    seed: int
    prompt_sha256: str
    """Of the prompt's token ids."""
    prompt_tokens: int
    response: str
    finish_reason: FinishReason
    response_tokens: int
    extracted: str | None
    """The answer that was compared, the program that was run."""
    verdict: Outcome
    error: str | None
    """What went wrong in the grading of a `grader_error`, or in the program."""
    verifier: Mapping[str, str]
    """Its name, version and profile."""
    seconds: float
    """From sending the request to the whole response."""
    weight_version: str
    evalplus: Mapping[str, Any] | None = None
    """EvalPlus' account of the program."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from every other row."""
        return self.bench, self.problem_id, self.sample_id

    @property
    def passed(self) -> bool | None:
        """Whether it is right; None for a `grader_error`."""
        return None if self.verdict == "grader_error" else self.verdict == "correct"


class SamplesFile:
    """Appends rows to a directory. A context manager that holds the directory alone."""

    def __init__(self, directory: str | Path, settings: Settings) -> None:
        """Open a new directory, or one to go on with; a last line that was cut off is removed.

        Further benchmarks and more samples of a problem may join what is there; all else must be as it was.

        Raises:
            ValueError: another process writes there, the file is malformed, or it was made with another model,
                other weights, sampling, problems or verifiers.
        """
        self.directory, self.path = Path(directory), Path(directory) / SAMPLES
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.prompts = self._resume(settings)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"--output {directory}: another process writes there; give another directory") from error
        except ValueError:
            self._file.close()
            raise

    def _resume(self, settings: Settings) -> dict[tuple[str, str, int], str]:
        drop_torn_line(self.path)
        if (self.directory / SETTINGS).is_file():
            settings = _merged(self.directory, read_settings(self.directory), settings)
        elif self.path.stat().st_size:
            raise ValueError(f"--output {self.directory}: {SETTINGS} is missing; give another directory")
        prompts = {row.key: row.prompt_sha256 for row in read_samples(self.directory)}
        partial = self.directory / f"{SETTINGS}.partial"
        partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.directory / SETTINGS)
        return prompts

    def __enter__(self) -> SamplesFile:
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the file and let go of the directory."""
        self._file.close()

    def has(self, key: tuple[str, str, int], prompt_sha256: str) -> bool:
        """Return whether a sample is there. Raises ValueError if it answers another prompt."""
        found = self.prompts.get(key)
        if found not in (None, prompt_sha256):
            raise ValueError(
                f"--output {self.directory}: its samples of problem {key[1]} answer another prompt; give another "
                "directory, or restore template, chat template and --thinking"
            )
        return found is not None

    def append(self, row: Row) -> None:
        """Write one line and hand it to the operating system."""
        self._file.write(json.dumps(asdict(row), separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.prompts[row.key] = row.prompt_sha256


def read_settings(directory: str | Path) -> Settings:
    """Return what the samples of a directory have in common. Raises ValueError if it holds none."""
    path = Path(directory) / SETTINGS
    if not path.is_file():
        raise ValueError(f"{directory}: no {SETTINGS} there; give a directory that megatron_trd.evaluate made")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not of schema {SCHEMA}; make the directory anew")
    return settings


def read_samples(directory: str | Path) -> Iterator[Row]:
    """Yield every row; a last line that was cut off is passed over. Raises ValueError naming file and line."""
    path = Path(directory) / SAMPLES
    seen = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = Row(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: no sample ({error}); remove the line") from error
            if row.verdict not in typing.get_args(Outcome) or row.key in seen:
                raise ValueError(
                    f"{path}:{number}: verdict {row.verdict} of {row.key} is unknown or its second; remove"
                )
            seen.add(row.key)
            yield row


def differences(before: Settings, after: Settings) -> list[str]:
    """Say in which common settings two directories differ; the number of samples may."""
    names = sorted(before.keys() & after.keys() - {"benchmarks"})
    found = [f"{name} was {before[name]} and is {after[name]}" for name in names if before[name] != after[name]]
    for bench in before["benchmarks"].keys() & after["benchmarks"].keys():
        was, now = before["benchmarks"][bench], after["benchmarks"][bench]
        for name in sorted(was.keys() | now.keys() - {"samples"}):
            if name != "samples" and was.get(name) != now.get(name):
                found.append(f"{name} of {bench} was {was.get(name)} and is {now.get(name)}")
    return found


def _merged(directory: Path, before: Settings, after: Settings) -> Settings:
    if found := differences(before, after):
        raise ValueError(
            f"--output {directory}: was made otherwise: {'; '.join(found)}; give another directory or restore the "
            "settings (another verifier: --regrade)"
        )
    benchmarks = {**before["benchmarks"]}
    for name, bench in after["benchmarks"].items():
        benchmarks[name] = {**bench, "samples": max(bench["samples"], benchmarks.get(name, bench)["samples"])}
    return {**after, "benchmarks": benchmarks}
