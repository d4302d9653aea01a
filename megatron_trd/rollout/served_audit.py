"""A served teacher along a response, as far as the wire tells: no entropy, and no divergence from another model."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, fsum
from typing import Any

from megatron_trd.objectives.token_audit import TokenAudit, largest_outside
from megatron_trd.records import Sample
from megatron_trd.rollout.generate_wire import Answer, scoring_body
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.weight_sync.base import ServerError


async def audit_served(fleet: SGLangFleet, sample: Sample, epistemic_ids: Sequence[int]) -> TokenAudit:
    """Return what a served teacher says along one response, in the teacher's context.

    Raises:
        ServerError: no server answered, or one does not tell the log-probabilities of other tokens of a prompt.
    """
    body = scoring_body(sample.teacher_prompt_ids, sample.response_ids) | {
        "token_ids_logprob": list(epistemic_ids),
        "top_logprobs_num": len(epistemic_ids) + 1,  # one of them is no such word
    }
    return read_audit(await fleet.ask(body, sample.teacher_prompt_ids), len(sample.response_ids), epistemic_ids)


def read_audit(answer: Answer, num_tokens: int, epistemic_ids: Sequence[int]) -> TokenAudit:
    """Parse an answer. Raises ServerError: it does not tell of each token what was asked."""
    epistemic = frozenset(epistemic_ids)
    try:
        chosen = _per_token(answer, "input_token_ids_logprobs", num_tokens)
        top = _per_token(answer, "input_top_logprobs", num_tokens)
        return TokenAudit(
            teacher_logprob=tuple(float(entry[0]) for entry in _per_token(answer, "input_token_logprobs", num_tokens)),
            epistemic_mass=tuple(fsum(exp(entry[0]) for entry in entries) for entries in chosen),
            best_continuation=tuple(
                exp(largest_outside([entry[1] for entry in entries], [entry[0] for entry in entries], epistemic))
                for entries in top
            ),
        )
    except (TypeError, IndexError, ValueError) as error:
        raise ServerError(
            f"a server does not tell the log-probabilities of other tokens along a prompt ({error}); use one that "
            "knows token_ids_logprob and top_logprobs_num, or audit with loaded models under torchrun"
        ) from error


def _per_token(answer: Answer, name: str, num_tokens: int) -> list[Any]:
    """Return the entries of the response's tokens; the one before them has no predecessor, and no values."""
    entries = (answer.meta.get(name) or [])[1:]
    if len(entries) != num_tokens:
        raise ValueError(f"{name} has {len(entries)} of {num_tokens} entries")
    return entries
