"""Tensor, sequence, pipeline (interleaved too), context and data parallelism against the fp64 dense reference.

Every case checks the loss, every gradient and their norm, the export and the log-probabilities. The cases cover every
pair of settings that four ranks allow.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import spawn
from megatron_trd.certificate.dense_reference import dense_logits, dense_reference
from megatron_trd.certificate.training_step import gradients, loss_of_all_ranks
from megatron_trd.config.schema import ObjectiveConfig, ParallelConfig
from tests.distributed.parity import LORA, build, compare
from tiny_models import make_model, make_samples


@dataclass(frozen=True)
class Case:
    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    distopt: bool = False
    overlap: bool = False
    recompute: bool = False
    lora: bool = False
    opsd: bool = False
    untied: bool = False

    def __str__(self) -> str:
        on = {f.name: getattr(self, f.name) for f in fields(self) if self.is_on(f.name)}
        return "-".join(name if value is True else f"{name}{value}" for name, value in on.items())

    def is_on(self, setting: str) -> bool:
        return getattr(self, setting) != getattr(Case, setting)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            sequence_parallel=self.sp,
            pipeline_model_parallel_size=self.pp,
            num_virtual_stages_per_pipeline_rank=self.vpp,
            context_parallel_size=self.cp,
            use_distributed_optimizer=self.distopt,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap and self.distopt,
        )


CASES = [
    Case(tp=2, sp=True, pp=2, vpp=2, opsd=True, untied=True, recompute=True),
    Case(tp=2, sp=True, cp=2, untied=True, lora=True, recompute=True),
    Case(tp=2, sp=True, dp=2, distopt=True, overlap=True, opsd=True, untied=True),
    Case(pp=2, vpp=2, cp=2, lora=True, opsd=True, distopt=True, overlap=True),
    Case(pp=2, vpp=2, dp=2, distopt=True, overlap=True, recompute=True),
    Case(cp=2, dp=2, distopt=True, overlap=True, opsd=True, untied=True, recompute=True),
    Case(tp=2, sp=True, dp=2, distopt=True, lora=True, recompute=True, overlap=True),
    Case(tp=2, pp=2, untied=True, lora=True, opsd=True),
    Case(pp=2),
    Case(cp=2),
]
OBJECTIVE = ObjectiveConfig(token_clip=3.0)


def check_case(rank: int, world: int, root: str, case: Case) -> None:
    from megatron_trd.data.packing import Multiples, pack, pack_in_order
    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.groups import initialize_groups

    torch.set_num_threads(1)
    student_path = Path(root) / ("untied" if case.untied else "tied")
    teacher_path = student_path if case.opsd else Path(root) / "teacher"
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
    student.config = replace(student.config, objective=OBJECTIVE)
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
        audited = loss_of_all_ranks(student.audit(mine, teacher), groups)
        assert abs(audited - loss) <= 1e-6 * loss
    weights = {k: v.clone() for k, v in student.export()}
    check_logprobs(
        student.response_logprobs(pack_in_order(samples, Multiples.of(parallel)), 0.7), weights, student_path
    )
    if not case.lora:
        original = load_file(student_path / "model.safetensors")
        assert weights.keys() == original.keys()
        assert all(torch.equal(tensor, original[name]) for name, tensor in weights.items())
    result = student.train_step(mine, teacher)
    if expected is not None:
        unique = {id(g): g for g in expected[1].values()}.values()  # fused projections share an A
        norm = torch.stack([g.norm() for g in unique]).norm().item()
        assert abs(result.grad_norm - norm) <= 1e-5 * norm


def check_logprobs(logprobs: torch.Tensor, weights: dict[str, torch.Tensor], path: Path) -> None:
    weights = {k: v.double() for k, v in weights.items()}
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    expected = []
    with torch.no_grad():
        for s in make_samples(5):
            logits = dense_logits(weights, path, s.student_prompt_ids, s.response_ids) / 0.7
            expected.append(logits.log_softmax(-1).gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0])
    torch.testing.assert_close(logprobs.double(), torch.cat(expected), atol=1e-3, rtol=1e-5)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_model(root / "tied", tied=True, layers=4, seed=1)
    make_model(root / "untied", tied=False, layers=4, seed=3)
    make_model(root / "teacher", tied=False, hidden=48, layers=4, seed=2)
    return root


def test_every_pair_of_settings_is_covered() -> None:
    settings = [f.name for f in fields(Case)]
    together = {pair for case in CASES for pair in itertools.combinations(filter(case.is_on, settings), 2)}
    assert not set(itertools.combinations(settings, 2)) - together
    assert all(any(not case.is_on(setting) for case in CASES) for setting in settings)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_equal_the_dense_reference(models: Path, case: Case) -> None:
    spawn(check_case, case.tp * case.pp * case.cp * case.dp, str(models), case, timeout_s=200)
