"""Every byte that `linear_kl_div` holds is counted: none of it may grow with tokens times vocabulary."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trd_kernels import linear_kl_div, linear_kl_div_reference

WIDTH, VOCAB = 512, 1003
STATS = ("student_logprob", "teacher_entropy", "argmax_match", "teacher_mass")


class AllocationMeter(TorchDispatchMode):
    """Counts bytes of storages that operators created and that some tensor still uses."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.foreign = {x.untyped_storage().data_ptr() for x in inputs}
        self.users: dict[int, int] = {}
        self.live_bytes = 0
        self.peak_bytes = 0
        self.largest_numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x)
        return out

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key == 0 or key in self.foreign:
            return
        if key not in self.users:
            self.users[key] = 0
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self.largest_numel = max(self.largest_numel, size // x.element_size())
        self.users[key] += 1
        weakref.finalize(x, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if self.users[key] == 0:
            del self.users[key]
            self.live_bytes -= size


def measure(
    num_tokens: int, *, trainable_head: bool = False, backward: bool = False, **options: Any
) -> AllocationMeter:
    """Run one call under the meter."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, WIDTH, generator=g).requires_grad_()
    head = (torch.randn(VOCAB, WIDTH, generator=g) * 0.2).requires_grad_(trainable_head)
    teacher = torch.randn(num_tokens, WIDTH, generator=g), torch.randn(VOCAB, WIDTH, generator=g) * 0.2
    labels = torch.randint(VOCAB, (num_tokens,), generator=g)
    weight = torch.ones(num_tokens)
    weight[::7] = 0
    token_set = torch.tensor([1, 2])
    meter = AllocationMeter(hidden, head, *teacher, labels, weight, token_set)
    with meter:
        out = linear_kl_div(
            hidden,
            head,
            *teacher,
            vocab_size=VOCAB - 3,
            labels=labels,
            token_weight=weight,
            token_set=token_set,
            stats=STATS,
            **{"workspace_mb": 0.5, **options},
        )
        if backward:
            out.loss.backward()
    return meter


OPTIONS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd"},
    "mixed": {"divergence": "mixed", "temperature": 2.0},
    "entry-clip": {"entry_clip": 0.1},
    "top-32-tail": {"teacher_top_k": 32, "top_k_mode": "tail_bucket"},
}


def test_meter_sees_a_materialised_logit_matrix() -> None:
    hidden, head = torch.randn(64, 8), torch.randn(500, 8)
    with AllocationMeter(hidden, head) as meter:
        linear_kl_div_reference(hidden, head, hidden, head, vocab_size=500, dtype=torch.float32)
    assert meter.largest_numel >= 64 * 500
    assert meter.peak_bytes >= 4 * 64 * 500 * 4


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_grows_only_by_the_hidden_gradient_and_token_vectors(name: str) -> None:
    few, many = (measure(n, **OPTIONS[name]) for n in (256, 1024))
    hidden_gradient = (1024 - 256) * WIDTH * 4
    growth = many.peak_bytes - few.peak_bytes
    assert hidden_gradient <= growth <= 1.05 * hidden_gradient
    assert many.largest_numel < 1024 * VOCAB
    assert many.largest_numel == max(1024 * WIDTH, few.largest_numel)


def test_backward_adds_one_scaled_gradient() -> None:
    few, many = (measure(n, backward=True) for n in (256, 1024))
    hidden_gradient = (1024 - 256) * WIDTH * 4
    assert many.peak_bytes - few.peak_bytes <= 2.05 * hidden_gradient


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("workspace_mb", [0.25, 1.0, 4.0])
def test_workspace_is_bounded(name: str, workspace_mb: float) -> None:
    num_tokens = 512
    meter = measure(num_tokens, workspace_mb=workspace_mb, **OPTIONS[name])
    rows = workspace_mb * 2**20 / (16 * VOCAB)
    hidden_rows = 3 * rows * WIDTH * 4
    token_vectors = 100 * num_tokens
    assert meter.peak_bytes <= workspace_mb * 2**20 + num_tokens * WIDTH * 4 + hidden_rows + token_vectors


def test_frozen_head_needs_no_head_sized_memory() -> None:
    frozen, trainable = measure(64), measure(64, trainable_head=True)

    assert trainable.peak_bytes - frozen.peak_bytes == VOCAB * WIDTH * 4
