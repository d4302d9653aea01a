"""The output head's gradient goes directly into Megatron's buffer: equal gradients, no second tensor of its size."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch import spawn
from megatron_trd.certificate.dense_reference import dense_reference
from megatron_trd.certificate.training_step import gradients, loss_of_all_ranks
from megatron_trd.config.schema import ModelConfig, ObjectiveConfig, ParallelConfig
from tests.distributed.parity import LORA, build, compare, pack_step
from tiny_models import make_model, make_samples


@dataclass(frozen=True)
class Case:
    """A grid of two ranks. On pipelines the embedding, whose gradient is of the head's size, is elsewhere."""

    pp: int = 1
    tied: bool = False
    fused: bool = True
    lora: bool = False

    def __str__(self) -> str:
        return f"pp{self.pp}{'-tied' * self.tied}{'-fused' * self.fused}{'-lora' * self.lora}"

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            pipeline_model_parallel_size=self.pp, use_distributed_optimizer=self.pp == 1, overlap_grad_reduce=True
        )


CASES = [
    Case(pp=2),
    Case(pp=2, fused=False),
    Case(pp=2, tied=True),
    Case(pp=2, lora=True),
    Case(tied=True),
    Case(tied=True, fused=False),
    Case(),
]


class NewTensors(TorchDispatchMode):
    """Notes tensors of a shape that lie in memory of their own."""

    def __init__(self, shape: torch.Size, known: list[Tensor]) -> None:
        super().__init__()
        self.shape, self.known = shape, {x.untyped_storage().data_ptr() for x in known}
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if (
                isinstance(x, Tensor)
                and x.layout == torch.strided
                and x.shape == self.shape
                and x.untyped_storage().data_ptr() not in self.known
            ):
                self.seen.append(str(func))
        return out


def check(rank: int, world: int, root: str, cases: list[Case]) -> None:
    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.groups import initialize_groups

    groups = initialize_groups(cases[0].parallel, 1, 0)
    for case in cases:
        path, samples, objective = Path(root) / ("tied" if case.tied else "untied"), make_samples(5), ObjectiveConfig()
        parallel = case.parallel
        student, teacher = build(
            path, path, groups, parallel, mode="opsd", lora=case.lora, gradient_accumulation_fusion=case.fused
        )
        student.config = replace(student.config, objective=objective)
        adapter = {k: v.clone() for k, v in hf_weights.export_adapter(student.gpt, groups)} if case.lora else None
        batch = pack_step(samples, groups, parallel, max_tokens=40, normalization=objective.loss_normalization)
        assert len(batch[0]) > 1  # the buffer is added to, not written
        mode = NewTensors(torch.Size(()), [])
        if groups.is_last_stage:
            head = student.gpt.output_weight
            parameters = (*student.gpt.parameters(), *teacher._model.parameters())
            known = [*parameters, *(x.grad_data for x in student.ddp[-1].buffers)]
            mode = NewTensors(head.shape, known)
        with mode:
            sums = student.accumulate_gradients(batch[groups.dp_rank], teacher)
        if groups.is_last_stage and case.pp > 1:
            assert bool(mode.seen) == (not case.fused), (case, mode.seen)
        loss, grads = loss_of_all_ranks(sums, groups), gradients(student, groups)
        if rank == 0:
            compare(str(case), loss, grads, dense_reference(objective, samples, path, path, adapter, LORA))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_model(root / "tied", tied=True, seed=1)
    make_model(root / "untied", tied=False, seed=3)
    return root


@pytest.mark.parametrize("pp", [1, 2])
def test_gradients_are_right_and_the_head_has_no_second_one(models: Path, pp: int) -> None:
    spawn(check, 2, str(models), [case for case in CASES if case.pp == pp], timeout_s=200)


def check_layers(rank: int, world: int, root: str) -> None:
    from megatron.core.transformer.spec_utils import build_module

    from megatron_trd.mcore.acceleration import Acceleration
    from megatron_trd.mcore.groups import initialize_groups
    from megatron_trd.mcore.hf_config import read_hf_model
    from megatron_trd.mcore.layers import block_spec, layer_classes
    from megatron_trd.mcore.model_config import transformer_config

    groups = initialize_groups(ParallelConfig(), 1, 0)
    hf, model = read_hf_model(Path(root) / "tied", "hf-checkpoint", 1), ModelConfig(hf_checkpoint="x")
    config = transformer_config(hf, model, groups, sequence_parallel=False, virtual_stages=1, grouped_experts=False)
    for fused in (False, True):
        classes = layer_classes(Acceleration(layers="local", reason="", fused_wgrad=fused))
        (layer,) = block_spec(config, classes, None, (False,)).layer_specs
        # Megatron's linears ask for apex's kernel when they are told.
        with pytest.raises(RuntimeError, match="gradient_accumulation_fusion") if fused else nullcontext():
            build_module(layer, config=config, layer_number=1)
        assert not config.gradient_accumulation_fusion


def test_layers_are_told_of_the_fusion_and_the_model_is_not(models: Path) -> None:
    spawn(check_layers, 1, str(models))
