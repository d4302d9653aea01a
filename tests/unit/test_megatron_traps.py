"""Ways in which Megatron-Core 0.16 fails without a word; each has cost somebody a day."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launch import ROOT
from megatron_trd.config.cli import parse_config

LIGHT = """
import sys
import megatron_trd.train
heavy = [name for name in ("torch", "megatron.core", "transformers", "aiohttp") if name in sys.modules]
assert not heavy, heavy
"""
WITHOUT_PSUTIL = """
import sys
sys.modules["psutil"] = None
try:
    import megatron_trd.mcore.checkpoint
except ImportError as error:
    assert "psutil" in str(error)
else:
    raise SystemExit("imported")
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_main_imports_in_no_time() -> None:
    """So that a wrong flag is refused, and --help answers, at once."""
    result = python(LIGHT)
    assert result.returncode == 0, result.stderr


def test_missing_psutil_is_named_at_the_start_instead_of_at_the_first_save() -> None:
    result = python(WITHOUT_PSUTIL)
    assert result.returncode == 0, result.stderr
    assert '"psutil"' in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # Selective recompute of norms needs Transformer Engine and fails in the backward pass without it.
        (
            ["--recompute-granularity", "selective", "--recompute-modules", "layernorm", "--transformer-impl", "local"],
            "--recompute-modules layernorm: needs Transformer Engine",
        ),
        # Without Transformer Engine Megatron ignores fp8 and trains in plain precision.
        (
            ["--fp8-format", "hybrid", "--transformer-impl", "local"],
            "--fp8-format hybrid: Megatron's own layers have no FP8; use --transformer-impl transformer_engine",
        ),
        (
            ["--num-virtual-stages-per-pipeline-rank", "2"],
            "--num-virtual-stages-per-pipeline-rank 2: needs --pipeline-model-parallel-size > 1",
        ),
        (["--context-parallel-size", "0"], "--context-parallel-size 0: give a positive integer"),
    ],
)
def test_what_would_fail_later_is_refused_at_start(flags, message, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--hf-checkpoint", "x", "--trajectories", "y", *flags])
    assert message in capsys.readouterr().err
