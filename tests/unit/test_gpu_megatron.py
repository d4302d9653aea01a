"""The checks of `tests/gpu/run_megatron.py` on a CPU: the trainer passes them, and a wrong trainer is caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gpu import run_megatron
from gpu.harness import Context, Outcome, run_check
from launch import spawn

ROOT = Path(__file__).parents[2]
NEED_CUDA = {
    *("accuracy/te-bf16", "fp8/tensorwise", "fp8/delayed", "fp8/blockwise", "fp8/mxfp8"),
    *("state/nccl", "state/offload", "state/resume-offloaded", "memory/plan-te"),
    *("memory/recompute-full", "memory/recompute-selective", "memory/cpu-offloading"),
    *("speed/1.7b", "speed/1.7b-fp8", "speed/1.7b-lora"),
}


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tests/gpu/run_megatron.py"), "--device", "cpu", "--scale", "small", *flags],
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_trainer_passes_every_check_that_needs_no_gpu(tmp_path: Path) -> None:
    done = run_script("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "megatron.json").read_text())["checks"]
    skipped = {check["name"] for check in checks if check["verdict"] == "skipped"}
    assert skipped == NEED_CUDA
    for check in checks:
        assert check["name"] in done.stdout
        assert check["name"] in skipped or (check["verdict"] == "ok" and check["rows"])


def test_late_checks_do_not_run_and_unknown_ones_are_named(tmp_path: Path) -> None:
    done = run_script("--out", str(tmp_path), "--only", "state", "--deadline", "0")
    assert done.returncode == 1
    checks = json.loads((tmp_path / "megatron.json").read_text())["checks"]
    assert len(checks) == 6 and {check["verdict"] for check in checks} == {"not run"}
    with pytest.raises(SystemExit, match="--only speeds: choose from accuracy, fp8"):
        run_megatron.SCRIPT.selected("accuracy,speeds")


def too_large(*args: Any, token_weight_R: torch.Tensor, **options: Any) -> Any:
    """A loss that is 0.1 % too large."""
    from megatron_trd.objectives.loss import distillation_loss

    return distillation_loss(*args, token_weight_R=1.001 * token_weight_R, **options)


def broken(defect: str) -> Any:
    """Return the patch that makes the trainer wrong."""
    from dataclasses import replace

    from megatron_trd.mcore import checkpoint, gpt, schedule, student

    if defect == "normaliser":
        return mock.patch.object(student, "distillation_loss", too_large)
    if defect == "attention across sequences":

        def forward(chunk: Any, stream: Any, groups: Any) -> Any:
            ends = stream.cu_seqlens[[0, -1]]
            return gpt.forward_stream(chunk, replace(stream, cu_seqlens=ends, max_seqlen=int(ends[1])), groups)

        return mock.patch.object(schedule, "forward_stream", forward)
    if defect == "weight decay of norms":
        build = student.build_optimizer

        def decayed(*args: Any) -> Any:
            built = build(*args)
            for group in built[0].param_groups:
                group["wd_mult"] = 1.0
            return built

        return mock.patch.object(student, "build_optimizer", decayed)
    assert defect == "moments not restored"
    load = checkpoint.load

    def forgetful(directory: Path, trained: Any, groups: Any) -> Any:
        progress = load(directory, trained, groups)
        for part in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
            for state in part.optimizer.state.values():
                state["exp_avg"].zero_()
        return progress

    return mock.patch.object(checkpoint, "load", forgetful)


def outcome(rank: int, world: int, name: str, defect: str) -> Outcome:
    """Run one check on a trainer with a defect."""
    context = Context(operator=None, device=torch.device("cpu"), full=False, backends=())
    with broken(defect):
        return run_check(name, run_megatron.SCRIPT.checks[name], context)


@pytest.mark.parametrize(
    ("name", "defect", "found"),
    [
        ("accuracy/local-fp32", "normaliser", "dense: all gradients"),
        ("accuracy/isolation", "attention across sequences", "log-probabilities behind the first sequence"),
        ("state/adam", "weight decay of norms", "weights after 4 steps"),
        ("state/resume", "moments not restored", "losses"),
    ],
)
def test_a_wrong_trainer_is_caught(name: str, defect: str, found: str) -> None:
    (judged,) = spawn(outcome, 1, name, defect)
    assert judged.verdict == "failed" and found in judged.key, judged
