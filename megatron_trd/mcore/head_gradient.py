"""The output head's gradient goes straight into Megatron's gradient buffer: no second tensor of the head's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _InMainGrad(torch.autograd.Function):
    """The identity of a loss; its backward pass tells Megatron's hook on `weight` that there is nothing to add."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight = ctx.weight
        weight.grad_added_to_main_grad = True
        # With overlapped reduction the hook must find a gradient, and run in the device's thread like all others,
        # lest collectives change their order: a tensor on the device does that, and a sparse one holds nothing.
        return grad, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device, layout=torch.sparse_coo)


def announce_in_main_grad(loss: Tensor, weight: Tensor) -> Tensor:
    """Return the loss, whose backward pass will satisfy Megatron's hooks.

    Args:
        loss: of an operator that adds the gradient of `weight` to `weight.main_grad` itself.
        weight: an output head that nothing else gives a gradient; an embedding on the same stage does, and then its
            hook must add that one as ever.
    """
    return _InMainGrad.apply(loss, weight)
