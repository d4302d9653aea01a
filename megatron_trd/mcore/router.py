"""Megatron's router, with a load-balancing loss that counts each token of a step once, and a look at the balance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_trd.data.packing import MicroBatch
from megatron_trd.mcore.groups import Groups


class BalancedRouter(TopKRouter):
    """Top-k of a softmax in fp32.

    The loss of a layer (Switch Transformer, arXiv 2101.03961, eq. 4), over the n tokens of a micro-batch of which c_i
    choose expert i and whose softmax gives it the probabilities that sum to P_i, is
    coeff * E * sum_i (c_i / (k n)) (P_i / n). A step's is their mean, weighted by n. Padding is not counted.
    Megatron's own would be divided by a number of tokens at the end, which our gradients, being sums, are not.
    """

    step_tokens: Tensor | float = 1.0
    """Tokens of the step over all ranks, without padding: what the weights of its micro-batches refer to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.load = torch.zeros(self.num_experts, device=torch.cuda.current_device())
        """Tokens of this rank that chose each expert, since it was last set to zero; padding not counted."""

    def gating(self, input: Tensor) -> Tensor:
        """Return the logits in the model's precision, as Hugging Face's routers do.

        Megatron's own (0.16.1) calls a function of Transformer Engine, there or not.
        """
        return F.linear(input, self.weight)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the base class; `padding_mask` is true where a token is padding."""
        probs, routing_map = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            real = routing_map if padding_mask is None else routing_map & ~padding_mask.reshape(-1, 1)
            self.load += real.sum(0)
        return probs, routing_map

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach this rank's part of the loss to `probs`: its own tokens' P_i, with everybody's c_i."""
        coeff = self.get_aux_loss_coeff("aux_loss")
        if not coeff:
            return probs
        counts = routing_map.sum(0).float()
        dist.all_reduce(counts, group=self.tp_cp_group)
        num_tokens = (counts.sum() / self.topk).clamp(min=1)
        shares = counts / (self.topk * num_tokens)
        loss = coeff * self.num_experts * (shares * scores_for_aux_loss.sum(0)).sum() / self.step_tokens
        return MoEAuxLossAutoScaler.apply(probs, loss)


def begin_step(model: nn.Module, micro_batches: Sequence[MicroBatch], groups: Groups) -> None:
    """Tell the routers how many tokens the step has, and have them count anew. Collective over all ranks."""
    tokens = torch.tensor(
        sum(int((~batch.student.is_padding).sum()) for batch in micro_batches),
        dtype=torch.float32,
        device=groups.device,
    )
    dist.all_reduce(tokens, group=groups.dp_cp)
    for router in _routers(model):
        router.step_tokens = tokens / groups.cp_size  # whose ranks have all counted the whole stream
        router.load.zero_()


def load_imbalance(model: nn.Module, num_layers: int, num_experts: int, groups: Groups) -> Tensor:
    """Return how many tokens of the step the busiest expert got over what an expert gets on average: the mean of the
    layers with experts, an fp64 scalar; 1 is balance. Collective over all ranks.
    """
    load = torch.zeros(num_layers, num_experts, device=groups.device)
    for router in _routers(model):
        load[router.layer_number - 1] = router.load
    dist.all_reduce(load)
    load = load[load.sum(1) > 0].double()
    return (load.amax(1) / load.mean(1)).mean()


def _routers(model: nn.Module) -> Iterator[BalancedRouter]:
    return (module for module in model.modules() if isinstance(module, BalancedRouter))
