"""New weights by every way in: what is held afterwards is read back byte by byte, and served as transformers would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from integration.wire import (
    LONG,
    PROMPT,
    TIMEOUT_S,
    Engine,
    Running,
    as_bytes,
    bucket,
    in_background,
    logprobs,
    pickled,
    random_prompts,
    read_weights,
)
from megatron_trd.rollout.server_process import free_port
from megatron_trd.weight_sync.process_group import join_group, leave_group

TOLERANCE = 1e-4
Weights = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def hf_other(other_dir: Path) -> torch.nn.Module:
    """The disturbed student, run by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(other_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def other(other_dir: Path) -> Weights:
    """Its weights."""
    return read_weights(other_dir)


def assert_serves(engine: Engine, weights: Weights, model: Any, version: str, **more: Any) -> None:
    """The server holds these bytes under this name, and samples and scores with them."""
    assert engine.checksums() == engine.expected_checksums(weights)
    assert engine.get("/model_info")["weight_version"] == version
    rows = random_prompts(4, seed=2)
    answers = engine.generate(rows, {"temperature": 0.8, "max_new_tokens": 12}, logprob_start_len=0, **more)
    for row, answer in zip(rows, answers, strict=True):
        meta, out = answer["meta_info"], answer["output_ids"]
        assert meta["weight_versions"] == [{"version": version, "start": 0, "end": len(out)}]
        np.testing.assert_allclose(
            [entry[0] for entry in meta["input_token_logprobs"][1:]], logprobs(model, row), atol=TOLERANCE
        )
        np.testing.assert_allclose(
            [entry[0] for entry in meta["output_token_logprobs"]],
            logprobs(model, row + out, 0.8)[len(row) - 1 :],
            atol=TOLERANCE,
        )


@contextmanager
def group_of(name: str, *engines: Engine) -> Iterator[dist.ProcessGroup]:
    """A gloo group: this process is rank 0, the servers are 1, 2, ..."""
    port = free_port()
    where = {"master_address": "127.0.0.1", "master_port": port, "group_name": name, "backend": "gloo"}
    size = 1 + len(engines)
    joining = [
        in_background(e.post, "/init_weights_update_group", rank_offset=i, world_size=size, **where)
        for i, e in enumerate(engines, 1)
    ]
    group = join_group("127.0.0.1", port, 0, size, name, "gloo", TIMEOUT_S)
    assert all(future.result(TIMEOUT_S)["success"] for future in joining)
    try:
        yield group
    finally:
        for engine in engines:
            engine.post("/destroy_weights_update_group", group_name=name)
        leave_group(group)


def broadcast(group: Any, name: str, weights: Weights, version: str, flattened: bool, *engines: Engine) -> None:
    """Send weights to servers whose sessions are open."""
    body: dict[str, Any] = {
        "names": list(weights),
        "dtypes": [str(w.dtype).removeprefix("torch.") for w in weights.values()],
        "shapes": [list(w.shape) for w in weights.values()],
        "group_name": name,
        "weight_version": version,
    }
    if flattened:
        body["load_format"] = "flattened_bucket"
    taking = [in_background(e.post, "/update_weights_from_distributed", **body) for e in engines]
    for tensor in [as_bytes(weights.values())] if flattened else [w.contiguous() for w in weights.values()]:
        dist.broadcast(tensor, src=0, group=group)
    assert all(future.result(TIMEOUT_S)["success"] for future in taking)


# ------------------------------------------------------------------ from disk


def test_from_disk(restored: Engine, other_dir: Path, other: Weights, hf_other: Any) -> None:
    restored.load(other_dir, "v1")
    assert_serves(restored, other, hf_other, "v1")
    assert restored.get("/model_info")["model_path"] == str(other_dir)


def test_from_a_bad_path_keeps_the_old_weights(engine: Engine, served_dir: Path, hf_student: Any) -> None:
    status, answer = engine.send("/update_weights_from_disk", {"model_path": "/nowhere", "weight_version": "v1"})
    assert status == 400 and answer["success"] is False and "/nowhere" in answer["message"]
    assert_serves(engine, read_weights(served_dir), hf_student, "default")


def test_from_disk_waits_for_what_runs(
    restored: Engine, other_dir: Path, other: Weights, hf_student: Any, hf_other: Any
) -> None:
    if restored.differs("unpaused"):
        pytest.skip("SGLang may die of an update while requests run, which the client must prevent (DIFFERENCES)")
    running = Running(restored, "before", LONG)
    loading = in_background(restored.post, "/update_weights_from_disk", model_path=str(other_dir), weight_version="v1")
    answer = running.finish()
    assert loading.result(TIMEOUT_S)["success"] is True
    assert [span["version"] for span in answer["meta_info"]["weight_versions"]] == ["default"]
    out = answer["output_ids"]
    np.testing.assert_allclose(
        [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]],
        logprobs(hf_student, PROMPT + out, LONG["temperature"])[len(PROMPT) - 1 :],
        atol=TOLERANCE,
    )
    assert_serves(restored, other, hf_other, "v1")


