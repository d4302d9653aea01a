"""Attention over packed sequences for Megatron's local layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_trd.mcore.context_parallel import SlicedSeqParams


class PackedAttention(MegatronModule):
    """Causal attention inside each sequence of a packed stream, with grouped queries.

    On CUDA it is torch's variable-length flash attention. On the CPU the sequences are unpacked to
    [N, longest]. Under context parallelism a rank gathers all keys and values and attends from its own chunks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend. query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]; this rank's slice of T."""
        assert packed_seq_params is not None, "streams are always packed"
        bounds, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        key_bounds, longest_key = bounds, longest
        if isinstance(packed_seq_params, SlicedSeqParams):
            bounds, longest = packed_seq_params.query_bounds, longest // (2 * self.cp_group.size())
            key_bounds, longest_key = packed_seq_params.key_bounds, packed_seq_params.longest_key
            gathered = _GatherSlices.apply(torch.stack((key, value), 1), self.cp_group)
            key, value = gathered.index_select(0, packed_seq_params.key_places).unbind(1)
        attend = _attend_flash if query.is_cuda else _attend_unpacked
        return attend(query, key, value, bounds, key_bounds, longest, longest_key, self.scale).flatten(1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """No parameters, nothing to save."""
        return {}


class _GatherSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty((group.size() * part.size(0), *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        part = grad.new_empty((grad.size(0) // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(part, grad.contiguous(), group=ctx.group)
        return part, None


def _attend_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_key: int,
    scale: float,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.size(1) // key.size(1)
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    out = varlen_attn(
        query, key, value, bounds, key_bounds, longest, longest_key, scale=scale, window_size=(-1, 0)
    )  # causal from the last query and the last key backward, where there are more keys
    assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
    return out


def _attend_unpacked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_key: int,
    scale: float,
) -> Tensor:
    inside, query_rows = _unpack(bounds, longest)
    _, key_rows = _unpack(key_bounds, longest_key)
    q, k, v = (t[rows].transpose(1, 2) for t, rows in ((query, query_rows), (key, key_rows), (value, key_rows)))
    mask = None
    if key_bounds is not bounds:  # query i is the i-th of a chunk that ends where its keys end
        earlier = (key_bounds.diff() - bounds.diff())[:, None] + torch.arange(longest, device=query.device)
        mask = (torch.arange(longest_key, device=query.device) <= earlier[:, :, None])[:, None]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)[inside]


def _unpack(bounds: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return what is inside the sequences, and the row of each place: [N, longest] twice.

    Behind a sequence's end there is only padding, which repeats some real token and which causality hides.
    """
    offsets = torch.arange(longest, device=bounds.device)
    rows = bounds[:-1].long()[:, None] + offsets
    return offsets < bounds.diff()[:, None], rows.clamp_max(int(bounds[-1]) - 1)
