"""Adapters of the embedded server against the same weights merged, run by transformers; and streams."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from integration.wire import Adapter, logprobs, make_adapter, pickled, read_weights
from megatron_trd.rollout.embedded.batch import Request
from megatron_trd.rollout.embedded.engine import EmbeddedEngine

PROMPT = [3, 20, 66, 70, 81, 85, 88]
SAMPLED = {"temperature": 1.0, "max_new_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def adapters(student_dir: Path) -> dict[str, Adapter]:
    weights = read_weights(student_dir)
    return {"one": make_adapter(weights, seed=1), "two": make_adapter(weights, seed=2, rank=3, alpha=12)}


@pytest.fixture(scope="module")
def merged(adapters: dict[str, Adapter], hf_student: Any) -> dict[str | None, Any]:
    """Name of an adapter -> a model that has it in its weights."""
    models: dict[str | None, Any] = {None: hf_student}
    for name, adapter in adapters.items():
        models[name] = deepcopy(hf_student)
        models[name].load_state_dict(adapter.merged, strict=False)
    return models


@pytest.fixture(scope="module")
def engine(student_dir: Path, adapters: dict[str, Adapter]) -> Iterator[tuple[EmbeddedEngine, threading.Semaphore]]:
    finished = threading.Semaphore(0)
    engine = EmbeddedEngine(str(student_dir), lambda requests: finished.release(len(requests)))
    engine.start()
    for name, adapter in adapters.items():
        engine.call(lambda n=name, a=adapter: engine.model.load(n, "__tensor__", a.config, a.tensors)).result(60)
    yield engine, finished
    engine.call(engine.close).result(60)


def request(engine: EmbeddedEngine, i: int, name: str | None) -> Request:
    return Request(
        rid=str(i),
        prompt_ids=PROMPT[: 3 + i % 4],
        max_new_tokens=30 + i,
        temperature=0.8,
        top_p=1.0,
        top_k=-1,
        seed=i,
        stop_ids=frozenset(),
        logprob_start=0 if i % 2 else -1,
        adapter=engine.model.adapters[name] if name else None,
    )


def test_a_mixed_batch_equals_merged_weights_also_after_a_retraction(
    engine: tuple[EmbeddedEngine, threading.Semaphore], merged: dict[str | None, Any]
) -> None:
    """Nine requests of unequal length with adapter one, two or none, through prefill, scoring, decoding and retract."""
    core, finished = engine
    names = ["one", None, "two"] * 3
    items = [request(core, i, name) for i, name in enumerate(names)]
    for item in items:
        core.submit(item)

    def retract() -> bool:
        if len(items[0].token_ids) < 10:
            return False
        core.pause("retract")
        return True

    while not core.call(retract).result(60):
        pass
    assert core.call(lambda: core.num_waiting).result(60) == 9
    core.call(core.resume).result(60)
    for _ in items:
        assert finished.acquire(timeout=60)
    for item, name in zip(items, names, strict=True):
        assert item.num_retractions == 1 and len(item.token_ids) == item.max_new_tokens
        expected = logprobs(merged[name], item.all_ids, 0.8)[len(item.prompt_ids) - 1 :]
        np.testing.assert_allclose(item.logprobs, expected, atol=1e-4)
        if item.logprob_start == 0:
            expected = logprobs(merged[name], item.prompt_ids)
            np.testing.assert_allclose(np.array(item.input_logprobs[1:]), expected, atol=1e-4)
        others = [other for other in merged if other != name]
        for other in others:  # the comparison would notice the wrong adapter
            wrong = logprobs(merged[other], item.all_ids, 0.8)[len(item.prompt_ids) - 1 :]
            assert np.abs(np.array(item.logprobs) - wrong).max() > 0.05


def test_logits_equal_merged_weights_to_single_precision(
    engine: tuple[EmbeddedEngine, threading.Semaphore], merged: dict[str | None, Any]
) -> None:
    core, _ = engine
    names = ["two", None, "one", "two"]
    ids = torch.tensor([PROMPT, PROMPT[::-1], PROMPT, PROMPT])
    worn = [core.model.adapters[name] if name else None for name in names]
    with torch.no_grad():
        logits = core.call(lambda: core.model(worn, input_ids=ids).logits.clone()).result(60)
        for row, name in enumerate(names):
            torch.testing.assert_close(logits[row], merged[name](ids[row : row + 1]).logits[0], atol=1e-5, rtol=1e-5)
        assert not core.model.base.training and core.model.base(ids).logits.shape == logits.shape


def test_adapters_over_http(server: str, post: Any, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    one, two = adapters["one"], adapters["two"]
    path = str(one.save(tmp_path / "one"))
    status, answer = post(server, "/load_lora_adapter", {"lora_name": "one", "lora_path": path})
    assert (status, answer) == (200, {"success": True, "error_message": "", "loaded_adapters": {"one": path}})
    body = {"lora_name": "two", "config_dict": two.config, "serialized_named_tensors": [pickled(two.tensors)]}
    status, answer = post(server, "/load_lora_adapter_from_tensors", body)
    assert status == 200 and answer["loaded_adapters"] == {"one": path, "two": "__tensor__"}
    status, answer = post(server, "/load_lora_adapter_from_tensors", body)
    assert status == 400 and "already loaded" in answer["error_message"]
    asked = {"input_ids": [PROMPT] * 3, "lora_path": ["two", None, "one"]}
    _, together = post(server, "/generate", asked | {"sampling_params": {**SAMPLED, "sampling_seed": 4}})
    for name, answer in zip(asked["lora_path"], together, strict=True):
        asked = {"input_ids": PROMPT, "lora_path": name, "sampling_params": {**SAMPLED, "sampling_seed": 4}}
        assert post(server, "/generate", asked)[1]["output_ids"] == answer["output_ids"]
    for name in ("one", "two"):
        assert post(server, "/unload_lora_adapter", {"lora_name": name})[0] == 200
    status, answer = post(server, "/unload_lora_adapter", {"lora_name": "one"})
    assert status == 400 and answer["success"] is False and "one does not exist" in answer["error_message"]
    status, answer = post(server, "/generate", asked)
    assert status == 400 and "never been loaded: one" in answer["error"]["message"]


def test_adapters_that_do_not_fit_are_refused(server: str, post: Any, adapters: dict[str, Adapter]) -> None:
    good = adapters["one"]
    names = list(good.tensors)
    wrong = {name: torch.ones(2, 2) if name == names[0] else t for name, t in good.tensors.items()}
    cases: list[tuple[dict[str, Any], dict[str, torch.Tensor], str]] = [
        ({}, {name: t for name, t in good.tensors.items() if name != names[1]}, "missing"),
        ({}, {**good.tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}, "unknown"),
        ({}, wrong, "is (2, 2), not"),
        ({}, {}, "empty"),
        ({"r": 3}, good.tensors, "not (3,"),
        ({"r": None}, good.tensors, "needs r"),
        ({"use_dora": True}, good.tensors, "use_dora"),
        ({"use_rslora": True}, good.tensors, "use_rslora"),
    ]
    for change, tensors, reason in cases:
        body = {"lora_name": "bad", "config_dict": good.config | change, "serialized_named_tensors": [pickled(tensors)]}
        status, answer = post(server, "/load_lora_adapter_from_tensors", body)
        assert status == 400 and reason in answer["error_message"] and answer["loaded_adapters"] == {}, answer
    status, answer = post(server, "/load_lora_adapter", {"lora_name": "bad", "lora_path": "/nowhere"})
    assert status == 400 and "/nowhere" in answer["error_message"]


# ------------------------------------------------------------------ streams


def stream(url: str, body: dict[str, Any]) -> Iterator[Any]:
    data = json.dumps(body | {"stream": True}).encode()
    with urllib.request.urlopen(urllib.request.Request(url + "/generate", data=data), timeout=60) as response:
        assert response.headers.get_content_type() == "text/event-stream"
        for line in response:
            if line.strip():
                event = line.decode().removeprefix("data: ").strip()
                yield event if event == "[DONE]" else json.loads(event)


def test_a_stream_tells_all_so_far_after_each_token(server: str, post: Any) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {**SAMPLED, "sampling_seed": 3}, "return_logprob": True}
    _, whole = post(server, "/generate", body)
    *events, done = stream(server, body)
    assert done == "[DONE]" and len(events) == 20
    for num, event in enumerate(events, start=1):
        assert event["output_ids"] == whole["output_ids"][:num]
        assert event["meta_info"]["output_token_logprobs"] == whole["meta_info"]["output_token_logprobs"][:num]
        assert (
            (event["meta_info"]["finish_reason"] is None) == (num < 20) == ("weight_versions" not in event["meta_info"])
        )
    assert events[-1] | {"meta_info": 0} == whole | {"meta_info": 0}
    assert events[-1]["meta_info"] | {"id": 0} == whole["meta_info"] | {"id": 0}


def test_a_stream_of_several_says_whose_each_event_is(server: str, post: Any) -> None:
    body = {"input_ids": [PROMPT, PROMPT[:3]], "sampling_params": {"temperature": 0, "max_new_tokens": 9}}
    _, whole = post(server, "/generate", body)
    *events, done = stream(server, body)
    last = {event["index"]: event["output_ids"] for event in events}
    assert done == "[DONE]" and [last[i] for i in range(2)] == [answer["output_ids"] for answer in whole]


def test_a_bad_request_for_a_stream_is_its_only_event(server: str) -> None:
    event, done = stream(server, {"input_ids": PROMPT, "sampling_params": {"temperature": -1}})
    assert done == "[DONE]" and event["error"]["code"] == 400 and "temperature" in event["error"]["message"]


def test_who_stops_listening_to_a_stream_ends_its_request(server: str, post: Any) -> None:
    def num_waiting() -> int:
        with urllib.request.urlopen(server + "/v1/loads", timeout=60) as response:
            return json.load(response)["loads"][0]["num_waiting_reqs"]

    assert post(server, "/pause_generation", {"mode": "retract"})[0] == 200
    try:
        data = json.dumps({"input_ids": PROMPT, "stream": True}).encode()
        response = urllib.request.urlopen(urllib.request.Request(server + "/generate", data=data), timeout=60)
        assert num_waiting() == 1
        response.close()
        deadline = time.monotonic() + 60
        while num_waiting():
            assert time.monotonic() < deadline
    finally:
        assert post(server, "/continue_generation")[0] == 200
