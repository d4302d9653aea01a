"""The checks of `tests/gpu` on a CPU: they pass on the operator, and each catches an operator that is wrong."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu import performance, run_kernels
from gpu.harness import Context, Outcome, Rows, run_check
from trd_kernels import LinearKLDivOutput, linear_kl_div

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "run_kernels.py"
NEED_CUDA = {
    "accuracy/products",
    "memory/growth",
    "memory/workspace",
    "memory/gradients-by-need",
    "calls/synchronisations",
    "rivals/compiled",
    "sanitizer/memcheck",
}


def context(operator: Callable[..., Any] = linear_kl_div) -> Context:
    """Return toy sizes on the CPU."""
    return Context(operator=operator, device=torch.device("cpu"), full=False, backends=("torch",))


def outcome_of(name: str, operator: Callable[..., Any]) -> Outcome:
    """Run one check on an operator."""
    return run_check(name, run_kernels.SCRIPT.checks[name], context(operator))


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as on a GPU, but on the CPU and with plain torch alone."""
    inherited = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--scale", "small", *flags],
        env=inherited | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_operator_passes_every_check_that_needs_no_gpu(tmp_path: Path) -> None:
    done = run_script("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "kernels.json").read_text())["checks"]
    assert [check["name"] for check in checks] == list(run_kernels.SCRIPT.checks)
    skipped = {check["name"] for check in checks if check["verdict"] == "skipped"}
    assert skipped == NEED_CUDA
    for check in checks:
        assert check["name"] in done.stdout
        assert check["name"] in skipped or (check["verdict"] == "ok" and check["rows"])


def test_a_failure_is_the_exit_code_and_late_checks_do_not_run(tmp_path: Path) -> None:
    done = run_script("--out", str(tmp_path), "--only", "shapes", "--deadline", "0")
    assert done.returncode == 1
    checks = json.loads((tmp_path / "kernels.json").read_text())["checks"]
    assert len(checks) == 7 and {check["verdict"] for check in checks} == {"not run"}


def test_an_unknown_check_is_named() -> None:
    done = run_script("--only", "tiny,shape")
    assert done.returncode == 1 and "--only shape: choose from tiny, accuracy" in done.stderr


def flipped_gradient(*heads: Tensor, **options: Any) -> LinearKLDivOutput:
    """The right value with the gradient of its negative."""
    out = linear_kl_div(*heads, **options)
    return out._replace(loss=2 * out.loss.detach() - out.loss)


def gradient_of_bf16_logits(*heads: Tensor, vocab_size: int, **options: Any) -> LinearKLDivOutput:
    """The right forward KL with the gradient that logits rounded to bf16 give."""
    out = linear_kl_div(*heads, vocab_size=vocab_size, **options)
    z_student, z_teacher = ((heads[i].float() @ heads[i + 1][:vocab_size].float().T) for i in (0, 2))
    rounded = z_student + (z_student.bfloat16() - z_student).detach()
    log_q, log_p = rounded.log_softmax(1), z_teacher.bfloat16().float().log_softmax(1)
    loss = (options["token_weight"][:, None] * log_p.exp() * (log_p - log_q)).sum()
    return out._replace(loss=loss + (out.loss - loss).detach())


def padding_takes_part(*heads: Tensor, vocab_size: int, **options: Any) -> LinearKLDivOutput:
    """Columns behind the vocabulary count."""
    del vocab_size
    return linear_kl_div(*heads, vocab_size=len(heads[1]), **options)


def dropped_tokens_take_part(*heads: Tensor, token_weight: Tensor, **options: Any) -> LinearKLDivOutput:
    """A weight of 0 is a small weight."""
    return linear_kl_div(*heads, token_weight=token_weight.clamp(min=1e-20), **options)


def noisy(*heads: Tensor, **options: Any) -> LinearKLDivOutput:
    """Values that change from call to call, by little more than rounding does."""
    out = linear_kl_div(*heads, **options)
    return out._replace(token_loss=out.token_loss * (1 + 1e-6 * torch.rand_like(out.token_loss)))


def assumes_contiguity(*heads: Tensor, **options: Any) -> LinearKLDivOutput:
    """Ignores the strides of the teacher's hidden states."""
    student_input, student_weight, x, teacher_weight = heads
    packed = x.as_strided(x.shape, (x.shape[1], 1))
    return linear_kl_div(student_input, student_weight, packed, teacher_weight, **options)


def forgets_the_last_chunk(*heads: Tensor, token_weight: Tensor, **options: Any) -> LinearKLDivOutput:
    """Tokens that do not fill a chunk are left out."""
    size = options.get("chunk", 1)
    kept = token_weight.nonzero().squeeze(1)
    full = len(kept) - len(kept) % (size if isinstance(size, int) else size[1])
    weight = token_weight.clone()
    weight[kept[full:]] = 0.0
    return linear_kl_div(*heads, token_weight=weight, **options)


def nearly_zero(*heads: Tensor, **options: Any) -> LinearKLDivOutput:
    """The value of the usual formula, which cancels."""
    out = linear_kl_div(*heads, **options)
    return out._replace(token_loss=out.token_loss + 1e-9)


def shuffled_ids(*heads: Tensor, **options: Any) -> LinearKLDivOutput:
    """The likeliest ids in the wrong order."""
    out = linear_kl_div(*heads, **options)
    return out._replace(stats=out.stats | {"teacher_top_ids": out.stats["teacher_top_ids"].flip(1)})


def adds_twice(*heads: Tensor, **options: Any) -> LinearKLDivOutput:
    """With the factor known, the head's gradient is added in the forward pass once too often."""
    out = linear_kl_div(*heads, **options)
    if options["grad_weight_factor"] is not None:
        with torch.no_grad():
            linear_kl_div(*heads, **{**options, "grad_weight_out": None, "grad_weight_factor": None})
        options["grad_weight_out"] += 1e-3 * options["grad_weight_out"].std()
    return out


def ignores_the_upstream_gradient(*heads: Tensor, **options: Any) -> LinearKLDivOutput:
    """Gradients of the loss itself, whatever it is multiplied by."""
    out = linear_kl_div(*heads, **options)
    out.loss.register_hook(torch.ones_like)
    return out


def other_bits_in_a_group(*heads: Tensor, **options: Any) -> LinearKLDivOutput:
    """In a process group the loss is rounded once more."""
    out = linear_kl_div(*heads, **options)
    return out._replace(loss=out.loss.bfloat16().float()) if options.get("tp_group") else out


def raises(*heads: Tensor, **options: Any) -> LinearKLDivOutput:
    """Does not run at all."""
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("operator", "name", "row"),
    [
        (flipped_gradient, "tiny/fp32", "torch forward dH"),
        (flipped_gradient, "accuracy/bf16-kl-0.24", "torch top-k-tail dW"),
        (gradient_of_bf16_logits, "tiny/bf16", "torch forward dH"),
        (gradient_of_bf16_logits, "accuracy/bf16-kl-0.025", "torch forward dH"),
        (gradient_of_bf16_logits, "accuracy/bf16-kl-0.002", "torch forward dW"),
        (gradient_of_bf16_logits, "accuracy/fp32-kl-0.24", "torch forward dH"),
        (shuffled_ids, "accuracy/likeliest-ids", "torch teacher ids"),
        (noisy, "determinism/twenty-runs", "torch forward token loss: runs that differ"),
        (padding_takes_part, "shapes/vocabulary-sizes", "torch bf16 forward V=1 dH"),
        (padding_takes_part, "shapes/poison", "torch forward 50.0 loss"),
        (dropped_tokens_take_part, "shapes/no-tokens", "torch forward all masked loss"),
        (dropped_tokens_take_part, "shapes/poison", "torch forward nan loss"),
        (assumes_contiguity, "shapes/layouts", "torch bf16 column-major dH"),
        (forgets_the_last_chunk, "shapes/chunks", "torch {'chunk': 7} loss"),
        (gradient_of_bf16_logits, "shapes/offsets", "torch fp32 forward +60 dH"),
        (nearly_zero, "shapes/equal-heads", "torch bf16 forward"),
        (adds_twice, "calls/main-grad", "torch fp32 factor known: padding"),
        (ignores_the_upstream_gradient, "calls/upstream-factor", "torch dH"),
        (other_bits_in_a_group, "calls/group-of-one", "torch forward group alone loss"),
        (raises, "shapes/offsets", "torch bf16 forward +60"),
    ],
)
def test_a_wrong_operator_is_caught(operator: Callable[..., Any], name: str, row: str) -> None:
    outcome = outcome_of(name, operator)
    assert outcome.verdict == "failed", outcome.key
    missed = [entry["what"] for entry in outcome.rows if not entry["met"]]
    assert row in missed, missed
    assert operator is not gradient_of_bf16_logits or not any("forward" in what and "loss" in what for what in missed)


