"""`linear_kl_div` over 1, 2 and 4 tensor-parallel ranks (gloo), with and without sequence parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.linear_kl_dense import MODES, STATS, Case, dense, peaked_case, relative_error, tied_case
from trd_kernels import linear_kl_div

UPSTREAM = -2.5
MECHANICS = ("chunk", "grad_reduce_dtype", "overlap_grad_reduce", "grad_weight_factor", "backend")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Inputs and options of one call, identical on all ranks."""

    case: Case
    options: dict[str, Any]
    frozen_head: bool = False
    to_main_grad: bool = False
    tolerance: float = 1e-10


def scenarios() -> dict[str, Scenario]:
    """Return every call that all ranks make, in order."""
    case = peaked_case()
    out = {name: Scenario(case=case, options=options) for name, options in MODES.items()}
    # With 4 ranks of 44 rows, the last owns padding alone.
    short = peaked_case(vocab_size=130)
    for name in ("forward", "jsd", "top-6-tail"):
        out[f"only-padding-{name}"] = Scenario(case=short, options=MODES[name])
    for name in ("top-6-both", "top-6-teacher", "top-6-tail"):
        out[f"ties-{name}"] = Scenario(case=tied_case(), options=MODES[name])
    for name in ("forward", "reverse", "mixed", "top-6-both"):
        out[f"fp32-{name}"] = Scenario(case=peaked_case(dtype=torch.float32), options=MODES[name], tolerance=1e-5)
    out["main-grad"] = Scenario(case=case, options={}, to_main_grad=True)
    out["main-grad-known-factor"] = Scenario(case=case, options={"grad_weight_factor": UPSTREAM}, to_main_grad=True)
    out["frozen"] = Scenario(case=case, options={}, frozen_head=True)
    out["offset"] = Scenario(case=peaked_case(offset=-60.0), options={})
    for chunk in (1, 3, 100, (4, 12), (8, 16), (5, 100)):
        out[f"chunk-{chunk}"] = Scenario(case=case, options={"chunk": chunk})
    out["overlap"] = Scenario(case=case, options={"chunk": (4, 8), "overlap_grad_reduce": True})
    for name in ("forward", "reverse", "jsd", "both-clips", "top-6-both", "top-6-tail"):
        options = MODES[name] | {"backend": "triton", "chunk": (4, 12)}
        out[f"triton-{name}"] = Scenario(case=peaked_case(dtype=torch.float32), options=options, tolerance=1e-5)
        padded = peaked_case(vocab_size=130, dtype=torch.float32)
        out[f"triton-only-padding-{name}"] = Scenario(case=padded, options=options, tolerance=2e-5)
    # Shards keep 6, 0, 3 and 6 tokens of 6; what is dropped is garbage, also where fillers point at it.
    weight = torch.ones(24, dtype=torch.float64)
    weight[6:12] = 0.0
    weight[12:15] = 0.0
    garbage = replace(case, token_weight=weight, student_input=case.student_input.clone())
    out["unequal-shards"] = Scenario(case=garbage, options={"chunk": 5})
    out["unequal-shards-two-level"] = Scenario(case=garbage, options={"chunk": (4, 12), "overlap_grad_reduce": True})
    out["masked"] = Scenario(case=replace(case, token_weight=torch.zeros_like(weight)), options={})
    out["bf16-reduce"] = Scenario(
        case=peaked_case(dtype=torch.float32), options={"grad_reduce_dtype": torch.bfloat16}, tolerance=2.0**-7
    )
    return out


def call(scenario: Scenario, group: dist.ProcessGroup, sequence_parallel: bool) -> dict[str, Tensor]:
    """Make the call with this rank's shards."""
    case, rank, size = scenario.case, dist.get_rank(group), dist.get_world_size(group)
    student_input, student_weight, teacher_input, teacher_weight = case.heads()
    student_input = student_input.masked_fill((case.token_weight == 0)[:, None], torch.nan)
    if sequence_parallel:
        student_input, teacher_input = student_input.chunk(size)[rank], teacher_input.chunk(size)[rank]
    hidden = student_input.clone().requires_grad_()
    head = student_weight.chunk(size)[rank].clone().requires_grad_(not scenario.frozen_head)
    main_grad = head.new_zeros(head.shape) if scenario.to_main_grad else None
    out = linear_kl_div(
        hidden,
        head,
        teacher_input,
        teacher_weight.chunk(size)[rank],
        vocab_size=case.vocab_size,
        token_weight=case.token_weight,
        labels=case.labels,
        token_set=case.token_set,
        stats=STATS,
        tp_group=group,
        sequence_parallel=sequence_parallel,
        return_top_k=3,
        grad_weight_out=main_grad,
        **{"chunk": 8, **scenario.options},
    )
    (UPSTREAM * out.loss).backward()
    assert (head.grad is None) == (scenario.frozen_head or scenario.to_main_grad)
    result = {"loss": out.loss.detach(), "token_loss": out.token_loss, "input_grad": hidden.grad, **out.stats}
    return result if scenario.frozen_head else {**result, "weight_grad": head.grad if main_grad is None else main_grad}


