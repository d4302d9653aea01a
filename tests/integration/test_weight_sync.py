"""Weight resync by disk, end to end on real servers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.server_client import ServerState
from megatron_trd.rollout.server_process import ServerProcess
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.weight_sync.base import ServerError
from megatron_trd.weight_sync.disk import DiskWeightSync, write_hf_directory

PROMPT = (3, 20, 66, 70, 81)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


@pytest.fixture
def pair(student_dir: Path) -> Iterator[list[ServerProcess]]:
    processes = [ServerProcess.start(student_dir, weight_version="start") for _ in range(2)]
    yield processes
    for process in processes:
        process.stop()


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v.float() for k, v in load_file(directory / "model.safetensors").items()}


def test_publish_reaches_every_server_and_a_failing_one_is_left_out_until_it_is_right(
    pair: list[ServerProcess], student_dir: Path, other_dir: Path, tmp_path: Path, post: Any
) -> None:
    new = weights_of(other_dir)

    async def main() -> None:
        async with SGLangFleet([p.url for p in pair], first_backoff_s=0.01) as fleet:
            await fleet.wait_healthy()
            sync = DiskWeightSync(tmp_path / "weights", student_dir, fleet, max_shard_bytes=200_000)
            before = await fleet.generate(PROMPT, GREEDY)
            running = asyncio.create_task(
                fleet.generate(PROMPT, SamplingParams(max_new_tokens=240, temperature=0.0, stop_token_ids=()))
            )
            report = await sync.publish(new.items(), "v1")
            assert (await running).error is None
            assert report.failures == {} and report.num_bytes == sum(w.nbytes for w in new.values())
            assert [await s.read_weight_version() for s in fleet.servers] == ["v1", "v1"]
            sums = [post(p.url, "/weights_checker")[1] for p in pair]
            assert sums[0] == sums[1]
            after = await fleet.generate(PROMPT, GREEDY)
            assert after.weight_versions == ("v1",) and after.token_ids != before.token_ids
            model = AutoModelForCausalLM.from_pretrained(other_dir, dtype=torch.float32)
            ids = torch.tensor([PROMPT])
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            assert after.token_ids == tuple(expected[0, len(PROMPT) :].tolist())

            pair[1].process.kill()
            pair[1].process.wait()
            report = await sync.publish(weights_of(student_dir).items(), "v2")
            assert list(report.failures) == [pair[1].url] and "/pause_generation" in report.failures[pair[1].url]
            port = int(pair[1].url.rpartition(":")[2])
            pair[1] = await asyncio.to_thread(ServerProcess.start, student_dir, weight_version="start", port=port)
            with pytest.raises(ServerError, match="holds weights 'start', not 'v2'"):
                await fleet.wait_healthy(deadline_s=0.0)
            done = await asyncio.gather(*(fleet.generate(PROMPT, GREEDY) for _ in range(8)))
            assert {c.weight_versions for c in done} == {("v2",)} and {c.token_ids for c in done} == {before.token_ids}
            assert fleet.servers[1].state is ServerState.STALE

            for version in ("v3", "v4"):
                assert (await sync.publish(new.items(), version)).failures == {}
            assert [s.state for s in fleet.servers] == [ServerState.READY] * 2
            assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["v3", "v4"]

            broken = {**new, "model.norm.weight": torch.ones(3)}
            with pytest.raises(ServerError, match=r"no server took weights v5: .*model\.norm\.weight is \(3,\)"):
                await sync.publish(broken.items(), "v5")
            assert [await s.read_weight_version() for s in fleet.servers] == ["v4", "v4"]
            lost = await fleet.generate(PROMPT, GREEDY)
            assert lost.finish_reason == "abort" and "not 'v5'" in (lost.error or "")
            assert (await sync.publish(new.items(), "v6")).failures == {}
            assert (await fleet.generate(PROMPT, GREEDY)).token_ids == after.token_ids

    asyncio.run(main())


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 100_000, 1])
def test_written_directory_is_a_whole_model(student_dir: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    original = load_file(student_dir / "model.safetensors")
    out = tmp_path / "export"
    for _ in range(2):  # the second time it replaces the first
        num_bytes = write_hf_directory(original.items(), out, student_dir, max_shard_bytes=max_shard_bytes)
    assert num_bytes == sum(w.nbytes for w in original.values())
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    model, loading = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, original[name])
    shards = sorted(out.glob("*.safetensors"))
    stored = {name: w for shard in shards for name, w in load_file(shard).items()}
    assert stored.keys() == original.keys()
    for shard in shards:
        assert shard.stat().st_mode & 0o777 == (out / "config.json").stat().st_mode & 0o777  # servers have other users
        content = load_file(shard)
        assert sum(w.nbytes for w in content.values()) <= max_shard_bytes or len(content) == 1
    if len(shards) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
        assert index["metadata"]["total_size"] == num_bytes
    text = "3 +4 A"
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(student_dir)
    assert ours(text)["input_ids"] == theirs(text)["input_ids"] and ours.chat_template == theirs.chat_template


def test_config_names_the_dtype_that_was_written_and_a_failed_write_leaves_the_old_one(
    student_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "export"
    write_hf_directory(weights_of(student_dir).items(), out, student_dir)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def breaks() -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.norm.weight", torch.ones(64)
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_directory(breaks(), out, student_dir)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_versions_must_be_file_names(student_dir: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with SGLangFleet([]) as fleet:
            sync = DiskWeightSync(tmp_path, student_dir, fleet)
            with pytest.raises(ValueError, match=r"'\.\./x'"):
                await sync.publish([], "../x")

    asyncio.run(main())
    shutil.rmtree(tmp_path)
