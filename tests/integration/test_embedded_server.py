"""The embedded server against transformers, run on the same weights without server, cache or batching."""

from __future__ import annotations

import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_trd.rollout.embedded.batch import Request
from megatron_trd.rollout.embedded.engine import EmbeddedEngine
from megatron_trd.rollout.embedded.sampling import RowSettings, sample, uniforms
from megatron_trd.rollout.server_process import ServerProcess

PROMPT = [3, 20, 66, 70, 81, 85, 88]
SAMPLED = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_new_tokens": 24, "ignore_eos": True}


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (3 + 5 * i % 29,), generator=generator).tolist() for i in range(num)]


@torch.no_grad()
def reference_logprobs(model: torch.nn.Module, ids: list[int], temperature: float = 1.0) -> list[float]:
    """log softmax(logits / T) of ids[1:], one plain forward."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def generate(post: Any, url: str, ids: list[int], sampling: dict[str, Any], **more: Any) -> dict[str, Any]:
    status, answer = post(url, "/generate", {"input_ids": ids, "sampling_params": sampling, **more})
    assert status == 200, answer
    return answer


# ------------------------------------------------------------------ numbers


def test_output_logprobs_are_at_the_temperature_and_input_logprobs_at_one(server, post, hf_student) -> None:
    answer = generate(post, server, PROMPT, SAMPLED, return_logprob=True, logprob_start_len=2)
    meta, out = answer["meta_info"], answer["output_ids"]
    assert len(out) == 24 and [entry[1] for entry in meta["output_token_logprobs"]] == out
    np.testing.assert_allclose(
        [entry[0] for entry in meta["output_token_logprobs"]],
        reference_logprobs(hf_student, PROMPT + out, 0.7)[len(PROMPT) - 1 :],
        atol=1e-4,
    )
    given = meta["input_token_logprobs"]
    assert given[0][0] is None and [entry[1] for entry in given] == PROMPT[2:]
    np.testing.assert_allclose([entry[0] for entry in given[1:]], reference_logprobs(hf_student, PROMPT)[2:], atol=1e-4)


def test_scoring_alone_equals_a_forward_pass_for_rows_of_unequal_length(server, post, hf_student) -> None:
    rows = prompts(9, seed=4)
    answers = generate(
        post, server, rows, {"max_new_tokens": 0, "temperature": 0.3}, return_logprob=True, logprob_start_len=0
    )
    for row, answer in zip(rows, answers, strict=True):
        assert answer["output_ids"] == [] and answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
        scored = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
        np.testing.assert_allclose(scored[1:], reference_logprobs(hf_student, row), atol=1e-4)


def test_greedy_equals_transformers_generate(server, post, hf_student) -> None:
    rows = prompts(12)
    answers = generate(post, server, rows, {"temperature": 0, "max_new_tokens": 30})
    reasons = set()
    for row, answer in zip(rows, answers, strict=True):
        ids = torch.tensor([row])
        expected = hf_student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        assert answer["output_ids"] == expected[0, len(row) :].tolist()
        reasons.add(answer["meta_info"]["finish_reason"]["type"])
        if answer["output_ids"][-1] == hf_student.generation_config.eos_token_id:
            assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert "stop" in reasons


def test_crowd_and_solitude_give_the_same_tokens(server, post) -> None:
    """48 requests of mixed lengths and settings at once, then each alone."""
    rows = prompts(48, seed=1)
    settings = [
        {
            "temperature": (0.0, 0.6, 1.3)[i % 3],
            "top_p": (1.0, 0.8)[i % 2],
            "top_k": (-1, 7, 20)[i // 2 % 3],
            "max_new_tokens": 5 + i % 40,
            "sampling_seed": 1000 + i,
        }
        for i in range(len(rows))
    ]
    with ThreadPoolExecutor(len(rows)) as pool:
        crowd = list(
            pool.map(lambda pair: generate(post, server, *pair)["output_ids"], zip(rows, settings, strict=True))
        )
    alone = [generate(post, server, row, setting)["output_ids"] for row, setting in zip(rows, settings, strict=True)]
    assert crowd == alone
    reseeded = [{**setting, "sampling_seed": i} for i, setting in enumerate(settings)]
    changed = [generate(post, server, row, setting)["output_ids"] for row, setting in zip(rows, reseeded, strict=True)]
    assert [c == a for c, a in zip(changed, alone, strict=True)].count(False) > 12
    assert all(c == a for i, (c, a) in enumerate(zip(changed, alone, strict=True)) if i % 3 == 0)  # greedy


def test_n_samples_are_independent_and_seeded(server, post) -> None:
    sampling = {"max_new_tokens": 12, "temperature": 2.0, "ignore_eos": True, "sampling_seed": 5}
    four = generate(post, server, PROMPT, {**sampling, "n": 4})
    assert len({tuple(answer["output_ids"]) for answer in four}) == 4
    assert four[0]["output_ids"] == generate(post, server, PROMPT, sampling)["output_ids"]
    free = {"max_new_tokens": 12, "temperature": 2.0, "ignore_eos": True}
    assert len({tuple(generate(post, server, PROMPT, free)["output_ids"]) for _ in range(3)}) == 3


def test_stop_tokens_and_text(server, post, tokenizer) -> None:
    sampling = {"max_new_tokens": 20, "temperature": 0}
    full = generate(post, server, PROMPT, {**sampling, "ignore_eos": True})["output_ids"]
    stop = full[4]
    cut = generate(post, server, PROMPT, {**sampling, "stop_token_ids": [stop]})
    assert cut["output_ids"] == full[: full.index(stop) + 1]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert cut["text"] == tokenizer.decode(full[: full.index(stop)], skip_special_tokens=True)
    text = tokenizer.decode(PROMPT)
    _, from_text = post(server, "/generate", {"text": text, "sampling_params": {**sampling, "ignore_eos": True}})
    assert from_text["output_ids"] == full


# ------------------------------------------------------------------ the sampler


def draws(logits: torch.Tensor, temperature: float, top_p: float, top_k: int, num: int = 40_000) -> torch.Tensor:
    settings = RowSettings.collect([(temperature, top_p, top_k, seed) for seed in range(num)], len(logits))
    ids, logprobs = sample(logits.expand(num, -1), settings, [7] * num)
    expected = torch.log_softmax(logits / (temperature or 1.0), -1)
    torch.testing.assert_close(logprobs, expected[ids])
    return torch.bincount(ids, minlength=len(logits))


def truncated(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """The distribution to sample from, by the definition and in plain loops."""
    p = torch.softmax(logits.double() / temperature, -1).numpy()
    kept, mass = [], 0.0
    for i in np.argsort(-p):
        if (top_k > 0 and len(kept) >= top_k) or (top_p < 1 and mass >= top_p):
            break
        kept.append(i)
        mass += p[i]
    out = np.zeros_like(p)
    out[kept] = p[kept] / mass
    return out


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, -1), (0.6, 1.0, -1), (1.0, 0.8, -1), (1.5, 1.0, 6), (0.6, 0.95, 20)]
)
def test_samples_follow_the_truncated_softmax(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 1.5
    counts = draws(logits, temperature, top_p, top_k).numpy()
    expected = truncated(logits, temperature, top_p, top_k) * counts.sum()
    assert counts[expected == 0].sum() == 0
    seen = expected > 5
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    degrees = seen.sum() - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)
    assert (counts[seen] > 0).all()


def test_settings_of_neighbours_do_not_leak() -> None:
    logits = torch.tensor([3.0, 2.9, 0.0, -1.0])
    settings = RowSettings.collect([(1.0, 1.0, -1, s) if s % 2 else (0.0, 0.5, 3, s) for s in range(2000)], 4)
    ids, _ = sample(logits.expand(2000, -1), settings, [0] * 2000)
    assert ids[::2].eq(0).all() and len(ids[1::2].unique()) == 4


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    seeds, positions = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(100, dtype=np.uint64), indexing="ij")
    u = uniforms(seeds, positions)
    assert u.min() >= 0 and u.max() < 1
    histogram = np.histogram(u, bins=20, range=(0, 1))[0]
    assert ((histogram - 1500) ** 2 / 1500).sum() < 19 + 4 * np.sqrt(38)
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03


# ------------------------------------------------------------------ weights


def start_engine(student_dir: Path) -> tuple[EmbeddedEngine, threading.Semaphore]:
    finished = threading.Semaphore(0)
    engine = EmbeddedEngine(str(student_dir), lambda requests: finished.release(len(requests)), weight_version="A")
    engine.start()
    return engine, finished


def request(num_tokens: int, rid: str = "r", prompt: list[int] = PROMPT) -> Request:
    return Request(
        rid=rid,
        prompt_ids=prompt,
        max_new_tokens=num_tokens,
        temperature=0.9,
        top_p=0.95,
        top_k=-1,
        seed=11,
        stop_ids=frozenset(),
    )


def pause_after(engine: EmbeddedEngine, item: Request, num_tokens: int, mode: str) -> None:
    """Pause between two steps, at the first moment when `item` has at least `num_tokens`."""

    def pause() -> bool:
        if len(item.token_ids) < num_tokens:
            return False
        engine.pause(mode)
        return True

    while not engine.call(pause).result(timeout=60):
        pass


def test_retracted_requests_go_on_with_the_new_weights(student_dir: Path, other_dir: Path) -> None:
    engine, finished = start_engine(student_dir)
    items = [request(120, "a"), request(120, "b", PROMPT[::-1]), request(9, "c")]
    for item in items:
        engine.submit(item)
    pause_after(engine, items[0], 12, "retract")
    assert engine.call(lambda: (engine.num_running, engine.is_flushed)).result(60) == (0, True)
    engine.call(lambda: engine.load_weights(str(other_dir), "B")).result(60).result(60)
    engine.call(engine.resume).result(60)
    for _ in items:
        assert finished.acquire(timeout=60)
    engine.call(engine.close).result(60)
    assert [r.num_retractions for r in items] == [1, 1, 0]
    models = {"A": student_dir, "B": other_dir}
    for item in items[:2]:
        first, second = item.version_spans
        assert (first["version"], second["version"]) == ("A", "B")
        assert 12 <= first["end"] == second["start"] < second["end"] == 120
        for span in item.version_spans:
            model = AutoModelForCausalLM.from_pretrained(models[span["version"]], dtype=torch.float32)
            expected = reference_logprobs(model, item.all_ids, 0.9)[len(PROMPT) - 1 :]
            part = slice(span["start"], span["end"])
            np.testing.assert_allclose(item.logprobs[part], expected[part], atol=1e-4)
    assert [span["version"] for span in items[2].version_spans] == ["A"]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_does_not_change_the_tokens(student_dir: Path, mode: str) -> None:
    engine, finished = start_engine(student_dir)
    undisturbed, paused = request(60, "a"), request(60, "b")
    engine.submit(undisturbed)
    assert finished.acquire(timeout=60)
    engine.submit(paused)
    pause_after(engine, paused, 20, mode)
    assert engine.call(lambda: engine.is_flushed).result(60) == (mode == "retract")
    engine.call(engine.resume).result(60)
    assert finished.acquire(timeout=60)
    engine.call(engine.close).result(60)
    assert undisturbed.token_ids == paused.token_ids and len(paused.token_ids) == 60


def test_abort_returns_the_partial_response_and_new_requests_still_run(student_dir: Path) -> None:
    engine, finished = start_engine(student_dir)
    long = request(200, "long")
    engine.submit(long)
    pause_after(engine, long, 5, "abort")
    assert finished.acquire(timeout=60)
    assert long.finish_reason == {"type": "abort", "message": "Aborted"} and 5 <= len(long.token_ids) < 200
    engine.call(engine.resume).result(60)
    engine.submit(request(3, "next"))
    assert finished.acquire(timeout=60)
    waiting = engine.call(lambda: (engine.pause("retract"), engine.submit(request(3, "waits")))[1])
    waiting.result(60)
    engine.call(lambda: engine.abort("waits")).result(60)
    assert finished.acquire(timeout=60)
    engine.call(engine.close).result(60)


def test_update_waits_for_running_requests_when_not_paused(student_dir: Path, other_dir: Path) -> None:
    engine, finished = start_engine(student_dir)
    before, after = request(150, "before"), request(5, "after")
    engine.submit(before)
    while not engine.call(lambda: len(before.token_ids)).result(60):
        pass
    loading = engine.call(lambda: engine.load_weights(str(other_dir), "B")).result(60)
    engine.submit(after)
    loading.result(60)
    assert len(before.token_ids) == 150 and [s["version"] for s in before.version_spans] == ["A"]
    assert finished.acquire(timeout=60) and finished.acquire(timeout=60)
    assert [s["version"] for s in after.version_spans] == ["B"]
    engine.call(engine.close).result(60)


def test_update_from_disk_over_http(student_dir: Path, other_dir: Path, post: Any, tmp_path: Path) -> None:
    process = ServerProcess.start(student_dir, weight_version="first")
    try:
        url = process.url
        greedy = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        old = generate(post, url, PROMPT, greedy, return_logprob=True)
        _, old_sums = post(url, "/weights_checker")
        weights = load_file(other_dir / "model.safetensors")
        bad = {
            "empty": {},
            "missing": {name: w for name, w in weights.items() if "norm" not in name},
            "unknown": {**weights, "model.surplus": torch.ones(2)},
            "shape": {**weights, "model.norm.weight": torch.ones(3)},
        }
        for name, content in bad.items():
            (tmp_path / name).mkdir()
            if content:
                save_file(content, tmp_path / name / "model.safetensors")
        (tmp_path / "torn").mkdir()
        whole = (other_dir / "model.safetensors").read_bytes()
        (tmp_path / "torn/model.safetensors").write_bytes(whole[: len(whole) // 2])
        for name in ("nowhere", "torn", *bad):
            status, answer = post(
                url, "/update_weights_from_disk", {"model_path": str(tmp_path / name), "weight_version": "bad"}
            )
            assert status == 400 and answer["success"] is False and name in answer["message"], answer
        assert generate(post, url, PROMPT, greedy, return_logprob=True) | {"meta_info": 0} == old | {"meta_info": 0}
        assert post(url, "/weights_checker")[1] == old_sums

        status, answer = post(
            url, "/update_weights_from_disk", {"model_path": str(other_dir), "weight_version": "second"}
        )
        assert status == 200 and answer["success"]
        new = generate(post, url, PROMPT, greedy, return_logprob=True)
        assert new["meta_info"]["weight_versions"] == [{"version": "second", "start": 0, "end": 16}]
        assert new["meta_info"]["weight_version"] == "second"
        with urllib.request.urlopen(url + "/model_info", timeout=60) as response:
            info = json.load(response)
        assert (info["weight_version"], info["model_path"]) == ("second", str(other_dir))
        other = AutoModelForCausalLM.from_pretrained(other_dir, dtype=torch.float32)
        np.testing.assert_allclose(
            [entry[0] for entry in new["meta_info"]["output_token_logprobs"]],
            reference_logprobs(other, PROMPT + new["output_ids"])[len(PROMPT) - 1 :],
            atol=1e-4,
        )
        assert new["output_ids"] != old["output_ids"]
        assert post(url, "/weights_checker")[1]["per_engine_checksum"] != old_sums["per_engine_checksum"]
        assert post(url, "/update_weight_version", {"new_version": "third"})[1]["new_version"] == "third"
        process.process.terminate()
        assert process.process.wait(timeout=30) == 0  # SIGTERM ends it gracefully
    finally:
        process.stop()


# ------------------------------------------------------------------ bad requests


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"sampling_params": {}}, "Either text or input_ids"),
        ({"text": "1", "input_ids": [3]}, "Either text or input_ids"),
        ({"input_ids": []}, "non-empty"),
        ({"input_ids": [3, 92]}, "[0, 92)"),
        ({"input_ids": [3, -1]}, "[0, 92)"),
        ({"input_ids": [3], "sampling_params": {"temperatur": 1}}, "temperatur"),
        ({"input_ids": [3], "sampling_params": {"temperature": -0.1}}, "temperature"),
        ({"input_ids": [3], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"input_ids": [3], "sampling_params": {"top_k": 0}}, "top_k"),
        ({"input_ids": [3], "sampling_params": {"stop": ["x"]}}, "stop"),
        ({"input_ids": [3], "sampling_params": {"max_new_tokens": 256}}, "maximum context length of 256"),
        ({"input_ids": [3], "return_logprob": True, "logprob_start_len": 5}, "logprob_start_len"),
    ],
)
def test_bad_requests_get_400_and_a_reason(server: str, post: Any, body: Any, message: str) -> None:
    status, answer = post(server, "/generate", body)
    assert status == 400 and message in answer["error"]["message"]


def test_the_server_outlives_bad_requests_and_ignores_unknown_top_level_keys(server: str, post: Any) -> None:
    for raw in (b"{not json", b"[1, 2]", b"", b'{"input_ids": [3, 4.5]}', b'{"input_ids": "3"}', b'{"text": 3}'):
        status, answer = post(server, "/generate", raw=raw)
        assert (status, answer["object"], answer["code"]) == (400, "error", 400), answer
    status, answer = post(server, "/pause_generation", {"mode": "sometimes"})
    assert status == 400 and "retract" in answer["message"]
    assert post(server, "/nowhere")[0] == 404
    assert post(server, "/abort_request", {"rid": "unknown"})[0] == 200
    assert post(server, "/flush_cache")[0] == 200
    for path in ("/health", "/ready", "/health_generate", "/get_model_info", "/get_server_info", "/v1/models"):
        with urllib.request.urlopen(server + path, timeout=60) as response:
            assert response.status == 200
    answer = generate(post, server, [5, 6], {"max_new_tokens": 2, "ignore_eos": True}, whatever=1, rid="mine")
    assert len(answer["output_ids"]) == 2 and answer["meta_info"]["id"] == "mine"


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)died.*nothing-here"):
        ServerProcess.start(tmp_path / "nothing-here")


def test_a_control_call_whose_client_hung_up_is_left_out_and_harms_nobody(student_dir: Path) -> None:
    engine = EmbeddedEngine(str(student_dir), lambda requests: None)
    ran: list[str] = []
    left = engine.call(lambda: ran.append("left"))
    assert left.cancel()
    engine.start()
    engine.call(lambda: ran.append("next")).result(60)
    assert ran == ["next"] and engine.is_alive
    engine.call(engine.close).result(60)
