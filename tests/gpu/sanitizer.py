"""The `tiny` checks under NVIDIA's memory checker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu.harness import Check, Context, Rows, Skipped

SECONDS = 150.0
FOUND_ERRORS = 99


def memcheck(context: Context) -> Rows:
    """No bad access in any kernel, each allocation being one of its own."""
    context.need_cuda()
    if not context.full:
        raise Skipped("part of the full scale")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skipped("compute-sanitizer is not installed")
    limit = min(SECONDS, context.seconds_left())
    script = Path(__file__).with_name("run_kernels.py")
    checks = [sys.executable, str(script), "--device", "cuda", "--only", "tiny", "--deadline", str(limit)]
    try:
        done = subprocess.run(
            [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND_ERRORS), *checks],
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise Skipped(f"compute-sanitizer did not end within {limit:.0f} s") from None
    report = done.stdout + done.stderr
    summary = [line for line in report.splitlines() if "ERROR SUMMARY" in line]
    if not summary:
        raise Skipped(f"compute-sanitizer does not work here: {report.strip()[-300:]}")
    print(report[-3000:])
    rows = Rows()
    rows.at_most("errors found", float(done.returncode == FOUND_ERRORS), 0, note=summary[-1].strip("= "))
    return rows


CHECKS: dict[str, Check] = {"memcheck": memcheck}
