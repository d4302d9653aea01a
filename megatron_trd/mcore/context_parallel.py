"""Which tokens of a packed stream a context-parallel rank holds, and which keys they attend to.

Every sequence is cut into 2 cp chunks of equal length; rank r holds chunks r and 2 cp - 1 - r, so causal attention
costs all ranks the same. A rank's slice of the stream is its chunks, sequence after sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(kw_only=True)
class SlicedSeqParams(PackedSeqParams):
    """A packed stream as one rank's attention sees it: its chunks as queries, each with all the keys up to its end."""

    query_bounds: Tensor  # [2 N + 1] int32
    key_bounds: Tensor  # [2 N + 1] int32
    longest_key: int
    key_places: Tensor  # [K]: rows of the keys gathered from all ranks


def places(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """Return for each of the T positions of a stream its place among the ranks' slices laid end to end."""
    bounds = cu_seqlens.long()
    lengths, position = bounds.diff(), torch.arange(int(bounds[-1]), device=bounds.device)
    starts = bounds[:-1].repeat_interleave(lengths)
    chunk_length = (lengths // (2 * cp_size)).repeat_interleave(lengths)
    chunk = (position - starts) // chunk_length
    mirrored = chunk >= cp_size
    rank = torch.where(mirrored, 2 * cp_size - 1 - chunk, chunk)
    inside = (position - starts) % chunk_length + mirrored * chunk_length
    return rank * (position.numel() // cp_size) + starts // cp_size + inside


def tokens_of_rank(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Return the T / cp positions of a stream that a rank holds, in the order of its slice."""
    return places(cu_seqlens, cp_size).argsort().chunk(cp_size)[cp_rank]


def sliced_seq_params(cu_seqlens: Tensor, max_seqlen: int, cp_size: int, cp_rank: int) -> SlicedSeqParams:
    """Describe a rank's slice of a stream to Megatron and to our attention."""
    bounds = cu_seqlens.long()
    chunk_length = bounds.diff() // (2 * cp_size)
    ends = torch.tensor([cp_rank + 1, 2 * cp_size - cp_rank], device=bounds.device)  # in chunks
    key_lengths = (chunk_length[:, None] * ends).flatten()
    key_bounds = torch.nn.functional.pad(key_lengths.cumsum(0), (1, 0))
    first_key = bounds[:-1].repeat_interleave(2) - key_bounds[:-1]
    keys = first_key.repeat_interleave(key_lengths) + torch.arange(int(key_bounds[-1]), device=bounds.device)
    return SlicedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        query_bounds=torch.nn.functional.pad(chunk_length.repeat_interleave(2).cumsum(0), (1, 0)).int(),
        key_bounds=key_bounds.int(),
        longest_key=max_seqlen // (2 * cp_size) * (2 * cp_size - cp_rank),
        key_places=places(cu_seqlens, cp_size)[keys],
    )
