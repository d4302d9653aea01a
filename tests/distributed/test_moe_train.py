"""The whole loop with a student of experts: its server gets the weights expert by expert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from launch import ROOT, torchrun
from megatron_trd.rollout.server_process import launch_embedded_server
from tiny_models import make_model

EXAMPLE = ROOT / "examples/quickstart_cpu"


def test_experts_are_trained_published_and_exported(tmp_path: Path) -> None:
    dense = EXAMPLE / "models/student"
    vocab_size = json.loads((dense / "config.json").read_text())["vocab_size"]
    model = make_model(tmp_path / "model", family="qwen3_moe", vocab_size=vocab_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(dense / name, model)
    run_dir = tmp_path / "run"
    with launch_embedded_server(model) as server:
        flags = {
            "config": EXAMPLE / "config.yaml",
            "hf-checkpoint": model,
            "run-dir": run_dir,
            "save-hf": tmp_path / "exported",
            "student-urls": server,
            "teacher-urls": server,
            "opsd-teacher": "current",
            "weight-sync": "distributed",
            "expert-model-parallel-size": 2,
            "expert-tensor-parallel-size": 1,
            "num-iterations": 2,
            "rollout-batch-size": 8,
            "global-batch-size": 8,
            "eval-num-problems": 0,
        }
        arguments = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        result = torchrun(2, "-m", "megatron_trd.train", *arguments, "--use-distributed-optimizer", timeout_s=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(line["weights/logprob_gap_max"] for line in lines) < 1e-3, "the server holds other weights"
    assert all(line["distill/expert_imbalance"] > 1 for line in lines)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "exported/model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "gate.weight" in name)
