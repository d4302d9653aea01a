"""Aborting, pausing, flushing, naming: the control calls, by the same assertions on every server."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest

from integration.wire import CONTEXT, ENDLESS, LONG, PROMPT, TIMEOUT_S, Engine, Running, in_background, logprobs

ONE = {"max_new_tokens": 1, "temperature": 0}


def assert_sampled_by(model: Any, answer: dict[str, Any], temperature: float = LONG["temperature"]) -> None:
    """The log-probs that came with the tokens are the model's."""
    out = answer["output_ids"]
    expected = logprobs(model, PROMPT + out, temperature)[len(PROMPT) - 1 :]
    np.testing.assert_allclose([e[0] for e in answer["meta_info"]["output_token_logprobs"]], expected, atol=1e-4)


def test_abort_by_rid_returns_what_was_sampled(engine: Engine, hf_student: Any) -> None:
    chosen, other = Running(engine, "chosen"), Running(engine, "other", LONG)
    assert engine.send("/abort_request", {"rid": "chosen"})[0] == 200
    answer = chosen.finish()
    reason = answer["meta_info"]["finish_reason"]
    assert (reason["type"], reason["message"]) == ("abort", "Aborted")
    assert 0 < len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] < 1900
    assert_sampled_by(hf_student, answer)
    assert other.finish()["meta_info"]["finish_reason"] == {"type": "length", "length": 500}


def test_abort_takes_the_requests_whose_rid_begins_so_or_not(engine: Engine) -> None:
    running = [Running(engine, "twin"), Running(engine, "twin-2", LONG)]
    engine.send("/abort_request", {"rid": "tw"})
    engine.send("/abort_request", {"rid": "twin"})
    reasons = [r.finish()["meta_info"]["finish_reason"]["type"] for r in running]
    assert reasons == ["abort", "abort" if engine.differs("prefix") else "length"]


def test_abort_all_and_abort_of_nobody(engine: Engine) -> None:
    both = [Running(engine, "all-1"), Running(engine, "all-2")]
    assert engine.send("/abort_request", {"rid": "nobody"})[0] == 200
    assert engine.send("/abort_request", {"abort_all": True})[0] == 200
    assert [r.finish()["meta_info"]["finish_reason"]["type"] for r in both] == ["abort", "abort"]
    assert engine.generate(PROMPT, ONE)["output_ids"]


def test_a_rid_in_use_is_refused_and_free_again_afterwards(engine: Engine) -> None:
    running = Running(engine, "mine")
    status, answer = engine.send("/generate", {"input_ids": PROMPT, "rid": "mine", "sampling_params": ONE})
    assert status == 400 and "Duplicate request ID" in answer["error"]["message"]
    engine.send("/abort_request", {"rid": "mine"})
    running.finish()
    assert engine.generate(PROMPT, ONE, rid="mine")["meta_info"]["id"] == "mine"


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_pause_and_continue(engine: Engine, hf_student: Any, mode: str) -> None:
    """`abort` ends what runs; the others hold it and go on. New requests wait."""
    running = Running(engine, f"paused-{mode}", ENDLESS if mode == "abort" else LONG)
    with engine.paused(mode):
        newcomer = in_background(engine.generate, PROMPT, ONE)
        assert wait([newcomer], timeout=1.0).not_done, "answered while paused"
        flushed, _ = engine.send("/flush_cache")
        assert flushed == (400 if mode == "in_place" else 200)
        engine.post("/pause_generation", mode=mode)  # twice is once
    answer = running.finish()
    assert newcomer.result(TIMEOUT_S)["output_ids"] == engine.generate(PROMPT, ONE)["output_ids"]
    assert_sampled_by(hf_student, answer)
    meta = answer["meta_info"]
    assert meta["num_retractions"] == (1 if mode == "retract" else 0)
    if mode == "abort":
        assert meta["finish_reason"]["type"] == "abort" and 0 < len(answer["output_ids"]) < 1900
    else:
        assert meta["finish_reason"] == {"type": "length", "length": 500}


def test_a_retracted_greedy_request_is_the_same_as_an_undisturbed_one(engine: Engine) -> None:
    sampling = {**LONG, "temperature": 0}
    running = Running(engine, "greedy", sampling)
    with engine.paused("retract"):
        engine.post("/flush_cache")
    assert running.finish()["output_ids"] == engine.generate(PROMPT, sampling)["output_ids"]


def test_flush_waits_for_running_requests_when_it_has_time(engine: Engine) -> None:
    running = Running(engine, "busy", LONG)
    status, text = engine.send("/flush_cache")
    assert status == 400 and text.startswith("Flush cache failed.")
    status, text = engine.send(f"/flush_cache?timeout={TIMEOUT_S}")
    assert status == 200 and text.startswith("Cache flushed.")
    assert running.finish()["meta_info"]["finish_reason"]["type"] == "length"