def work(rank: int, size: int, directory: str) -> None:
    """Run all scenarios on one rank and leave its results in a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    results = {
        (name, sequence_parallel): call(scenario, dist.group.WORLD, sequence_parallel)
        for name, scenario in scenarios().items()
        for sequence_parallel in (False, True)
    }
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


Results = list[dict[tuple[str, bool], dict[str, Tensor]]]


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Results of each rank; one set of processes per world size makes all calls."""
    size: int = request.param
    directory: Path = tmp_path_factory.mktemp(f"tp{size}")
    mp.spawn(work, args=(size, str(directory)), nprocs=size)
    yield [torch.load(directory / f"{rank}.pt") for rank in range(size)]


def top_k(case: Case, k: int) -> dict[str, Tensor]:
    """Return each side's likeliest ids and their log-probabilities by definition, the lowest ids among ties."""
    out = {}
    for side in ("student", "teacher"):
        hidden, head = (getattr(case, f"{side}_{what}").double() for what in ("input", "weight"))
        logprobs = (hidden @ head.T)[:, : case.vocab_size].log_softmax(1)
        logprobs, order = logprobs.sort(dim=1, descending=True, stable=True)
        kept = (case.token_weight != 0)[:, None]
        out |= {f"{side}_top_ids": order[:, :k] * kept, f"{side}_top_logprobs": logprobs[:, :k] * kept}
    return out


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("name", scenarios())
def test_equals_the_dense_definition(results: Results, name: str, sequence_parallel: bool) -> None:
    scenario = scenarios()[name]
    want = dense(scenario.case, **{k: v for k, v in scenario.options.items() if k not in MECHANICS})
    ranks = [r[name, sequence_parallel] for r in results]
    whole = dict(ranks[0])
    if sequence_parallel:
        whole["input_grad"] = torch.cat([r["input_grad"] for r in ranks])
    expected = {
        "loss": want.loss,
        "token_loss": want.token_loss,
        "input_grad": UPSTREAM * want.input_grad,
        **want.stats,
        **top_k(scenario.case, 3),
    }
    if not scenario.frozen_head:
        whole["weight_grad"] = torch.cat([r["weight_grad"] for r in ranks])
        expected["weight_grad"] = UPSTREAM * want.weight_grad
        padding = whole["weight_grad"][scenario.case.vocab_size :]
        assert torch.equal(padding, torch.zeros_like(padding))
    errors = {key: relative_error(whole[key], value) for key, value in expected.items()}
    assert max(errors.values()) <= scenario.tolerance, errors


def test_bit_identical_on_all_ranks(results: Results) -> None:
    for (name, sequence_parallel), first in results[0].items():
        for other in results[1:]:
            for key, value in first.items():
                sharded = key == "weight_grad" or (key == "input_grad" and sequence_parallel)
                assert sharded or torch.equal(value, other[name, sequence_parallel][key]), (name, key)


def test_sequence_parallel_changes_only_the_layout(results: Results) -> None:
    for name, scenario in scenarios().items():
        plain, sharded = ([r[name, sp] for r in results] for sp in (False, True))
        tolerance = min(scenario.tolerance, 1e-5)
        for key in ("loss", "token_loss", *STATS):
            assert relative_error(sharded[0][key], plain[0][key]) <= tolerance, (name, key)
        whole = torch.cat([r["input_grad"] for r in sharded])
        assert relative_error(whole, plain[0]["input_grad"]) <= scenario.tolerance, name
        if not scenario.frozen_head:
            for a, b in zip(plain, sharded, strict=True):
                assert relative_error(b["weight_grad"], a["weight_grad"]) <= tolerance, name
