"""Completions on disk beside an unfinished trajectory file, so that a killed run samples none of them twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import IO

from megatron_trd.log import get_logger
from megatron_trd.records import Completion
from megatron_trd.rollout.engine import RolloutEngine, SamplingParams
from megatron_trd.rollout.trajectory_file import (
    SCHEMA,
    Fingerprint,
    drop_torn_line,
    json_records,
    parse_completion,
    require_same,
)

logger = get_logger(__name__)


class RememberingEngine:
    """A `RolloutEngine` that writes down what another one samples, and reads it there the next time.

    A context manager. Requests are told apart by prompt and seed. The file is removed when the block ends well.
    """

    def __init__(self, engine: RolloutEngine, path: str | Path, fingerprint: Fingerprint) -> None:
        """Open a new file, or one that an earlier run left.

        Raises:
            ValueError: the file is malformed, or was made with other models, prompts or sampling.
        """
        self.engine, self.path, self.fingerprint = engine, Path(path), dict(fingerprint)
        self._offsets: dict[str, int] = {}
        if self.path.exists():
            drop_torn_line(self.path)
            offset = 0
            with self.path.open("rb") as lines:
                for (number, record), line in zip(json_records(self.path), lines, strict=True):
                    require_same(self.path, number, record["fingerprint"], self.fingerprint)
                    if "key" not in record or "completion" not in record:
                        raise ValueError(f"{self.path}:{number}: is no remembered completion; remove the file")
                    self._offsets[record["key"]] = offset
                    offset += len(line)
            logger.info("%s: %d completions of an earlier run", self.path, len(self._offsets))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self.path.open("ab+")

    def __enter__(self) -> RememberingEngine:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the file; remove it unless an exception is on its way."""
        self._file.close()
        if kind is None:
            self.path.unlink()

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Return what is remembered, else sample and remember it; a failed completion is not."""
        key = blake2b(repr((params.sampling_seed, tuple(prompt_ids))).encode(), digest_size=16).hexdigest()
        if key in self._offsets:
            return self._read(self._offsets[key])
        completion = await self.engine.generate(prompt_ids, params)
        if completion.finish_reason != "abort" and params.sampling_seed is not None:
            self._append(key, completion)
        return completion

    def _append(self, key: str, completion: Completion) -> None:
        record = {"schema": SCHEMA, "fingerprint": self.fingerprint, "key": key, "completion": asdict(completion)}
        self._file.write(json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _read(self, offset: int) -> Completion:
        self._file.seek(offset)
        try:
            return parse_completion(json.loads(self._file.readline())["completion"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: a completion cannot be read: {error}; remove the file") from error