def test_checks_go_on_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = argparse.Namespace(device="cpu", scale="small")
    names = ["shapes/chunks", "memory/growth"]
    outcomes = run_kernels.SCRIPT.in_a_new_process(names, args, 60.0)
    assert [(outcome.name, outcome.verdict) for outcome in outcomes] == list(zip(names, ["ok", "skipped"], strict=True))


def table_of(**changes: Any) -> dict[str, Any]:
    """Return the benchmark's JSON with all targets met, but for `changes` to the operator's line."""
    line = {"objective": "jsd", "head": "frozen", "tflops": 700.0, "extra_mib": 1200.0, "dh_error": 2e-3, "error": None}
    ours = line | {"variant": "ours", "ms": 34.0, "ratio": 1.1}
    rivals = [line | {"variant": "liger-jsd", "ms": 180.0, "ratio": 6.0, "dh_error": 0.1}]
    settings = {"tokens": 8192, "student_hidden": 2048}
    return {"settings": settings, "rows": [ours | changes, *rivals]}


@pytest.mark.parametrize(
    ("changes", "binding", "reported"),
    [
        ({}, [], []),
        ({"dh_error": 5e-3}, ["jsd frozen ours: dH error"], []),
        ({"dh_error": float("nan")}, ["jsd frozen ours: dH error"], []),
        ({"extra_mib": 1280.0}, [], []),
        ({"extra_mib": 1300.0}, ["jsd frozen ours: extra MiB beside the gradient of the hidden states"], []),
        ({"ratio": 1.3}, [], ["jsd frozen ours: time over products alone"]),
        ({"ms": 90.0}, [], ["jsd frozen ours: time over liger-jsd"]),
    ],
)
def test_targets_of_the_benchmark(changes: dict[str, Any], binding: list[str], reported: list[str]) -> None:
    rows = performance.judged(table_of(**changes), targets=True)
    missed = [row for row in rows if not row.met]
    assert [row.what for row in missed if row.binding] == binding
    assert [row.what for row in missed if not row.binding] == reported


def test_a_benchmark_without_ours_fails() -> None:
    with pytest.raises(AssertionError, match="ours was not measured"):
        performance.judged(table_of(error="RuntimeError: out of memory"), targets=True)


def test_a_check_that_measures_nothing_fails() -> None:
    assert run_check("empty", lambda _: Rows(), context()).verdict == "failed"


def test_time_is_up_before_a_check_begins() -> None:
    late = replace(context(), deadline=0.0)
    assert run_check("late", lambda _: Rows(), late).verdict == "not run"