def test_flush_with_patience_while_requests_are_retracted(engine: Engine) -> None:
    running = Running(engine, "held", LONG)
    with engine.paused("retract"):
        status, _ = engine.send("/flush_cache?timeout=0.2")
        assert status == (400 if engine.differs("patience") else 200)
        engine.post("/flush_cache")
    assert len(running.finish()["output_ids"]) == 500


def test_a_paused_server_tells_what_it_holds(engine: Engine) -> None:
    with engine.paused("retract"):
        assert engine.get("/model_info")["weight_version"] == "default"
        assert engine.send("/ready", method="GET")[0] == (503 if engine.differs("paused_health") else 200)
        assert engine.checksums()
    assert engine.send("/health", method="GET") == (200, "")
    assert engine.send("/ready", method="GET")[0] == 200


def test_naming_the_weights_disturbs_nobody_unless_told(engine: Engine) -> None:
    running = Running(engine, "named", LONG)
    told = engine.post("/update_weight_version", new_version="other", abort_all_requests=False)
    assert told["success"] is True and told["new_version"] == "other"
    answer = running.finish()
    spans = answer["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "other"]
    assert spans[0]["start"] == 0 < spans[0]["end"] == spans[1]["start"] < spans[1]["end"] == 500
    assert answer["meta_info"]["weight_version"] == engine.get("/model_info")["weight_version"] == "other"
    victim = Running(engine, "victim")
    engine.post("/update_weight_version", new_version="default")
    assert victim.finish()["meta_info"]["finish_reason"]["type"] == "abort"
    assert engine.generate(PROMPT, ONE)["meta_info"]["weight_version"] == "default"


BAD_CALLS: Sequence[tuple[str, dict[str, Any], str]] = (
    ("/end_weight_update", {}, "no weight-update session is open"),
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"]}, "between begin_weight_update"),
    (
        "/update_weights_from_distributed",
        {"names": [], "dtypes": [], "shapes": [], "group_name": "none"},
        "between begin_weight_update",
    ),
    ("/destroy_weights_update_group", {"group_name": "none"}, "does not exist"),
    ("/weights_checker", {"action": "guess"}, "guess"),
)


@pytest.mark.parametrize(("path", "body", "reason"), BAD_CALLS, ids=[path for path, _, _ in BAD_CALLS])
def test_a_control_call_out_of_place_is_refused(engine: Engine, path: str, body: dict[str, Any], reason: str) -> None:
    status, answer = engine.send(path, body)
    assert status == 400 and answer["success"] is False and reason in answer["message"], (status, answer)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/pause_generation", {"mode": "later"}),
        ("/begin_weight_update", {"selector": "some"}),
        ("/update_weights_from_disk", {}),
        ("/update_weight_version", {}),
        ("/init_weights_update_group", {}),
    ],
    ids=str,
)
def test_a_control_call_without_what_it_needs_is_refused(engine: Engine, path: str, body: dict[str, Any]) -> None:
    status, answer = engine.send(path, body)
    assert status == 400 and answer["object"] == "error" and answer["message"], (status, answer)
    assert engine.generate(PROMPT, ONE)["output_ids"]


def test_sessions_open_once_and_close_once(engine: Engine) -> None:
    with engine.update():
        status, answer = engine.send("/begin_weight_update", {"selector": "target"})
        assert status == 400 and "already open" in answer["message"]
    status, answer = engine.send("/end_weight_update", {})
    assert status == 400 and answer["success"] is False


def test_what_the_server_tells_of_itself(engine: Engine, served_dir: Any) -> None:
    info, settings = engine.get("/model_info"), engine.get("/server_info")
    assert info["model_path"] == str(served_dir) and info["is_generation"] is True
    assert (info["weight_version"], info["model_type"]) == ("default", "qwen3")
    assert info["architectures"] == ["Qwen3ForCausalLM"]
    assert (settings["tp_size"], settings["dp_size"]) == (1, 1)
    assert settings["enable_memory_saver"] is False
    assert settings["max_total_num_tokens"] > 0 and settings["version"]
    (model,) = engine.get("/v1/models")["data"]
    assert model["max_model_len"] == CONTEXT and model["id"] == info["served_model_name"]
    told = (info.get("vocab_size"), settings["context_length"])
    assert told == ((None, None) if engine.differs("told") else (92, CONTEXT))
    (load,) = engine.get("/v1/loads")["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (0, 0)


def test_loads_count_what_runs(engine: Engine) -> None:
    running = [Running(engine, "load-1", LONG), Running(engine, "load-2", LONG)]
    with engine.paused("in_place"):
        (load,) = engine.get("/v1/loads")["loads"]
        assert load["num_running_reqs"] == 2
    assert [len(r.finish()["output_ids"]) for r in running] == [500] * 2
