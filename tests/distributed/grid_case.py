"""One grid of ranks against the fp64 dense reference: loss, all gradients, their norm, log-probabilities, export."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_trd.certificate.dense_reference import dense_logits, dense_reference
from megatron_trd.certificate.training_step import gradients, loss_of_all_ranks
from megatron_trd.config.schema import ObjectiveConfig, ParallelConfig
from tests.distributed.parity import LORA, build, compare, pack_step
from tiny_models import make_samples

TEMPERATURE = 0.7
NUM_SAMPLES = 5


@dataclass(frozen=True)
class GridCase:
    """Settings of one grid; a field that differs from its default is on."""

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

    def __str__(self) -> str:
        return "-".join(name if value is True else f"{name}{value}" for name, value in self.on.items())

    @property
    def on(self) -> dict[str, Any]:
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return {name: value for name, value, default in values if value != default}

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

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


def pairs_on(cases: Iterable[GridCase]) -> set[frozenset[str]]:
    """Return every pair of settings that are on together in some case."""
    return {frozenset(pair) for case in cases for pair in itertools.combinations(case.on, 2)}


def pairs_of(settings: Iterable[str]) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in itertools.combinations(settings, 2)}


def check_grids(rank: int, world: int, grids: list[tuple[GridCase, Path, Path]], objective: ObjectiveConfig) -> None:
    """Check cases of this many ranks, each with its student and teacher: the ranks import Megatron once for all."""
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    for case, student_path, teacher_path in grids:
        parallel_state.destroy_model_parallel()  # of the case before
        _check(rank, case, student_path, teacher_path, objective)


def _check(rank: int, case: GridCase, student_path: Path, teacher_path: Path, objective: ObjectiveConfig) -> None:
    from megatron_trd.data.packing import Multiples, pack_in_order
    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.groups import initialize_groups

    samples, parallel = make_samples(NUM_SAMPLES), case.parallel
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
    student.config = replace(student.config, objective=objective)
    adapter = None
    if case.lora:
        adapter = {k: v.clone() for k, v in hf_weights.export_adapter(student.gpt, groups)}
    expected = None
    if rank == 0:
        expected = dense_reference(objective, samples, student_path, teacher_path, adapter, LORA)
    for max_tokens in (10_000, 40):  # one micro-batch, several
        batch = pack_step(samples, groups, parallel, max_tokens=max_tokens, normalization=objective.loss_normalization)
        mine = batch[groups.dp_rank]
        sums = student.accumulate_gradients(mine, teacher)
        loss, grads = loss_of_all_ranks(sums, groups), gradients(student, groups)
        if expected is not None:
            compare(f"{case} max_tokens={max_tokens}", loss, grads, expected)
        audited = loss_of_all_ranks(student.audit(mine, teacher), groups)
        assert abs(audited - loss) <= 1e-6 * loss, case
    weights = {k: v.clone() for k, v in student.export()}
    found = student.response_logprobs(pack_in_order(samples, Multiples.of(parallel)), TEMPERATURE)
    _compare_logprobs(case, found, weights, student_path)
    if not case.lora:
        original = load_file(student_path / "model.safetensors")
        assert weights.keys() == original.keys(), case
        assert all(torch.equal(tensor, original[name]) for name, tensor in weights.items()), case
    result = student.train_step(mine, teacher)
    if expected is not None:
        unique = {id(g): g for g in expected[1].values()}.values()  # fused projections share an A
        norm = torch.stack([g.norm() for g in unique]).norm().item()
        assert abs(result.grad_norm - norm) <= 1e-5 * norm, (case, result.grad_norm, norm)


def _compare_logprobs(case: GridCase, found: torch.Tensor, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    weights = {k: v.double() for k, v in weights.items()}
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    expected = []
    with torch.no_grad():
        for s in make_samples(NUM_SAMPLES):
            logits = dense_logits(weights, path, s.student_prompt_ids, s.response_ids) / TEMPERATURE
            expected.append(logits.log_softmax(-1).gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0])
    torch.testing.assert_close(
        found.double(), torch.cat(expected), atol=1e-3, rtol=1e-5, msg=lambda told: f"{case}: {told}"
    )
