"""Checkpoints as files, without ranks and tensors: what is in force, what is damaged, what stays."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest

from megatron_trd.mcore import checkpoint_files as files


def write(root: Path, *iterations: int) -> None:
    for iteration in iterations:
        unfinished = files.unfinished_directory(root, iteration)
        unfinished.mkdir(parents=True)
        for name in ("a", "b"):
            (unfinished / name).write_text(f"{name}{iteration}")
        files.write_manifest(
            unfinished, {"iteration": iteration}, {name: files.describe_file(unfinished / name) for name in ("a", "b")}
        )
        files.put_in_force(root, unfinished, iteration)


def present(root: Path) -> list[int]:
    return files.iterations_up_to(root, 9_999_999)


def test_the_tracker_names_the_newest_and_its_errors_name_the_remedy(tmp_path: Path) -> None:
    assert files.latest_iteration(tmp_path) is None and files.resume_point(tmp_path, "auto") is None
    with pytest.raises(ValueError, match="--resume require: there is no checkpoint in"):
        files.resume_point(tmp_path, "require")
    write(tmp_path, 7, 12)
    assert (tmp_path / files.TRACKER).read_text() == "12" and files.resume_point(tmp_path, "require") == 12
    with pytest.raises(ValueError, match="--resume never: .* of iteration 12; give another --run-dir"):
        files.resume_point(tmp_path, "never")
    (tmp_path / files.TRACKER).write_text("")
    with pytest.raises(ValueError, match=f"{files.TRACKER}: holds ''; write the number"):
        files.latest_iteration(tmp_path)


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "iter_0000003/extra").touch()
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a",
        "b",
        "iter_0000003",
        files.TRACKER,
        files.MANIFEST,
    ]


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    directory = tmp_path / "iter_0000001"
    a, b = directory / "a", directory / "b"
    assert files.problems(directory) == []
    a.write_text("a2")
    checksums = [f"{zlib.crc32(text):08x}" for text in (b"a1", b"a2")]
    assert files.problems(directory) == [f"{a}: expected CRC-32 {checksums[0]}, found {checksums[1]}"]
    assert files.problems(directory, checksums=False) == []
    a.write_text("")
    b.unlink()
    missing = f"{b}: expected 2 bytes, found none (No such file or directory)"
    assert files.problems(directory) == [f"{a}: expected 2 bytes, found 0", missing]
    assert [files.problems(directory, share=(i, 2)) for i in (0, 1)] == [[f"{a}: expected 2 bytes, found 0"], [missing]]
    manifest = directory / files.MANIFEST
    manifest.write_text(manifest.read_text()[:-5])
    assert re.match(f"{manifest}: is damaged", files.problems(directory)[0])
    manifest.unlink()
    assert files.problems(directory) == [f"{directory}: has no manifest.json, which is written last"]
    assert files.problems(tmp_path / "x") == [f"{tmp_path / 'x'}: is not there"]


def test_the_newest_complete_ones_stay(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, 5, 6)
    (tmp_path / "iter_0000005/b").unlink()  # does not count, and is evidence
    files.retire(tmp_path, newest=6, keep=2, keep_every=None)
    assert present(tmp_path) == [6, 5, 4]
    write(tmp_path, 7, 8, 9)
    files.retire(tmp_path, newest=8, keep=1, keep_every=3)  # 9 is of a future that this run went back behind
    assert present(tmp_path) == [9, 8, 6, 5]
    assert not list(tmp_path.glob("*.tmp"))


def test_what_was_not_finished_is_swept_and_what_is_damaged_set_aside(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    files.unfinished_directory(tmp_path, 3).mkdir()
    assert files.set_aside(tmp_path, 2).name == "iter_0000002.damaged"
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000001", "iter_0000002.damaged", files.TRACKER}


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for directory, why in ((file, "File exists"), (file / "b", "Not a directory"), (Path("/proc/x"), "No such file")):
        with pytest.raises(ValueError, match=rf"--run-dir {directory}: cannot write there \({why}.*\); give"):
            files.require_writable(directory)
