"""SGLang's `/generate` as the client speaks it: bodies, what must not leave, answers, and answers in several parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_trd.records import Completion, VersionSpan
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.server_client import RefusedError
from megatron_trd.weight_sync.base import ServerError

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text without special tokens."""
NOTHING = Completion(token_ids=(), text="", finish_reason="abort")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server answered to `/generate`."""

    completion: Completion
    prompt_logprobs: tuple[float | None, ...]
    """From `logprob_start_len` on, at T = 1; the first is None."""
    weight_version: str | None
    """Of the weights at its end."""
    meta: Mapping[str, Any]
    """The server's own words about it, for who asked for more."""


def sampling_body(prompt_ids: Sequence[int], params: SamplingParams, done_ids: Sequence[int] = ()) -> dict[str, Any]:
    """Return the body that samples a completion, or the rest of one that starts with `done_ids`.

    The seed stays: servers that know seeds count positions from the prompt's start, so the rest is the very one.
    """
    sampling: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens - len(done_ids),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
    }
    if params.stop_token_ids:
        sampling["stop_token_ids"] = list(params.stop_token_ids)
    if params.ignore_eos:
        sampling["ignore_eos"] = True
    if params.sampling_seed is not None:
        sampling["sampling_seed"] = params.sampling_seed
    return {"input_ids": [*prompt_ids, *done_ids], "sampling_params": sampling, "return_logprob": True}


def scoring_body(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> dict[str, Any]:
    """Return the body that scores a response. Raises RefusedError: without a prompt its first token has no score."""
    if not prompt_ids:
        raise RefusedError("score: the prompt is empty; give at least one token")
    return {
        "input_ids": [*prompt_ids, *response_ids],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(prompt_ids) - 1,
    }


def require_fit(where: str, body: Mapping[str, Any], vocab_size: int | None, context_length: int | None) -> None:
    """Refuse here what would kill a server or be refused there, as far as the limits are known.

    Raises:
        RefusedError: the prompt is empty, has ids outside the vocabulary, or does not fit with its budget.
    """
    ids, budget = body["input_ids"], body["sampling_params"]["max_new_tokens"]
    if not ids:
        raise RefusedError(f"the prompt is empty; {where} needs at least one token")
    if min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size):
        raise RefusedError(
            f"the prompt has ids outside the vocabulary of {vocab_size} of {where}; serve the model of the tokenizer"
        )
    if context_length is not None and len(ids) + budget > context_length:
        raise RefusedError(
            f"prompt of {len(ids)} tokens and --max-response-tokens {budget}: exceed the context of "
            f"{context_length} tokens of {where}; lower the budget or serve a longer context"
        )


def read_answer(raw: Any, where: str, adapter_version: str | None = None) -> Answer:
    """Check and parse an answer.

    Args:
        adapter_version: version of the adapter that the request named; None = the model's own weights. The server
            labels tokens with its own version, but a request keeps its adapter when another one becomes current.

    Raises:
        ServerError: it is not an answer to `/generate`, or ids and log-probabilities do not match.
    """
    try:
        meta = raw["meta_info"]
        reason, ids = meta["finish_reason"], tuple(raw["output_ids"])
        logprobs = tuple(entry[0] for entry in meta.get("output_token_logprobs", ()))
        if reason["type"] == "abort":  # ids are reported a step ahead of their log-probabilities
            ids = ids[: len(logprobs)]
            logprobs = logprobs[: len(ids)]
        if len(ids) != len(logprobs) or reason["type"] not in ("stop", "length", "abort"):
            raise ValueError(f"{len(ids)} ids, {len(logprobs)} log-probabilities, finish_reason {reason}")
        final = meta.get("weight_version")
        spans = _read_spans(meta, len(ids))
        if adapter_version is not None:
            spans = (VersionSpan(version=adapter_version, start=0, end=len(ids)),) if ids else ()
        return Answer(
            completion=Completion(
                token_ids=ids,
                text=str(raw.get("text", "")),
                finish_reason=reason["type"],
                logprobs=logprobs,
                weight_spans=spans,
                error=str(reason.get("message")) if reason["type"] == "abort" else None,
            ),
            prompt_logprobs=tuple(entry[0] for entry in meta.get("input_token_logprobs") or ()),
            weight_version=None if final is None else str(final),
            meta=meta,
        )
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ServerError(
            f"{where}: its answer to /generate cannot be read: {error!r}; is it an SGLang server?"
        ) from error


def _read_spans(meta: Mapping[str, Any], num_tokens: int) -> tuple[VersionSpan, ...]:
    """Return the spans, cut to the tokens that are there; servers before 0.5.19 tell the last version alone."""
    version = meta.get("weight_version")
    told = meta.get("weight_versions") or ([] if version is None else [{"version": version, "end": num_tokens}])
    spans = [
        VersionSpan(version=str(span["version"]), start=int(span.get("start", 0)), end=min(span["end"], num_tokens))
        for span in told
    ]
    spans = [span for span in spans if span.start < span.end]
    edges = [0, *(span.end for span in spans)]
    if spans and ([span.start for span in spans] != edges[:-1] or edges[-1] != num_tokens):
        raise ValueError(f"weight_versions {told} do not cover {num_tokens} tokens")
    return tuple(spans)


def joined(done: Completion, more: Completion, params: SamplingParams, decode: Decode) -> Completion:
    """Append the continuation of a response that broke off.

    The text is decoded from all ids: a character may be split between the parts, and a tokenizer treats the start of
    a text differently. A response that broke off behind its last token has ended.
    """
    offset = len(done.token_ids)
    ids = done.token_ids + more.token_ids
    reason = more.finish_reason
    if reason == "abort" and ids and ids[-1] in params.stop_token_ids:
        reason = "stop"
    elif reason == "abort" and len(ids) >= params.max_new_tokens:
        reason = "length"
    if reason == more.finish_reason and not offset:
        return more
    return Completion(
        token_ids=ids,
        text=decode(ids[:-1] if reason == "stop" else ids),
        finish_reason=reason,
        logprobs=done.logprobs + more.logprobs,
        weight_spans=_appended(done.weight_spans, more.weight_spans, offset),
        error=more.error if reason == "abort" else None,
    )


def _appended(spans: tuple[VersionSpan, ...], more: tuple[VersionSpan, ...], offset: int) -> tuple[VersionSpan, ...]:
    shifted = [replace(span, start=span.start + offset, end=span.end + offset) for span in more]
    if spans and shifted and spans[-1].version == shifted[0].version:
        shifted[0] = replace(shifted[0], start=spans[-1].start)
        spans = spans[:-1]
    return (*spans, *shifted)
