"""Mixtures of experts on every kind of grid against the fp64 dense reference: loss, all gradients, norm and export."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import spawn
from megatron_trd.certificate.dense_reference import dense_reference
from megatron_trd.certificate.training_step import gradients, loss_of_all_ranks
from megatron_trd.config.schema import ObjectiveConfig, ParallelConfig
from tests.distributed.parity import LORA, build, compare
from tiny_models import make_model, make_samples


@dataclass(frozen=True)
class Case:
    ep: int = 1
    etp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    distopt: bool = False
    overlap: bool = False
    recompute: bool = False
    lora: bool = False
    mixed: bool = False
    """Some layers are dense, and the weights of a token's experts do not sum to one."""
    opsd: bool = False
    teacher_only: bool = False
    """The student is dense."""

    def __str__(self) -> str:
        on = {f.name: getattr(self, f.name) for f in fields(self) if self.is_on(f.name)}
        return "-".join(name if value is True else f"{name}{value}" for name, value in on.items())

    def is_on(self, setting: str) -> bool:
        return getattr(self, setting) != getattr(Case, setting)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            tensor_model_parallel_size=self.tp,
            sequence_parallel=self.tp > 1,
            pipeline_model_parallel_size=self.pp,
            num_virtual_stages_per_pipeline_rank=self.vpp,
            context_parallel_size=self.cp,
            use_distributed_optimizer=self.distopt,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap and self.distopt,
        )


CASES = [
    Case(ep=2, tp=2, pp=2, vpp=2, recompute=True, mixed=True),
    Case(ep=2, etp=2, tp=2, dp=2, distopt=True, overlap=True, opsd=True),
    Case(ep=2, pp=2, dp=2, distopt=True, lora=True, recompute=True),
    Case(ep=2, tp=2, cp=2, lora=True, mixed=True),
    Case(ep=2, pp=2, dp=2, distopt=True, overlap=True, mixed=True),  # experts on the second stage alone
    Case(ep=2, pp=2, teacher_only=True, dp=2),
    Case(tp=2, dp=2),  # copies of every expert on ranks that share the attention
]
OBJECTIVE = ObjectiveConfig()


def check_cases(rank: int, world: int, root: str) -> None:
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    for case in CASES:
        parallel_state.destroy_model_parallel()  # of the case before
        check_case(rank, root, case)


def check_case(rank: int, root: str, case: Case) -> None:
    from megatron_trd.data.packing import Multiples, pack
    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.groups import initialize_groups

    student_path = Path(root) / ("dense" if case.teacher_only else "mixed" if case.mixed else "sparse")
    teacher_path = student_path if case.opsd else Path(root) / ("sparse" if case.teacher_only else "dense")
    samples, parallel = make_samples(5), case.parallel
    groups = initialize_groups(parallel, 1, 0)
    student, teacher = build(
        student_path,
        teacher_path,
        groups,
        parallel,
        mode="opsd" if case.opsd else "opd",
        lora=case.lora,
        recompute_granularity="full" if case.recompute else "none",
    )
    adapter = None
    if case.lora:
        adapter = {k: v.clone() for k, v in hf_weights.export_adapter(student.gpt, groups)}
    expected = None
    if rank == 0:
        expected = dense_reference(OBJECTIVE, samples, student_path, teacher_path, adapter, LORA)
    for max_tokens in (10_000, 40):  # one micro-batch, several
        (batch,) = pack(
            samples,
            num_steps=1,
            dp_size=groups.dp_size,
            max_tokens=max_tokens,
            multiples=Multiples.of(parallel),
            normalization=OBJECTIVE.loss_normalization,
        )
        mine = batch[groups.dp_rank]
        sums = student.accumulate_gradients(mine, teacher)
        loss, grads = loss_of_all_ranks(sums, groups), gradients(student, groups)
        if expected is not None:
            compare(f"{case} max_tokens={max_tokens}", loss, grads, expected)
    weights = {k: v.clone() for k, v in student.export()}
    if not case.lora:
        original = load_file(student_path / "model.safetensors")
        assert weights.keys() == original.keys(), case
        assert all(torch.equal(tensor, original[name]) for name, tensor in weights.items()), case
    result = student.train_step(mine, teacher)
    if expected is not None:
        unique = {id(g): g for g in expected[1].values()}.values()  # fused projections share an A
        norm = torch.stack([g.norm() for g in unique]).norm().item()
        assert abs(result.grad_norm - norm) <= 1e-5 * norm, (case, result.grad_norm, norm)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_model(root / "sparse", family="qwen3_moe", layers=4, seed=1)
    make_model(
        root / "mixed",
        family="qwen3_moe",
        layers=4,
        seed=3,
        tied=False,
        mlp_only_layers=[0, 1],
        norm_topk_prob=False,
    )
    make_model(root / "dense", tied=False, hidden=48, layers=4, seed=2)
    return root


def test_pairs_of_settings_are_covered() -> None:
    settings = [f.name for f in fields(Case)]
    together = {pair for case in CASES for pair in itertools.combinations(filter(case.is_on, settings), 2)}
    matter = ("ep", "tp", "pp", "dp", "distopt", "lora")
    wanted = set(itertools.combinations(matter, 2)) | {("ep", other) for other in settings[1:]}
    assert not wanted - together


def test_loss_and_gradients_equal_the_dense_reference(models: Path) -> None:
    assert {case.tp * case.pp * case.cp * case.dp for case in CASES} == {4}
    spawn(check_cases, 4, str(models), timeout_s=400)  # one after the other: the ranks import Megatron once
