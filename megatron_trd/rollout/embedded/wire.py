"""SGLang's `/generate` wire: JSON bodies to requests of the embedded engine, and back."""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_trd.rollout.embedded.batch import Request
from megatron_trd.rollout.embedded.bodies import BodyError, NotServingError
from megatron_trd.rollout.embedded.engine import EmbeddedEngine

_NEUTRAL: dict[str, Any] = {
    "min_p": 0.0,
    "stop": None,
    "stop_regex": None,
    "min_new_tokens": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "logit_bias": None,
    "custom_params": None,
    "beam_width": None,
    "watermark": None,
}
"""Sampling keys of SGLang that this server knows only at their neutral value."""
_IGNORED = {"skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "stream_interval"}
_PER_PROMPT = ("sampling_params", "rid", "return_logprob", "logprob_start_len", "top_logprobs_num", "lora_path")
"""Fields of the body that may be a list with one entry for each prompt."""
_OWN = {"max_new_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos", "n", "sampling_seed"}


def parse_generate(body: Mapping[str, Any], engine: EmbeddedEngine) -> tuple[list[Request], bool]:
    """Turn a `/generate` body into requests, in prompt-major order, and say whether to answer with a list.

    Raises:
        BodyError: a field is of the wrong type.
        ValueError: what SGLang answers with HTTP 400, and token ids outside the vocabulary.
        NotServingError: the engine has stopped, or has no weights now.
    """
    trouble = engine.weights.trouble if engine.is_alive else "the engine has stopped"
    if trouble is not None:
        raise NotServingError(trouble)
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise ValueError("Either text or input_ids should be provided.")
    if not isinstance(ids, (list, type(None))) or not isinstance(text, (str, list, type(None))):
        raise BodyError("text must be a string or a list of them, input_ids a list of integers or of such lists")
    source = ids if text is None else text
    is_batch = isinstance(source, list) and bool(source) and (text is not None or isinstance(source[0], list))
    prompts: list[Any] = list(source or ()) if is_batch else [source]
    requests: list[Request] = []
    for i, prompt in enumerate(prompts):
        token_ids = engine.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        one = {key: _item(key, body.get(key), i, len(prompts)) for key in _PER_PROMPT}
        one["token_ids_logprob"] = body.get("token_ids_logprob")
        if is_batch and isinstance(body.get("rid"), str):
            one["rid"] = f"{body['rid']}_{i}"
        requests += _parse_one(token_ids, one, bool(body.get("stream")), engine)
    return requests, is_batch or len(requests) > 1


def _item(key: str, value: Any, i: int, num: int) -> Any:
    """Return what prompt i gets of a field that holds for all or is a list of `num`."""
    if not isinstance(value, list):
        return value
    if len(value) != num:
        raise ValueError(f"{len(value)} {key.removesuffix('s')}s for {num} prompts")
    return value[i]


def _parse_one(ids: Any, body: Mapping[str, Any], is_streamed: bool, engine: EmbeddedEngine) -> list[Request]:
    """Validate one prompt; return its `n` requests."""
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise BodyError("each of input_ids must be a list of integers")
    if not ids or not all(0 <= i < engine.vocab_size for i in ids):
        raise ValueError(f"input_ids must be a non-empty list of integers in [0, {engine.vocab_size})")
    values = _parse_sampling(body["sampling_params"] or {})
    max_new_tokens = values["max_new_tokens"]
    if len(ids) + max_new_tokens > engine.context_length:
        raise ValueError(
            f"Requested token count exceeds the model's maximum context length of {engine.context_length} tokens. "
            f"You requested a total of {len(ids) + max_new_tokens} tokens: {len(ids)} tokens from the input messages "
            f"and {max_new_tokens} tokens for the completion."
        )
    start = body["logprob_start_len"]
    start = -1 if start is None or not body["return_logprob"] else start
    if type(start) is not int or not -1 <= start < len(ids):
        raise ValueError(f"logprob_start_len must lie in [-1, {len(ids)}), not {start}")
    num_top, told_ids = body["top_logprobs_num"] or 0, body["token_ids_logprob"]
    if not _is_int(num_top, 0) or num_top > engine.vocab_size:
        raise ValueError(f"top_logprobs_num must lie in [0, {engine.vocab_size}], not {num_top}")
    if not _is_id_list(told_ids) or not all(0 <= i < engine.vocab_size for i in told_ids or ()):
        raise ValueError(f"token_ids_logprob must be a list of integers in [0, {engine.vocab_size})")
    name, adapters = body["lora_path"], engine.model.adapters
    if name and name not in adapters:
        raise ValueError(f"Got LoRA adapter that has never been loaded: {name}\nAll loaded adapters: {list(adapters)}.")
    seed, num, rid = values["sampling_seed"], values["n"], body["rid"]
    stop_ids = frozenset() if values["ignore_eos"] else engine.eos_ids | frozenset(values["stop_token_ids"] or ())
    return [
        Request(
            rid=rid if isinstance(rid, str) and num == 1 else uuid.uuid4().hex,
            prompt_ids=ids,
            max_new_tokens=max_new_tokens,
            temperature=values["temperature"],
            top_p=values["top_p"],
            top_k=values["top_k"],
            seed=secrets.randbits(63) if seed is None else seed + i,
            stop_ids=stop_ids,
            logprob_start=start,
            num_top_logprobs=num_top,
            told_ids=told_ids,
            adapter=adapters[name] if name else None,
            return_logprob=bool(body["return_logprob"]),
            is_streamed=is_streamed,
        )
        for i in range(num)
    ]


def _parse_sampling(sampling: Any) -> dict[str, Any]:
    if not isinstance(sampling, Mapping):
        raise ValueError("sampling_params must be a JSON object")
    unknown = sampling.keys() - _OWN - _IGNORED - _NEUTRAL.keys()
    if unknown:
        raise ValueError(f"unknown sampling parameter: {', '.join(sorted(unknown))}")
    for key in sampling.keys() & _NEUTRAL.keys():
        if sampling[key] != _NEUTRAL[key] and sampling[key] is not None:
            raise ValueError(f"{key}={sampling[key]!r} is not supported by the embedded server")
    values = {
        "max_new_tokens": 128,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "stop_token_ids": None,
        "ignore_eos": False,
        "n": 1,
        "sampling_seed": None,
    } | {key: value for key, value in sampling.items() if key in _OWN}
    for key, ok, rule in (
        ("max_new_tokens", _is_int(values["max_new_tokens"], 0), "an integer of at least 0"),
        ("temperature", _is_number(values["temperature"]) and values["temperature"] >= 0, "a non-negative number"),
        ("top_p", _is_number(values["top_p"]) and 0 < values["top_p"] <= 1, "in (0, 1]"),
        ("top_k", values["top_k"] == -1 or _is_int(values["top_k"], 1), "-1 or an integer of at least 1"),
        ("n", _is_int(values["n"], 1), "an integer of at least 1"),
        ("ignore_eos", isinstance(values["ignore_eos"], bool), "true or false"),
        ("sampling_seed", values["sampling_seed"] is None or type(values["sampling_seed"]) is int, "an integer"),
        ("stop_token_ids", _is_id_list(values["stop_token_ids"]), "a list of integers"),
    ):
        if not ok:
            raise ValueError(f"{key} must be {rule}, got {values[key]!r}.")
    return values


def _is_int(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_id_list(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(type(i) is int for i in value))


def render(request: Request, engine: EmbeddedEngine) -> dict[str, Any]:
    """Return SGLang's answer: for a finished request, or for what a streamed one has so far."""
    reason = request.finish_reason
    is_stopped = reason is not None and reason["type"] == "stop"
    spans = request.version_spans or [{"version": engine.weight_version, "start": 0, "end": 0}]
    meta: dict[str, Any] = {
        "id": request.rid,
        "finish_reason": reason,
        "prompt_tokens": len(request.prompt_ids),
        "completion_tokens": len(request.token_ids),
        "cached_tokens": 0,
        "weight_version": spans[-1]["version"],
        "num_retractions": request.num_retractions,
    }
    if reason is not None:
        meta["weight_versions"] = spans
    if request.return_logprob:
        meta["input_token_logprobs"] = _pairs(request.input_logprobs, request.prompt_ids[request.logprob_start :])
        meta["output_token_logprobs"] = _pairs(request.logprobs, request.token_ids)
        meta["output_token_logprobs_length"] = len(request.token_ids)
        for name, entries in (("top_logprobs", request.input_top), ("token_ids_logprobs", request.input_told)):
            if entries:  # SGLang tells them of sampled tokens too; this server of prompts alone
                meta[f"input_{name}"] = [entry and [[logprob, i, None] for logprob, i in entry] for entry in entries]
    return {
        "text": engine.tokenizer.decode(
            request.token_ids[:-1] if is_stopped else request.token_ids, skip_special_tokens=True
        ),
        "output_ids": list(request.token_ids),
        "meta_info": meta,
    }


def _pairs(logprobs: Sequence[float | None], ids: Sequence[int]) -> list[list[Any]]:
    return [[logprob, token_id, None] for logprob, token_id in zip(logprobs, ids, strict=False)]
