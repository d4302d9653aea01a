"""LoRA adapters of a request: the same as the weights they would be merged into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from integration.wire import (
    LONG,
    PROMPT,
    Adapter,
    Engine,
    Running,
    logprobs,
    make_adapter,
    pickled,
    random_prompts,
    read_weights,
)


def merged_model(served_dir: Path, adapter: Adapter) -> torch.nn.Module:
    """The student with the adapter merged, run by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(served_dir, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(adapter.merged, strict=False)
    assert unexpected == [] and missing in ([], ["lm_head.weight"])
    return model


@pytest.fixture
def adapters(engine: Engine, served_dir: Path, tmp_path: Path) -> Iterator[dict[str, Adapter]]:
    """Two adapters that the server holds: one it read from disk, one it was sent."""
    weights = read_weights(served_dir)
    read, sent = make_adapter(weights, seed=1), make_adapter(weights, seed=2, rank=8, alpha=4)
    answer = engine.post("/load_lora_adapter", lora_name="read", lora_path=str(read.save(tmp_path / "adapter")))
    assert answer["success"] is True and list(answer["loaded_adapters"]) == ["read"]
    answer = engine.post(
        "/load_lora_adapter_from_tensors",
        lora_name="sent",
        config_dict=sent.config,
        serialized_named_tensors=[pickled(sent.tensors)],
    )
    assert answer["success"] is True and set(answer["loaded_adapters"]) == {"read", "sent"}
    yield {"read": read, "sent": sent}
    for name in ("read", "sent"):
        assert engine.post("/unload_lora_adapter", lora_name=name)["success"] is True


def test_adapters_equal_merged_weights_also_side_by_side(
    engine: Engine, adapters: dict[str, Adapter], served_dir: Path, hf_student: Any
) -> None:
    models: dict[str | None, Any] = {name: merged_model(served_dir, a) for name, a in adapters.items()}
    models[None] = hf_student
    paths = [None, "read", "sent", "read", None, "sent"]
    rows = random_prompts(len(paths), seed=9)
    sampling = {"temperature": 0.8, "max_new_tokens": 16, "ignore_eos": True}
    answers = engine.generate(rows, sampling, lora_path=paths, logprob_start_len=0)
    distances = []
    for path, row, answer in zip(paths, rows, answers, strict=True):
        out, meta = answer["output_ids"], answer["meta_info"]
        expected = logprobs(models[path], row + out, 0.8)[len(row) - 1 :]
        np.testing.assert_allclose([e[0] for e in meta["output_token_logprobs"]], expected, atol=1e-4)
        given = [e[0] for e in meta["input_token_logprobs"][1:]]
        np.testing.assert_allclose(given, logprobs(models[path], row), atol=1e-4)
        distances.append(np.abs(np.subtract(given, logprobs(hf_student, row))).max())
    assert all((distance < 1e-4) == (path is None) for path, distance in zip(paths, distances, strict=True))


def test_a_retracted_request_keeps_its_adapter(engine: Engine, adapters: dict[str, Adapter], served_dir: Path) -> None:
    running = Running(engine, "adapted", LONG, lora_path="sent")
    with engine.paused("retract"):
        engine.post("/flush_cache")
    answer = running.finish()
    out, meta = answer["output_ids"], answer["meta_info"]
    assert meta["num_retractions"] == 1 and len(out) == LONG["max_new_tokens"]
    model = merged_model(served_dir, adapters["sent"])
    expected = logprobs(model, PROMPT + out, LONG["temperature"])[len(PROMPT) - 1 :]
    np.testing.assert_allclose([e[0] for e in meta["output_token_logprobs"]], expected, atol=1e-4)


def test_a_name_is_taken_once_and_gone_after_unloading(engine: Engine, served_dir: Path) -> None:
    adapter = make_adapter(read_weights(served_dir), seed=5)
    body = {"lora_name": "brief", "config_dict": adapter.config, "serialized_named_tensors": [pickled(adapter.tensors)]}
    engine.post("/load_lora_adapter_from_tensors", **body)
    status, answer = engine.send("/load_lora_adapter_from_tensors", body)
    assert status == 400 and answer["success"] is False and "brief" in answer["error_message"]
    engine.post("/unload_lora_adapter", lora_name="brief")
    status, answer = engine.send("/generate", {"input_ids": [3, 20], "lora_path": "brief"})
    assert status == 400 and "brief" in answer["error"]["message"]
    status, answer = engine.send("/unload_lora_adapter", {"lora_name": "brief"})
    assert status == 400 and answer["success"] is False


def test_a_path_without_an_adapter_is_refused(engine: Engine, tmp_path: Path) -> None:
    status, answer = engine.send("/load_lora_adapter", {"lora_name": "absent", "lora_path": str(tmp_path / "absent")})
    assert status == 400 and answer["success"] is False and "absent" in answer["error_message"]
