"""The benchmark of the KL operator as a command: its table, its JSON and its refusals, on a toy shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKENS, VOCAB, STUDENT, TEACHER = 300, 500, 32, 48
SHAPE = f"--tokens {TOKENS} --vocab-size {VOCAB} --student-hidden {STUDENT} --teacher-hidden {TEACHER}".split()
VARIANTS = ("gemm-only", "ours", "naive", "chunks-256")
OBJECTIVES = ("forward_kl", "reverse_kl", "jsd", "top_k")
HEADS = ("frozen", "trainable")


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "kernels/bench/bench_linear_kl.py", *SHAPE, "--device", "cpu", "--no-compile"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    return subprocess.run(
        [*command, "--repeats", "2", "--warmup", "1", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "table.json"
    # Chunks of 128 leave a ragged last one of 44 rows.
    run = bench("--variants", ",".join((*VARIANTS, "naive-compiled")), "--chunk", "128", "--json", str(path))
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(path.read_text()) | {"stdout": run.stdout}


def test_every_row_asked_for_is_in_table_and_json(table: dict[str, Any]) -> None:
    want = {(variant, objective, head) for variant in VARIANTS for objective in OBJECTIVES for head in HEADS}
    assert {(row["variant"], row["objective"], row["head"]) for row in table["rows"]} == want
    assert len(table["rows"]) == len(want)
    lines = [line.split() for line in table["stdout"].splitlines()]
    assert {tuple(words[:3]) for words in lines if words[0] in VARIANTS} == want
    assert f"N {TOKENS}, V {VOCAB}, Hs {STUDENT}, Ht {TEACHER}, torch.float32" in table["stdout"]
    skipped = [line for line in table["stdout"].splitlines() if line.startswith("skipped naive-compiled")]
    assert len(skipped) == len(table["skipped"]) == len(OBJECTIVES) * len(HEADS)
    assert all(line.endswith("--no-compile") for line in skipped)


def test_numbers_of_a_row(table: dict[str, Any]) -> None:
    ideal = {(row["objective"], row["head"]): row["ms"] for row in table["rows"] if row["variant"] == "gemm-only"}
    for row in table["rows"]:
        assert row["error"] is None
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["ratio"] == pytest.approx(row["ms"] / ideal[row["objective"], row["head"]])
        student_products = 2 if row["head"] == "frozen" else 3
        flops = 2 * TOKENS * VOCAB * (student_products * STUDENT + TEACHER)
        assert row["tflops"] == pytest.approx(flops / row["ms"] / 1e9)
        assert (row["extra_mib"] is None) == (row["variant"] == "gemm-only")


def test_gradients_of_all_variants_are_those_of_the_same_loss(table: dict[str, Any]) -> None:
    for row in table["rows"]:
        if row["variant"] == "gemm-only":
            assert row["dh_error"] is row["dw_error"] is None
            continue
        assert 0 < row["dh_error"] <= 1e-4, row
        assert (row["dw_error"] is None) == (row["head"] == "frozen")
        assert row["dw_error"] is None or 0 < row["dw_error"] <= 1e-4, row


def test_gemm_only_repeats_three_products_or_four(table: dict[str, Any]) -> None:
    """Both heads forward and dH; dW as well where the head is trainable."""
    want = {
        "frozen": 2 * TOKENS * VOCAB * (2 * STUDENT + TEACHER),
        "trainable": 2 * TOKENS * VOCAB * (3 * STUDENT + TEACHER),
    }
    rows = [row for row in table["rows"] if row["variant"] == "gemm-only"]
    assert [row["product_flops"] for row in rows] == [want[row["head"]] for row in rows]


def test_a_sweep_has_rows_for_each_chunk_and_an_error_does_not_end_it(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    run = bench("--sweep-chunks", "48:32,64,32:128", "--objectives", "jsd", "--heads", "frozen", "--json", str(path))
    assert run.returncode == 1, run.stdout + run.stderr
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    chunks = ("48:32", "64", "32:128")
    assert rows.keys() == {f"{variant} {chunk}" for variant in ("gemm-only", "ours") for chunk in chunks}
    failed = rows["ours 48:32"]
    assert failed["error"].startswith("ValueError: ") and "chunk" in failed["error"] and failed["ms"] is None
    assert failed["error"].splitlines()[0] in run.stdout
    for chunk in chunks[1:]:
        ours, ideal = rows[f"ours {chunk}"], rows[f"gemm-only {chunk}"]
        assert ours["error"] is None
        assert ours["ratio"] == pytest.approx(ours["ms"] / ideal["ms"])


@pytest.mark.parametrize(
    "options, words",
    [
        (("--variants", "ours,fastest"), ("--variants", "'fastest'", "gemm-only, ours, ours-torch", "liger-chunked")),
        (("--sweep-chunks", "64:x"), ("--sweep-chunks", "'64:x'")),
    ],
)
def test_a_wrong_option_is_named(options: tuple[str, ...], words: tuple[str, ...]) -> None:
    run = bench(*options)
    assert run.returncode == 2
    for word in words:
        assert word in run.stderr
