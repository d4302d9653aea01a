"""Draw one token for every row of a batch, each row with its own settings and its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """Sampling settings of B rows as columns. Greedy decoding is top_k = 1 at temperature 1."""

    temperature: Tensor  # [B] float32, positive
    top_p: Tensor  # [B] float64; infinity = off
    top_k: Tensor  # [B] int64; at most the vocabulary
    seeds: np.ndarray  # [B] uint64

    @classmethod
    def collect(cls, rows: Sequence[tuple[float, float, int, int]], vocab_size: int) -> RowSettings:
        """Build the columns from (temperature, top_p, top_k, seed) tuples in SGLang's conventions."""
        greedy = [row[0] == 0 for row in rows]
        return cls(
            temperature=torch.tensor([row[0] or 1.0 for row in rows], dtype=torch.float32),
            top_p=torch.tensor([row[1] if row[1] < 1 else torch.inf for row in rows], dtype=torch.float64),
            top_k=torch.tensor(
                [
                    1 if is_greedy else min(row[2], vocab_size) if row[2] > 0 else vocab_size
                    for row, is_greedy in zip(rows, greedy, strict=True)
                ]
            ),
            seeds=np.array([row[3] & (2**64 - 1) for row in rows], dtype=np.uint64),
        )

    def select(self, rows: Tensor) -> RowSettings:
        """Keep some rows."""
        return RowSettings(
            temperature=self.temperature[rows],
            top_p=self.top_p[rows],
            top_k=self.top_k[rows],
            seeds=self.seeds[rows.numpy()],
        )

    def join(self, other: RowSettings) -> RowSettings:
        """Append the rows of another batch."""
        return RowSettings(
            temperature=torch.cat([self.temperature, other.temperature]),
            top_p=torch.cat([self.top_p, other.top_p]),
            top_k=torch.cat([self.top_k, other.top_k]),
            seeds=np.concatenate([self.seeds, other.seeds]),
        )


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return numbers in [0, 1) that depend on (seed, position) alone: a counter hashed by splitmix64's finaliser.

    Args:
        seeds, positions: [B] uint64.
    """
    with np.errstate(over="ignore"):
        return (_mix(_mix(seeds + _GOLDEN) + (positions + np.uint64(1)) * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample(logits_BV: Tensor, settings: RowSettings, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw a token per row by inverting the truncated distribution's cumulative sum, likeliest token first.

    A token is kept if fewer than `top_k` tokens are likelier and those have less than `top_p` of the mass.

    Args:
        logits_BV: float32.
        positions: tokens each row has sampled so far; with the row's seed it fixes the random number.

    Returns:
        ids [B] and their log softmax(logits / T) before truncation [B].
    """
    logprobs_BV = torch.log_softmax(logits_BV / settings.temperature[:, None], dim=-1)
    top = logprobs_BV.topk(int(settings.top_k.max()), dim=-1)
    mass = top.values.double().exp_()
    before = mass.cumsum(-1) - mass
    kept = (before < settings.top_p[:, None]) & (torch.arange(mass.shape[1]) < settings.top_k[:, None])
    cumulative = (mass * kept).cumsum(-1)
    draw = torch.from_numpy(uniforms(settings.seeds, np.asarray(positions, dtype=np.uint64)))
    rank = (cumulative <= (draw * cumulative[:, -1])[:, None]).sum(-1)
    rank = torch.minimum(rank, kept.sum(-1) - 1)[:, None]
    return top.indices.gather(1, rank)[:, 0], top.values.gather(1, rank)[:, 0]
