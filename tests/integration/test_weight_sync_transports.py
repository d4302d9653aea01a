"""Every transport, on embedded servers and on real SGLang: the weights that were sent are the weights that answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from integration.live_fleet import (
    ENDLESS,
    checksums,
    expected_logprobs,
    fleet_of,
    make_sync,
    served_logprobs,
    weights_of,
    within_deadline,
)
from megatron_trd.config.schema import LoraConfig
from megatron_trd.rollout.server_client import ServerState
from megatron_trd.rollout.server_process import ServerProcess, spawn_sglang
from megatron_trd.weight_sync.adapter import AdapterWeightSync
from megatron_trd.weight_sync.base import ServerError
from megatron_trd.weight_sync.distributed import DistributedWeightSync

Start = Callable[..., ServerProcess]
TRANSPORTS = ("disk", "tensor", "distributed")


@pytest.fixture(scope="module", params=["embedded", "sglang"])
def started(request: pytest.FixtureRequest) -> Start:
    """Start a server of one kind; it is not healthy yet."""
    if request.param == "embedded":
        return ServerProcess.start
    return partial(spawn_sglang, python=request.getfixturevalue("sglang_python"))


@pytest.fixture(scope="module")
def pair(started: Start, student_dir: Path) -> Iterator[list[ServerProcess]]:
    """Two servers; a test publishes the weights it needs."""
    servers = [started(student_dir) for _ in range(2)]
    try:
        for server in servers:
            server.wait_until_healthy(300)
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_servers_answer_with_the_weights_they_were_sent(
    transport: str, pair: list[ServerProcess], student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    old, new = weights_of(student_dir), weights_of(other_dir)
    assert {w.dtype for w in old.values()} == {torch.bfloat16}

    async def main() -> None:
        async with fleet_of(pair) as fleet:
            await fleet.wait_healthy()
            sync = make_sync(transport, student_dir, fleet, tmp_path, check_equal=True)
            assert (await sync.publish(old.items(), f"{transport}-0")).failures == {}
            before = await checksums(fleet.servers)
            running = [asyncio.create_task(fleet.generate((3, 20 + i), ENDLESS)) for i in range(4)]
            while not all(server.num_in_flight for server in fleet.servers):
                await asyncio.sleep(0)
            report = await sync.publish(new.items(), f"{transport}-1")
            assert report.failures == {} and report.num_bytes == sum(w.nbytes for w in new.values())
            done = await asyncio.gather(*running)
            assert [c.error for c in done] == [None] * 4
            assert {c.weight_versions[-1] for c in done} <= {f"{transport}-0", f"{transport}-1"}
            for server in fleet.servers:
                assert await server.read_weight_version() == f"{transport}-1"
                np.testing.assert_allclose(await served_logprobs(server), expected_logprobs(other_dir), atol=2e-5)
            between = await checksums(fleet.servers)
            assert between[0] == between[1] and not set(between[0].values()) & set(before[0].values())
            group = sync.group.name if isinstance(sync, DistributedWeightSync) and sync.group else None
            assert (await sync.publish(old.items(), f"{transport}-2")).failures == {}
            assert await checksums(fleet.servers) == before  # bfloat16 arrives bit by bit
            if isinstance(sync, DistributedWeightSync):
                assert sync.group is not None and sync.group.name == group is not None
            await sync.close()

    within_deadline(main())


def test_a_server_started_on_the_weights_has_the_same_checksums(
    pair: list[ServerProcess], started: Start, student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    reference = started(other_dir)

    async def main() -> None:
        async with fleet_of(pair) as fleet, fleet_of([reference]) as whole:
            await asyncio.gather(fleet.wait_healthy(), whole.wait_healthy())
            expected = await checksums(whole.servers)
            for transport in TRANSPORTS:
                sync = make_sync(transport, student_dir, fleet, tmp_path)
                await sync.publish(weights_of(other_dir).items(), transport)
                assert await checksums(fleet.servers) == expected * 2
                await sync.publish(weights_of(student_dir).items(), f"not {transport}")
                assert await checksums(fleet.servers) != expected * 2
                await sync.close()

    try:
        reference.wait_until_healthy(300)
        within_deadline(main())
    finally:
        reference.stop()


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
@pytest.mark.parametrize("fault", ["shape", "unknown", "twice", "missing", "raises"])
def test_an_export_that_does_not_fit_never_counts_and_servers_go_on(
    transport: str, fault: str, pair: list[ServerProcess], student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    good, new = weights_of(student_dir), weights_of(other_dir)
    first, *_, last = good

    def export() -> Iterator[tuple[str, torch.Tensor]]:
        if fault == "shape":
            yield first, torch.zeros(3, 3)
        if fault == "unknown":
            yield "model.layers.9.input_layernorm.weight", torch.zeros(64)
        if fault == "twice":
            yield first, new[first]
        for name, weight in new.items():
            if name == last:
                if fault == "raises":
                    raise ValueError("a rank died")
                if fault == "missing":
                    return
            yield name, weight

    words = {"shape": r"\(3, 3\), not", "unknown": r"layers\.9", "twice": "comes twice", "raises": "a rank died"}

    async def main() -> None:
        async with fleet_of(pair) as fleet:
            await fleet.wait_healthy()
            sync = make_sync(transport, student_dir, fleet, tmp_path)
            await sync.publish(good.items(), "good")
            before = await checksums(fleet.servers)
            with pytest.raises(ValueError, match=words.get(fault, f"missing {last}")):
                await sync.publish(export(), "bad")
            assert [s.state for s in fleet.servers] == [ServerState.STALE] * 2
            assert [await s.read_weight_version() for s in fleet.servers] == ["broken-bad"] * 2
            if fault in ("shape", "unknown"):
                assert await checksums(fleet.servers) == before
            for server in fleet.servers:  # it decodes, however wrongly
                assert len(await served_logprobs(server)) == 7
            lost = await fleet.generate((3, 20), ENDLESS)
            assert lost.finish_reason == "abort" and not lost.token_ids
            assert (await sync.publish(good.items(), "good again")).failures == {}
            assert await checksums(fleet.servers) == before
            await sync.close()

    within_deadline(main())


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_a_server_of_another_model_is_told_apart_before_anything_is_sent(
    transport: str, pair: list[ServerProcess], student_dir: Path, tmp_path: Path
) -> None:
    deeper = {k.replace("layers.0", "layers.7"): v for k, v in weights_of(student_dir).items()}
    (tmp_path / "config.json").write_text((student_dir / "config.json").read_text())
    save_file(deeper, tmp_path / "model.safetensors")

    async def main() -> None:
        async with fleet_of(pair) as fleet:
            await fleet.wait_healthy()
            before = await checksums(fleet.servers)
            sync = make_sync(transport, tmp_path, fleet, tmp_path)
            with pytest.raises(ServerError, match=r"does not know model\.layers\.7.*besides model\.layers\.0"):
                await sync.publish(deeper.items(), "other")
            assert await checksums(fleet.servers) == before
            good = make_sync(transport, student_dir, fleet, tmp_path)
            assert (await good.publish(weights_of(student_dir).items(), "good")).failures == {}
            await good.close()

    within_deadline(main())


@pytest.mark.parametrize("kind", ["embedded", "sglang"])
def test_an_adapter_answers_like_the_merged_weights(
    kind: str, request: pytest.FixtureRequest, student_dir: Path
) -> None:
    lora = LoraConfig(lora_rank=4, lora_alpha=8.0)
    base = weights_of(student_dir)
    generator = torch.Generator().manual_seed(11)

    def adapter() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        tensors, merged = {}, {k: v.float() for k, v in base.items()}
        for name, weight in base.items():
            if name.endswith("_proj.weight"):
                a, b = (torch.randn(s, generator=generator) * 0.1 for s in ((4, weight.shape[1]), (weight.shape[0], 4)))
                prefix = f"base_model.model.{name.removesuffix('.weight')}"
                tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
                merged[name] += lora.lora_alpha / lora.lora_rank * b @ a
        return tensors, merged

    async def main(url: str) -> None:
        async with fleet_of([url]) as fleet:
            await fleet.wait_healthy()
            (server,) = fleet.servers
            start, before = await server.read_weight_version(), await checksums(fleet.servers)
            sync = AdapterWeightSync(lora, student_dir, fleet)
            for version in ("a1", "a2", "a3", "a3"):  # the last is a second try
                tensors, merged = adapter()
                report = await sync.publish(tensors.items(), version)
                assert report.failures == {} and fleet.adapter == f"trd-{version}"
                assert report.num_bytes == sum(t.nbytes for t in tensors.values())
                served = await fleet.score((3, 20, 66, 70, 81), (85, 88, 12, 40, 7, 3, 66))
                np.testing.assert_allclose(served, expected_logprobs(student_dir, merged), atol=5e-5)
            np.testing.assert_allclose(await served_logprobs(server), expected_logprobs(student_dir), atol=2e-5)
            assert await checksums(fleet.servers) == before
            with pytest.raises(ServerError, match="trd-a1"):
                await server.unload_adapter("trd-a1")
            for version in ("a2", "a3"):
                await server.unload_adapter(f"trd-{version}")
            await server.name_weights(start)

    if kind == "sglang":
        within_deadline(main(request.getfixturevalue("sglang_server")))
        return
    embedded = ServerProcess.start(student_dir)
    try:
        within_deadline(main(embedded.url))
    finally:
        embedded.stop()


def test_a_server_without_lora_names_the_flags(pair: list[ServerProcess], student_dir: Path) -> None:
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB"]

    async def main() -> None:
        async with fleet_of(pair) as fleet:
            await fleet.wait_healthy()
            sync = AdapterWeightSync(LoraConfig(lora_rank=4), student_dir, fleet)
            with pytest.raises(ServerError, match=r"--enable-lora --max-lora-rank 4 --lora-target-modules q_proj"):
                await sync.publish([(name, torch.zeros(4, 4)) for name in names], "x")

    within_deadline(main())
