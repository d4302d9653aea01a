"""Requests of the embedded engine, and the rows of a KV cache that decode together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from megatron_trd.rollout.embedded.lora import Adapter, LoraModel
from megatron_trd.rollout.embedded.sampling import RowSettings, sample


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One sequence from arrival to its last token. Belongs to the engine's thread until it has a finish reason."""

    rid: str
    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_ids: frozenset[int]
    logprob_start: int = -1
    """First prompt position to score; -1 = none."""
    num_top_logprobs: int = 0
    """How many of the likeliest ids of each scored position to tell."""
    told_ids: list[int] | None = None
    """Ids whose log-probabilities to tell at each scored position."""
    adapter: Adapter | None = None
    return_logprob: bool = False
    is_streamed: bool = False
    """Whether every token is reported, not only the end."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    input_logprobs: list[float | None] = field(default_factory=list)
    """log-probability (T = 1) of each prompt token from `logprob_start` on; the first entry is None."""
    input_top: list[list[tuple[float, int]] | None] = field(default_factory=list)
    """The likeliest ids in the place of each of those tokens, with theirs."""
    input_told: list[list[tuple[float, int]] | None] = field(default_factory=list)
    """`told_ids` in the same places."""
    version_spans: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    num_retractions: int = 0

    @property
    def all_ids(self) -> list[int]:
        """Prompt and what was sampled so far."""
        return self.prompt_ids + self.token_ids

    @property
    def is_scored(self) -> bool:
        """Whether the prompt still needs log-probabilities."""
        return self.logprob_start >= 0 and not self.input_logprobs

    def append(self, token_id: int, logprob: float, version: str) -> None:
        """Take one sampled token and decide whether it was the last."""
        if not self.version_spans or self.version_spans[-1]["version"] != version:
            self.version_spans.append({"version": version, "start": len(self.token_ids), "end": 0})
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.version_spans[-1]["end"] = len(self.token_ids)
        if token_id in self.stop_ids:
            self.finish_reason = {"type": "stop", "matched": token_id}
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = {"type": "length", "length": len(self.token_ids)}


class Batch:
    """Rows of one left-padded KV cache: B rows, L columns, one decoded token per row and step."""

    def __init__(self, model: LoraModel, requests: Sequence[Request], version: str) -> None:
        """Prefill the requests together and sample their first tokens."""
        self.model = model
        self.requests = list(requests)
        self.cache = DynamicCache()
        self.last_ids: Tensor
        self.settings = RowSettings.collect(
            [(r.temperature, r.top_p, r.top_k, r.seed) for r in requests], model.base.config.vocab_size
        )
        rows = [r.all_ids for r in requests]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        # A whole prompt's logits are large: 300 tokens of Qwen3's vocabulary are 180 MB.
        num_kept = max((len(r.all_ids) - r.logprob_start for r in requests if r.is_scored), default=1)
        logits = self._forward(ids, positions, logits_to_keep=num_kept)
        self._score_prompts(logits, ids[:, -num_kept:])
        for request in self.requests:
            if request.max_new_tokens == 0:
                request.finish_reason = {"type": "length", "length": 0}
        self._sample(logits[:, -1], version)

    @property
    def num_live(self) -> int:
        """Rows that still decode."""
        return sum(r.finish_reason is None for r in self.requests)

    def step(self, version: str) -> None:
        """Decode one token in every row; rows that have ended idle along until `compact`."""
        self.mask = pad(self.mask, (0, 1), value=1)
        positions = self.mask.sum(-1, keepdim=True) - 1
        self._sample(self._forward(self.last_ids[:, None], positions, logits_to_keep=1)[:, -1], version)

    def compact(self) -> None:
        """Drop the rows that have ended, and the columns that are padding in all others."""
        rows = torch.tensor([i for i, r in enumerate(self.requests) if r.finish_reason is None], dtype=torch.long)
        self.requests = [self.requests[i] for i in rows.tolist()]
        self.settings = self.settings.select(rows)
        self.last_ids = self.last_ids[rows]
        self.mask = self.mask[rows]
        first = int(self.mask.any(0).int().argmax()) if self.requests else 0
        self.mask = self.mask[:, first:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows, :, first:], layer.values[rows, :, first:]

    def join(self, other: Batch) -> None:
        """Append the rows of another batch; the narrower one is padded on the left."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self.requests += other.requests
        self.settings = self.settings.join(other.settings)
        self.last_ids = torch.cat([self.last_ids, other.last_ids])
        self.mask = torch.cat([_widened(self.mask, width, -1), _widened(other.mask, width, -1)])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([_widened(mine.keys, width, -2), _widened(theirs.keys, width, -2)])
            mine.values = torch.cat([_widened(mine.values, width, -2), _widened(theirs.values, width, -2)])

    def _forward(self, ids: Tensor, positions: Tensor, logits_to_keep: int) -> Tensor:
        return self.model(
            [r.adapter for r in self.requests],
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits.float()

    def _sample(self, logits_BV: Tensor, version: str) -> None:
        # Draws depend on the place in the whole sequence: a response goes on alike as the rest of a longer prompt.
        self.last_ids, logprobs = sample(logits_BV, self.settings, [len(r.all_ids) for r in self.requests])
        for request, token_id, logprob in zip(self.requests, self.last_ids.tolist(), logprobs.tolist(), strict=True):
            if request.finish_reason is None:
                request.append(token_id, logprob, version)

    def _score_prompts(self, logits_BLV: Tensor, ids_BL: Tensor) -> None:
        """Fill `input_logprobs` where they are asked for and not yet known."""
        logprobs_BL = -torch.nn.functional.cross_entropy(
            logits_BLV[:, :-1].transpose(1, 2), ids_BL[:, 1:], reduction="none"
        )
        for request, row, logits_LV in zip(self.requests, logprobs_BL, logits_BLV, strict=True):
            if request.is_scored:
                num = len(request.prompt_ids) - request.logprob_start - 1
                end = row.shape[0] - len(request.token_ids)
                request.input_logprobs = [None, *row[end - num : end].tolist()]
                _tell_others(request, logits_LV[end - num : end])


def _widened(tensor: Tensor, width: int, dim: int) -> Tensor:
    missing = width - tensor.shape[dim]
    return pad(tensor, (missing, 0) if dim == -1 else (0, 0, missing, 0))


def _tell_others(request: Request, logits_LV: Tensor) -> None:
    """Fill in what is asked of other tokens than the prompt's own."""
    if not request.num_top_logprobs and request.told_ids is None:
        return
    logprobs_LV = logits_LV.log_softmax(-1)
    if request.num_top_logprobs:
        top = logprobs_LV.topk(request.num_top_logprobs, dim=-1)
        pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        request.input_top = [None, *(list(zip(values, ids, strict=True)) for values, ids in pairs)]
    if request.told_ids is not None:
        told = logprobs_LV[:, request.told_ids].tolist()
        request.input_told = [None, *(list(zip(values, request.told_ids, strict=True)) for values in told)]
