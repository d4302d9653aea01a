"""The trainer on every transport: what it exports is what the servers answer with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import ROOT, torchrun
from megatron_trd.rollout.server_process import ServerProcess

EXAMPLE = ROOT / "examples/quickstart_cpu"
STUDENT = EXAMPLE / "models/student"
QUICK = ["--num-iterations", "2", "--rollout-batch-size", "16", "--global-batch-size", "8", "--eval-num-problems", "0"]


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    servers = [ServerProcess.start(STUDENT) for _ in range(2)]
    yield [server.url for server in servers]
    for server in servers:
        server.stop()


@pytest.mark.parametrize("transport", ["adapter", "tensor", "distributed"])  # an adapter needs the first weights
def test_servers_follow_the_trainer(transport: str, urls: list[str], tmp_path: Path) -> None:
    flags = ["-m", "megatron_trd.train", "--config", str(EXAMPLE / "config.yaml"), "--hf-checkpoint", str(STUDENT)]
    flags += ["--run-dir", str(tmp_path), "--student-urls", *urls, "--teacher-urls", urls[0], "--mode", "opsd", *QUICK]
    flags += ["--weight-sync", transport, "--weight-sync-bucket-mb", "1", "--check-weight-update-equal"]
    if transport == "adapter":
        flags += ["--lora-rank", "4"]
    result = torchrun(2, *flags, timeout_s=400)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert line["server/ready"] == 2 and line["server/stale"] == 0
        assert line["weights/logprob_gap_max"] < 1e-3
        assert line["train/grad_norm"] > 0
    assert not (tmp_path / "weights").exists()
