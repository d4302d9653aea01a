"""Attention over packed sequences for Megatron's local layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedAttention(MegatronModule):
    """Causal attention inside each sequence of a packed stream, with grouped queries.

    On CUDA it is torch's variable-length flash attention. On the CPU the sequences are unpacked to
    [N, longest]: behind a sequence's end there is only padding, which causality already hides.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend. query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]."""
        assert packed_seq_params is not None, "streams are always packed"
        bounds, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        attend = _attend_flash if query.is_cuda else _attend_unpacked
        return attend(query, key, value, bounds, longest, self.scale).flatten(1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """No parameters, nothing to save."""
        return {}


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.size(1) // key.size(1)
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    out = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
    return out


def _attend_unpacked(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    starts, lengths = bounds[:-1].long(), (bounds[1:] - bounds[:-1]).long()
    offsets = torch.arange(longest, device=query.device)
    inside = offsets < lengths[:, None]  # [N, longest]
    source = (starts[:, None] + offsets).clamp_max(query.size(0) - 1)  # padding repeats some real token
    q, k, v = (t[source].transpose(1, 2) for t in (query, key, value))  # [N, heads, longest, d]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)[inside]
