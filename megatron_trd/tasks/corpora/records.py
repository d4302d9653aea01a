"""Records of local files: JSON, JSONL (each also gzipped) and parquet."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of a source file."""

    fields: dict[str, Any]
    path: Path
    number: int
    """Line of JSONL, place in JSON and parquet, from 1."""
    index: int
    """Place in all files together, from 1."""

    @property
    def where(self) -> str:
        """Return `path:number`."""
        return f"{self.path}:{self.number}"


def read_records(paths: Iterable[Path]) -> Iterator[Record]:
    """Yield the records of files.

    Raises:
        ValueError: one cannot be read, is of no known kind, or a record is not an object.
    """
    index = 0
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"--source {path}: unknown kind of file; give {', '.join(SUFFIXES)}")
        if not path.is_file():
            raise ValueError(f"--source {path}: no such file; give an existing one")
        for number, fields in _read(path):
            if not isinstance(fields, dict):
                raise ValueError(f"{path}:{number}: a {type(fields).__name__}, not an object; repair the file")
            index += 1
            yield Record(fields=fields, path=path, number=number, index=index)


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".parquet":
        yield from enumerate(_parquet(path), start=1)
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            for number, line in enumerate(file, start=1):
                yield number, _json(line, f"{path}:{number}")
        else:
            document = _json(file.read(), str(path))
            yield from enumerate(document if isinstance(document, list) else [document], start=1)


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); repair the file") from error


def _parquet(path: Path) -> Iterator[Any]:
    if find_spec("pyarrow") is None:
        raise ValueError(f"--source {path}: reading parquet needs package pyarrow; pip install pyarrow")
    for batch in import_module("pyarrow.parquet").ParquetFile(path).iter_batches(batch_size=64):
        yield from batch.to_pylist()


class SkippedRecord(Exception):
    """A record that is no problem of this corpus, for the reason given."""


def first_of(record: Record, names: tuple[str, ...]) -> Any:
    """Return the first field that is there and not empty, or None."""
    return next((value for name in names if (value := record.fields.get(name)) not in (None, "", [])), None)


def row_id(prefix: str, record: Record, names: tuple[str, ...]) -> str:
    """Return `prefix/` and the record's own id, or its place where it has none."""
    own = first_of(record, names)
    return f"{prefix}/{record.index if own is None else own}"


def kept_metadata(prefix: str, record: Record, names: tuple[str, ...]) -> dict[str, Any]:
    """Return where a problem is from, and what its record says about it."""
    kept = {name: value for name in names if (value := record.fields.get(name)) not in (None, "", [])}
    return {"source": prefix, **kept}
