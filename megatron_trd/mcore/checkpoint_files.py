"""Checkpoints as files: their names, the tracker, the manifest, what is wrong with one, and which ones to keep.

    checkpoints/latest_checkpointed_iteration.txt    the checkpoint in force
    checkpoints/iter_0000010/                        a complete checkpoint; manifest.json lists its files
    checkpoints/iter_0000010.<token>.tmp/            being written, or being deleted; swept at the next start
    checkpoints/iter_0000010.damaged/                set aside by a resume that found it damaged

Every name appears by a rename of something that is complete and on the disk.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_trd.log import get_logger
from megatron_trd.weight_sync.disk import bring_to_disk

logger = get_logger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
_UNFINISHED = ".tmp"
_BLOCK = 1 << 24


def checkpoint_directory(root: Path, iteration: int) -> Path:
    """Megatron's name for the checkpoint of an iteration."""
    return root / f"iter_{iteration:07d}"


def unfinished_directory(root: Path, iteration: int) -> Path:
    """Return a new name for what is no checkpoint yet, or no longer."""
    return root / f"iter_{iteration:07d}.{secrets.token_hex(4)}{_UNFINISHED}"


def require_writable(directory: Path) -> None:
    """Make a directory and write into it.

    Raises:
        ValueError: that is not possible.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise ValueError(
            f"--run-dir {directory}: cannot write there ({error.strerror}); give a directory that all ranks share and "
            "may write to"
        ) from error


def latest_iteration(root: Path) -> int | None:
    """Return the iteration that the tracker names, or None without a tracker.

    Raises:
        ValueError: the tracker holds no number.
    """
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise ValueError(
            f"{tracker}: holds {text!r}; write the number of an existing iter_* directory into it, or remove it to "
            "start anew"
        )
    return int(text)


def resume_point(root: Path, policy: str) -> int | None:
    """Return the iteration of the checkpoint in force; None starts anew.

    Raises:
        ValueError: `require` finds none, or `never` would write over one.
    """
    latest = latest_iteration(root)
    if policy == "require" and latest is None:
        raise ValueError(f"--resume require: there is no checkpoint in {root}; use --resume auto to start anew")
    if policy == "never" and latest is not None:
        raise ValueError(
            f"--resume never: {root} already holds a checkpoint of iteration {latest}; give another --run-dir or "
            "remove that directory"
        )
    return latest


def iterations_up_to(root: Path, newest: int) -> list[int]:
    """Return the iterations with a directory that are not newer than `newest`, newest first."""
    names = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in root.glob("iter_*"))
    return sorted((i for name in names if name and (i := int(name[1])) <= newest), reverse=True)


# ---------------------------------------------------------------------- the manifest


def describe_file(path: Path) -> dict[str, Any]:
    """Bring a file to the disk for good; return its size in bytes and its CRC-32."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        checksum = size = 0
        while block := file.read(_BLOCK):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": f"{checksum:08x}"}


def write_manifest(directory: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what a checkpoint is (`facts`) and what it consists of: name -> what `describe_file` returned."""
    _write_durably(directory / MANIFEST, json.dumps({**facts, "files": dict(files)}, indent=1) + "\n")


def problems(directory: Path, *, share: tuple[int, int] = (0, 1), checksums: bool = True) -> list[str]:
    """Compare a checkpoint with its manifest.

    Args:
        share: (i, n): look at every n-th file from the i-th on, in the order of their sizes.
        checksums: read the files too, not only their sizes.

    Returns:
        One line for each damaged file: its path, what the manifest expects, what is there. Empty when all is well.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((directory / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        what = "is not there" if not directory.is_dir() else f"has no {MANIFEST}, which is written last"
        return [f"{directory}: {what}"]
    except (ValueError, KeyError) as error:
        return [f"{directory / MANIFEST}: is damaged ({type(error).__name__}: {error})"]
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    found = (_damage(directory / name, files[name], checksums) for name in by_size[share[0] :: share[1]])
    return [line for line in found if line]


def _damage(path: Path, expected: Mapping[str, Any], checksums: bool) -> str:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path}: expected {expected['bytes']} bytes, found {size}"
        if checksums and (found := describe_file(path)["crc32"]) != expected["crc32"]:
            return f"{path}: expected CRC-32 {expected['crc32']}, found {found}"
    except OSError as error:
        return f"{path}: expected {expected['bytes']} bytes, found none ({error.strerror})"
    return ""


# ---------------------------------------------------------------------- which checkpoint is in force, and which stay


def put_in_force(root: Path, unfinished: Path, iteration: int) -> None:
    """Give a complete checkpoint its name and the tracker its number."""
    directory = checkpoint_directory(root, iteration)
    bring_to_disk(unfinished)
    if directory.exists():  # of a run that was killed before its tracker said so, or went back behind it
        remove(root, iteration)
    unfinished.rename(directory)
    write_tracker(root, iteration)


def write_tracker(root: Path, iteration: int) -> None:
    """Name the checkpoint in force."""
    bring_to_disk(root)
    _write_durably(root / TRACKER, str(iteration))


def set_aside(root: Path, iteration: int) -> Path:
    """Rename a damaged checkpoint, if it is there, so that it is no longer taken for one; return its new name."""
    directory = checkpoint_directory(root, iteration)
    aside = directory.with_name(f"{directory.name}.damaged")
    if directory.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)
    return aside


def retire(root: Path, newest: int, keep: int, keep_every: int | None) -> None:
    """Delete complete checkpoints older than the `keep` newest, except multiples of `keep_every`.

    Incomplete ones neither count nor go. What cannot be deleted is a warning: the new checkpoint is in force.
    """
    directories = {i: checkpoint_directory(root, i) for i in iterations_up_to(root, newest)}
    complete = [i for i, directory in directories.items() if not problems(directory, checksums=False)]
    for iteration in complete[keep:]:
        if keep_every is None or iteration % keep_every:
            try:
                remove(root, iteration)
            except OSError as error:
                logger.warning("--keep-checkpoints %d: cannot delete iteration %d: %s", keep, iteration, error)


def remove(root: Path, iteration: int) -> None:
    """Delete a checkpoint: first its name, so that half of one never looks like a whole one."""
    doomed = unfinished_directory(root, iteration)
    checkpoint_directory(root, iteration).rename(doomed)
    shutil.rmtree(doomed)


def sweep(root: Path) -> None:
    """Delete what a killed run was writing or deleting."""
    for path in root.glob(f"iter_*{_UNFINISHED}"):
        logger.info("removing %s, which an earlier run did not finish", path)
        shutil.rmtree(path, ignore_errors=True)


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    bring_to_disk(path.parent)
