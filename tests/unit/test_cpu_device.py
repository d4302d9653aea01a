"""The device shim: what it does to Megatron, and what it must not touch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_trd.mcore.cpu_device import use_cpu_where_there_is_no_cuda
from tiny_models import make_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")


def test_torch_factories_and_transformers_are_left_alone(tmp_path: Path) -> None:
    """A wrapped factory makes `from_pretrained` return wrong weights without an error."""
    path = make_model(tmp_path)
    factories = {name: getattr(torch, name) for name in ("zeros", "empty", "ones", "full", "arange", "tensor", "randn")}
    ids = torch.arange(12)[None]
    before = AutoModelForCausalLM.from_pretrained(path)(ids).logits
    assert use_cpu_where_there_is_no_cuda() == torch.device("cpu")
    assert all(getattr(torch, name) is factory for name, factory in factories.items())
    with torch.device("meta"):
        assert torch.zeros(1).is_meta
    assert torch.equal(AutoModelForCausalLM.from_pretrained(path)(ids).logits, before)


def test_megatron_finds_its_device_and_random_state() -> None:
    use_cpu_where_there_is_no_cuda()
    use_cpu_where_there_is_no_cuda()  # a second time changes nothing
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random as megatron_random

    assert torch.cuda.current_device() == torch.device("cpu")
    constants = str(clip_grads.clip_grad_by_total_norm_fp32.__code__.co_consts)
    assert "torch.FloatTensor" in constants and "cuda" not in constants
    tracker = megatron_random.CudaRNGStatesTracker()
    tracker.add("a", 1)
    torch.manual_seed(5)
    outside = torch.rand(3)
    torch.manual_seed(5)
    with tracker.fork("a"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), outside), "the fork disturbed the state outside"
    with tracker.fork("a"):
        second = torch.rand(3)
    assert not torch.equal(first, second), "the forked state does not move on"
    with pytest.raises(KeyError, match="'b'"), tracker.fork("b"):
        pass


def test_nested_forks_draw_one_stream() -> None:
    """As with Megatron's own: dropout inside a forked block must not draw the same mask at every step."""
    use_cpu_where_there_is_no_cuda()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def draws(nested: bool) -> list[torch.Tensor]:
        tracker = CudaRNGStatesTracker()
        tracker.add("a", 1)
        drawn = []
        for _ in range(2):
            with tracker.fork("a"):
                drawn.append(torch.rand(3))
                if nested:
                    with tracker.fork("a"):
                        drawn.append(torch.rand(3))
                else:
                    drawn.append(torch.rand(3))
                drawn.append(torch.rand(3))
        return drawn

    plain, nested = draws(False), draws(True)
    assert all(map(torch.equal, nested, plain))
    assert len({tuple(d.tolist()) for d in nested}) == 6
