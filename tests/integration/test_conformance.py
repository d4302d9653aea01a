"""What every server must answer to `/generate`: real SGLang and the embedded server, by the same assertions."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from integration.wire import CONTEXT, PROMPT, Engine, greedy, logprobs, random_prompts

SAMPLED = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_new_tokens": 24, "ignore_eos": True}
TOLERANCE = 1e-4


def output_logprobs(answer: Any) -> list[float]:
    entries = answer["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in entries] == answer["output_ids"]
    assert answer["meta_info"]["output_token_logprobs_length"] == len(entries)
    return [entry[0] for entry in entries]


def trimmed(engine: Engine, text: str) -> str:
    return text.lstrip() if engine.differs("text") else text


def test_greedy_equals_transformers_and_reasons_and_counts_are_right(engine: Engine, hf_student: Any) -> None:
    rows = random_prompts(12)
    answers = engine.generate(rows, {"temperature": 0, "max_new_tokens": 30})
    eos = hf_student.generation_config.eos_token_id
    reasons = set()
    for row, answer in zip(rows, answers, strict=True):
        out, meta = answer["output_ids"], answer["meta_info"]
        assert out == greedy(hf_student, row, 30)
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(row), len(out))
        stopped = {"type": "stop", "matched": eos}
        assert meta["finish_reason"] == (stopped if out[-1] == eos else {"type": "length", "length": 30})
        assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": len(out)}]
        assert meta["weight_version"] == "default" and meta["num_retractions"] == 0
        reasons.add(meta["finish_reason"]["type"])
        np.testing.assert_allclose(
            output_logprobs(answer), logprobs(hf_student, row + out)[len(row) - 1 :], atol=TOLERANCE
        )
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7])
def test_output_logprobs_are_at_the_temperature_before_truncation(
    engine: Engine, hf_student: Any, temperature: float
) -> None:
    """And those of the prompt are at temperature 1, from `logprob_start_len` on."""
    answer = engine.generate(PROMPT, {**SAMPLED, "temperature": temperature}, logprob_start_len=2)
    out = answer["output_ids"]
    assert len(out) == 24
    expected = logprobs(hf_student, PROMPT + out, temperature)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(output_logprobs(answer), expected, atol=TOLERANCE)
    given = answer["meta_info"]["input_token_logprobs"]
    assert given[0][0] is None and [entry[1] for entry in given] == PROMPT[2:]
    np.testing.assert_allclose([e[0] for e in given[1:]], logprobs(hf_student, PROMPT)[2:], atol=TOLERANCE)


def test_max_new_tokens_zero_scores_alone(engine: Engine, hf_student: Any) -> None:
    rows = random_prompts(9, seed=4)
    answers = engine.generate(rows, {"max_new_tokens": 0, "temperature": 0.3}, logprob_start_len=0)
    for row, answer in zip(rows, answers, strict=True):
        assert answer["output_ids"] == [] and answer["text"] == "" and output_logprobs(answer) == []
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
        assert answer["meta_info"]["completion_tokens"] == 0
        scored = answer["meta_info"]["input_token_logprobs"]
        assert [entry[1] for entry in scored] == row
        np.testing.assert_allclose([e[0] for e in scored[1:]], logprobs(hf_student, row), atol=TOLERANCE)


def test_without_return_logprob_there_are_none(engine: Engine) -> None:
    answer = engine.post("/generate", input_ids=PROMPT, sampling_params={"max_new_tokens": 3})
    assert len(answer["output_ids"]) == 3 and not answer["meta_info"].keys() & {
        "output_token_logprobs",
        "input_token_logprobs",
    }


def test_a_batch_is_answered_in_order_and_n_samples_side_by_side(engine: Engine) -> None:
    sampling = {"temperature": 2.0, "max_new_tokens": 10, "ignore_eos": True}
    rows = random_prompts(3, seed=7)
    answers = engine.generate(rows, {**sampling, "n": 2})
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [len(row) for row in rows for _ in range(2)]
    assert len({tuple(a["output_ids"]) for a in answers}) == 6
    assert len({a["meta_info"]["id"] for a in answers}) == 6
    four = engine.generate(PROMPT, {**sampling, "n": 4})
    assert len({tuple(a["output_ids"]) for a in four}) == 4
    assert isinstance(engine.generate([PROMPT], sampling), list)
    assert isinstance(engine.generate(PROMPT, sampling), dict)
    own = [{"temperature": 0, "max_new_tokens": num, "ignore_eos": True} for num in (3, 5)]
    pair = engine.generate([PROMPT, PROMPT], own, rid=["first", "second"])
    assert [(a["meta_info"]["id"], len(a["output_ids"])) for a in pair] == [("first", 3), ("second", 5)]
    assert pair[1]["output_ids"][:3] == pair[0]["output_ids"]


def test_many_at_once_equal_each_alone(engine: Engine) -> None:
    rows = random_prompts(24, seed=1)
    settings = [{"temperature": 0, "max_new_tokens": 4 + i} for i in range(len(rows))]
    with ThreadPoolExecutor(len(rows)) as pool:
        crowd = list(pool.map(lambda pair: engine.generate(*pair)["output_ids"], zip(rows, settings, strict=True)))
    assert crowd == [engine.generate(*pair)["output_ids"] for pair in zip(rows, settings, strict=True)]


def test_stop_tokens_are_in_the_ids_and_not_in_the_text(engine: Engine, tokenizer: Any) -> None:
    sampling = {"max_new_tokens": 20, "temperature": 0}
    full = engine.generate(PROMPT, {**sampling, "ignore_eos": True})
    ids = full["output_ids"]
    assert trimmed(engine, full["text"]) == tokenizer.decode(ids, skip_special_tokens=True)
    stop = ids[4]
    cut = engine.generate(PROMPT, {**sampling, "stop_token_ids": [stop, 2]})
    assert cut["output_ids"] == ids[: ids.index(stop) + 1] and len(cut["meta_info"]["output_token_logprobs"]) > 0
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert trimmed(engine, cut["text"]) == tokenizer.decode(ids[: ids.index(stop)], skip_special_tokens=True)
    ignored = engine.generate(PROMPT, {**sampling, "stop_token_ids": [stop], "ignore_eos": True})
    assert ignored["output_ids"] == ids


def test_text_is_tokenized_as_the_ids(engine: Engine, tokenizer: Any) -> None:
    sampling = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    text = tokenizer.decode(PROMPT)
    answer = engine.post("/generate", text=text, sampling_params=sampling)
    ids = tokenizer(text)["input_ids"]
    assert answer["output_ids"] == engine.generate(ids, sampling)["output_ids"]
    assert answer["meta_info"]["prompt_tokens"] == len(ids)


def test_a_seed_reproduces_a_sample_where_the_server_can(engine: Engine) -> None:
    """Without a seed every sample is another."""
    free = {"temperature": 2.0, "max_new_tokens": 16, "ignore_eos": True}
    assert len({tuple(engine.generate(PROMPT, free)["output_ids"]) for _ in range(3)}) == 3
    seeded = [tuple(engine.generate(PROMPT, {**free, "sampling_seed": seed})["output_ids"]) for seed in (5, 5, 6)]
    assert len(set(seeded)) == (3 if engine.differs("seed") else 2)
    if not engine.differs("seed"):
        assert seeded[0] == seeded[1]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (-1, 1e-6)])
def test_truncation_to_one_token_is_greedy_but_its_logprobs_are_not(
    engine: Engine, hf_student: Any, top_k: int, top_p: float
) -> None:
    sampling = {"temperature": 1.3, "top_k": top_k, "top_p": top_p, "max_new_tokens": 12}
    answer = engine.generate(PROMPT, sampling)
    out = answer["output_ids"]
    assert out == greedy(hf_student, PROMPT, 12)
    expected = np.array(logprobs(hf_student, PROMPT + out, 1.3)[len(PROMPT) - 1 :])
    assert expected.min() < -0.1
    errors = np.abs(np.array(output_logprobs(answer)) - expected)
    if top_k == 1 and engine.differs("greedy"):
        at_one = np.array(logprobs(hf_student, PROMPT + out, 1.0)[len(PROMPT) - 1 :])
        errors = np.minimum(errors, np.abs(np.array(output_logprobs(answer)) - at_one))
    np.testing.assert_array_less(errors, TOLERANCE)


def test_a_stream_grows_to_the_whole_answer(engine: Engine) -> None:
    sampling = {"max_new_tokens": 20, "temperature": 0}
    events = list(engine.stream(PROMPT, sampling, rid="streamed"))
    whole = engine.generate(PROMPT, sampling)
    assert len(events) > 1
    for before, after in itertools.pairwise(events):
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert after["text"].startswith(before["text"])
        assert before["meta_info"]["finish_reason"] is None
    last = events[-1]
    assert (last["output_ids"], last["text"]) == (whole["output_ids"], whole["text"])
    np.testing.assert_allclose(output_logprobs(last), output_logprobs(whole), atol=TOLERANCE)
    assert last["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert {event["meta_info"]["id"] for event in events} == {"streamed"}
    assert all(len(output_logprobs(event)) == event["meta_info"]["completion_tokens"] for event in events)


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "text"),
    "no id": ({"input_ids": []}, "empty"),
    "no text": ({"text": ""}, "empty"),
    "negative temperature": ({"sampling_params": {"temperature": -1}}, "temperature"),
    "top_p 0": ({"sampling_params": {"top_p": 0}}, "top_p"),
    "top_p 1.5": ({"sampling_params": {"top_p": 1.5}}, "top_p"),
    "top_k 0": ({"sampling_params": {"top_k": 0}}, "top_k"),
    "negative budget": ({"sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
    "long prompt": ({"input_ids": [3] * (CONTEXT + 1)}, "context length"),
    "long in sum": ({"sampling_params": {"max_new_tokens": CONTEXT}}, f"maximum context length of {CONTEXT}"),
    "start beyond the prompt": ({"return_logprob": True, "logprob_start_len": 50}, "logprob_start_len"),
    "one rid for two": ({"input_ids": [PROMPT, PROMPT], "rid": ["twin", "twin"]}, "Duplicate request ID"),
    "too few rids": ({"input_ids": [PROMPT, PROMPT], "rid": ["lone"]}, "rids"),
    "unknown adapter": ({"lora_path": "nobody"}, "nobody"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_its_reason(engine: Engine, name: str) -> None:
    body, reason = BAD_REQUESTS[name]
    given = {} if name == "nothing" or "text" in body else {"input_ids": PROMPT}
    status, answer = engine.send("/generate", {**given, **body})
    assert status == 400 and list(answer) == ["error"] and reason in answer["error"]["message"], (status, answer)


@pytest.mark.parametrize(
    "raw", [b'{"input_ids": [3,', b"[1]", b"", b'{"input_ids": "abc"}', b'{"input_ids": [3, 1.5]}'], ids=repr
)
def test_a_body_of_the_wrong_form_is_refused(engine: Engine, raw: bytes) -> None:
    status, answer = engine.send("/generate", raw=raw)
    assert status == 400
    assert answer["object"] == "error" and isinstance(answer["message"], str) and answer["message"]


@pytest.mark.parametrize("sampling", [{"temprature": 1}, {"temperature": "hot"}, []], ids=json.dumps)
def test_sampling_parameters_that_make_no_sense_are_refused(engine: Engine, sampling: Any) -> None:
    status, answer = engine.send("/generate", {"input_ids": [PROMPT], "sampling_params": sampling})
    if engine.differs("sampling_types"):
        assert status == 500
    else:
        assert status == 400 and answer["error"]["message"]


def test_unknown_keys_beside_the_sampling_parameters_are_ignored(engine: Engine) -> None:
    answer = engine.generate(PROMPT, {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True}, of_tomorrow=1)
    assert len(answer["output_ids"]) == 2


def test_the_context_can_be_used_to_its_end(engine: Engine) -> None:
    room = 20
    prompt = (PROMPT * CONTEXT)[: CONTEXT - room]
    answer = engine.generate(prompt, {"max_new_tokens": room, "temperature": 0, "ignore_eos": True})
    num = room - 2 if engine.differs("context") else room
    assert len(answer["output_ids"]) == num
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": num}


@pytest.mark.parametrize("body", [{"input_ids": [3, 92]}, {"input_ids": [3, -1]}, {"input_ids": [[3], []]}], ids=str)
def test_what_kills_sglang_is_refused_elsewhere(engine: Engine, body: Any) -> None:
    if engine.differs("dies"):
        pytest.skip("SGLang dies of it, which the client must prevent (DIFFERENCES)")
    status, answer = engine.send("/generate", body)
    assert status == 400 and answer["error"]["message"]
    assert engine.generate(PROMPT, {"max_new_tokens": 1})["output_ids"]
