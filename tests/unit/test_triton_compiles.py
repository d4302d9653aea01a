"""The Triton kernels compile for a Hopper GPU, as far as ptxas goes without one: no spills, full-width loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]


def test_kernels_fit_into_registers_and_load_full_width(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, ROOT / "tests/triton_compile.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 10
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["widest_load"] == 16, kernel
        # With 8 warps a program, up to 128 registers let two or more run on a multiprocessor at once.
        assert kernel["registers"] <= 128, kernel