# ------------------------------------------------------------------ tensors in the request


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_from_tensor(restored: Engine, other: Weights, hf_other: Any, load_format: str | None) -> None:
    names = list(other)
    parts = [{n: other[n] for n in names[::2]}, {n: other[n] for n in names[1::2]}]
    with restored.update():
        for part in parts:
            content = list(part.items()) if load_format is None else bucket(part)
            answer = restored.post(
                "/update_weights_from_tensor",
                serialized_named_tensors=[pickled(content)],
                load_format=load_format,
                weight_version="v1",
            )
            assert answer["success"] is True
    assert_serves(restored, other, hf_other, "v1")


def test_from_tensor_takes_bfloat16_and_a_part_of_the_weights(restored: Engine, served_dir: Path) -> None:
    weights = read_weights(served_dir)
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = (weights[name].float() * 1.5).bfloat16()
    with restored.update():
        restored.post("/update_weights_from_tensor", serialized_named_tensors=[pickled([(name, weights[name])])])
    assert restored.checksums() == restored.expected_checksums(weights)
    assert restored.get("/model_info")["weight_version"] == "default"


def test_a_parameter_of_an_unknown_name(restored: Engine, served_dir: Path) -> None:
    with restored.update():
        status, answer = restored.send(
            "/update_weights_from_tensor", {"serialized_named_tensors": [pickled([("model.nobody", torch.ones(2))])]}
        )
    assert status == (200 if restored.differs("unfit") else 400), answer
    assert restored.checksums() == restored.expected_checksums(read_weights(served_dir))


def test_one_parameter_by_name(engine: Engine, served_dir: Path) -> None:
    status, answer = engine.send("/get_weights_by_name", {"name": "model.norm.weight", "truncate_size": 5})
    if engine.differs("by_name"):
        assert status == 400 and answer == {"error": {"message": "Get parameter by name failed"}}
    else:
        assert status == 200 and answer == read_weights(served_dir)["model.norm.weight"].float()[:5].tolist()


# ------------------------------------------------------------------ tensors broadcast by the trainer


@pytest.mark.parametrize("flattened", [False, True], ids=["plain", "flattened_bucket"])
def test_from_distributed(restored: Engine, other: Weights, hf_other: Any, flattened: bool) -> None:
    name = f"alone-{flattened}"
    with group_of(name, restored) as group, restored.update():
        broadcast(group, name, other, "v1", flattened, restored)
    assert_serves(restored, other, hf_other, "v1")


def test_two_servers_in_one_group_take_several_buckets(
    restored: Engine, partner: Engine, other: Weights, hf_other: Any, served_dir: Path
) -> None:
    names = list(other)
    with group_of("pair", restored, partner) as group, restored.update(), partner.update():
        for start in range(0, len(names), 9):
            part = {name: other[name] for name in names[start : start + 9]}
            broadcast(group, "pair", part, "v1", True, restored, partner)
    for engine in (restored, partner):
        assert_serves(engine, other, hf_other, "v1")
    partner.load(served_dir, "default")


def test_a_group_can_be_made_again_under_its_name(restored: Engine, served_dir: Path) -> None:
    weights = read_weights(served_dir)
    part = {"model.norm.weight": weights["model.norm.weight"]}
    for factor in (2.0, 3.0):
        with group_of("again", restored) as group, restored.update():
            broadcast(group, "again", {n: w * factor for n, w in part.items()}, "v1", True, restored)
        changed = {**weights, "model.norm.weight": weights["model.norm.weight"] * factor}
        assert restored.checksums() == restored.expected_checksums(changed)


def test_weights_that_arrive_amid_a_response_make_the_rest_of_it(
    restored: Engine, other: Weights, hf_student: Any, hf_other: Any
) -> None:
    """Of each span, the log-probs are those of its version's weights over the whole sequence so far."""
    running = [Running(restored, f"amid-{i}", LONG) for i in range(3)]
    with restored.update():
        restored.post(
            "/update_weights_from_tensor",
            serialized_named_tensors=[pickled(list(other.items()))],
            weight_version="v1",
        )
    for request in running:
        answer = request.finish()
        meta, out = answer["meta_info"], answer["output_ids"]
        first, second = meta["weight_versions"]
        assert (first["version"], second["version"]) == ("default", "v1")
        assert 0 == first["start"] < first["end"] == second["start"] < second["end"] == 500
        assert meta["num_retractions"] == 1
        told = [entry[0] for entry in meta["output_token_logprobs"]]
        for span, model in ((first, hf_student), (second, hf_other)):
            expected = logprobs(model, PROMPT + out, LONG["temperature"])[len(PROMPT) - 1 :]
            chosen = slice(span["start"], span["end"])
            np.testing.assert_allclose(told[chosen], expected[chosen], atol=TOLERANCE)
