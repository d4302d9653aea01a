"""A mixture of experts on real SGLang: it takes weights by every transport, and computes as transformers do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from integration.live_fleet import (
    checksums,
    expected_logprobs,
    fleet_of,
    make_sync,
    served_logprobs,
    weights_of,
    within_deadline,
)
from megatron_trd.rollout.server_process import launch_sglang
from tiny_models import make_model

TRANSPORTS = ("disk", "tensor", "distributed")


def make_experts(directory: Path, tokenizer_of: Path, seed: int) -> Path:
    settings = {"vocab_size": 92, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 1}
    make_model(directory, family="qwen3_moe", seed=seed, **settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_of / name, directory)
    return directory


@pytest.fixture(scope="module")
def experts(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("experts")
    return [make_experts(root / str(seed), student_dir, seed) for seed in range(len(TRANSPORTS) + 1)]


@pytest.fixture(scope="module")
def url(sglang_python: Path, experts: list[Path]) -> Iterator[str]:
    with launch_sglang(experts[0], python=sglang_python) as url:
        yield url


def test_weights_arrive_by_every_transport(url: str, experts: list[Path], tmp_path: Path) -> None:
    async def main() -> None:
        async with fleet_of([url]) as fleet:
            await fleet.wait_healthy()
            (server,) = fleet.servers
            np.testing.assert_allclose(await served_logprobs(server), expected_logprobs(experts[0]), atol=2e-5)
            seen = await checksums(fleet.servers)
            for transport, directory in zip(TRANSPORTS, experts[1:], strict=True):
                sync = make_sync(transport, experts[0], fleet, tmp_path, timeout_s=60.0)
                report = await sync.publish(weights_of(directory).items(), transport)
                assert report.failures == {}
                np.testing.assert_allclose(await served_logprobs(server), expected_logprobs(directory), atol=2e-5)
                seen += await checksums(fleet.servers)
                await sync.close()
            assert all(a != b for i, a in enumerate(seen) for b in seen[:i])

    within_deadline(main())
