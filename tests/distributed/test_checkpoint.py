"""A resumed run equals an uninterrupted one, also on another grid."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import pytest
import torch

from launch import spawn
from megatron_trd.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from tests.distributed.parity import loss_of_all_ranks
from tiny_models import VOCAB, make_model, make_samples


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tied=True, layers=4)


def run_steps(rank, world, model, directory, lora, bf16, grid, start, stop, losses, total_steps=6):
    """Steps start..stop on a grid, resuming at `start` and saving at `stop`; rank 0 appends its losses to a file."""
    from megatron_trd.data.packing import Multiples, pack
    from megatron_trd.mcore import checkpoint
    from megatron_trd.mcore.groups import initialize_groups
    from megatron_trd.mcore.hf_config import padded_vocab_size, read_hf_model
    from megatron_trd.mcore.student import Student
    from megatron_trd.mcore.teacher import build_teacher

    torch.set_num_threads(1)
    config = Config(
        model=ModelConfig(hf_checkpoint=model, bf16=bf16),
        parallel=ParallelConfig(**grid),
        lora=LoraConfig(**lora),
        optimizer=OptimizerConfig(lr=5e-3),
        data=DataConfig(trajectories="unused"),
    )
    groups = initialize_groups(config.parallel, 7, 0)
    hf = read_hf_model(model, "hf-checkpoint", groups.tp_size)
    hf = hf.padded_to(padded_vocab_size(VOCAB, 1, groups.tp_size))
    student = Student(config, groups, hf, total_steps=total_steps, vocab_size=VOCAB, epistemic_ids=[1])
    teacher = build_teacher(config, groups, student.gpt, hf)
    root = Path(directory)
    if start:
        progress = checkpoint.load(root, start, student, groups)
        assert progress == {"iteration": start, "note": "kept"}
    for step in range(start, stop):
        (batch,) = pack(
            make_samples(6, seed=step),
            num_steps=1,
            dp_size=groups.dp_size,
            max_tokens=100,
            multiples=Multiples.of(config.parallel),
            normalization="sequence",
        )
        result = student.train_step(batch[groups.dp_rank], teacher)
        loss = loss_of_all_ranks(result.sums, groups)
        if rank == 0:
            with open(losses, "a") as file:
                file.write(f"{loss.item()!r} {result.grad_norm!r} {result.lr!r}\n")
    checkpoint.save(root, student, groups, {"iteration": stop, "note": "kept"})
    helpers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    assert not helpers, f"a killed rank would leave these behind: {helpers}"


def numbers(path: Path) -> list[list[float]]:
    return [[float(x) for x in line.split()] for line in path.read_text().splitlines()]


FULL = {"lora_rank": 0}
ADAPTER = {"lora_rank": 4, "lora_alpha": 8.0}
DROPOUT = {**ADAPTER, "lora_dropout": 0.1}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
DP2 = {"use_distributed_optimizer": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "num_virtual_stages_per_pipeline_rank": 2}
CP2 = {"context_parallel_size": 2}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    ("lora", "bf16", "first", "second", "exact"),
    [
        (DROPOUT, False, TP2, TP2, True),
        (FULL, True, DP2, DP2, True),
        (FULL, False, OVERLAP, OVERLAP, True),
        (FULL, True, {**PP2, **CP2, **OVERLAP}, {**PP2, **CP2, **OVERLAP}, True),
        (DROPOUT, False, VPP2, VPP2, True),
        # On another grid: the same numbers up to rounding.
        (FULL, False, DP2, {**TP2, **DP2}, False),
        (ADAPTER, False, {**TP2, **DP2}, DP2, False),
        (FULL, False, {**CP2, **DP2}, {**VPP2, **DP2}, False),
        (ADAPTER, False, {**VPP2, **OVERLAP}, {**CP2, **DP2}, False),
        (FULL, False, {**PP2, **CP2, **DP2}, {**TP2, **DP2}, False),  # on half as many ranks
    ],
)
def test_resumed_run_equals_uninterrupted(model, tmp_path, lora, bf16, first, second, exact) -> None:
    before, after = (max(2, ParallelConfig(**grid).model_parallel_size) for grid in (first, second))
    common = (str(model), str(tmp_path / "straight"), lora, bf16)
    spawn(run_steps, before, *common, first, 0, 4, str(tmp_path / "straight.txt"), timeout_s=200)
    common = (str(model), str(tmp_path / "split"), lora, bf16)
    spawn(run_steps, before, *common, first, 0, 2, str(tmp_path / "split.txt"), timeout_s=200)
    spawn(run_steps, after, *common, second, 2, 4, str(tmp_path / "split.txt"), timeout_s=200)
    straight, split = numbers(tmp_path / "straight.txt"), numbers(tmp_path / "split.txt")
    assert len(straight) == len(split) == 4
    assert straight[0][0] != straight[3][0]
    if exact:
        assert straight == split
    else:
        torch.testing.assert_close(torch.tensor(split), torch.tensor(straight), rtol=1e-4, atol=1e-7)


def test_a_resumed_run_may_be_longer(model, tmp_path) -> None:
    common = (str(model), str(tmp_path / "run"), FULL, False, {})
    spawn(run_steps, 1, *common, 0, 2, str(tmp_path / "short.txt"), timeout_s=200)
    spawn(run_steps, 1, *common, 2, 3, str(tmp_path / "long.txt"), 20, timeout_s=200)
    ((_, _, lr),) = numbers(tmp_path / "long.txt")
    warmup, total = 2, 20  # the third step of the new schedule
    cosine = 0.5 * (1 + math.cos(math.pi * (3 - warmup) / (total - warmup)))
    assert lr == pytest.approx(5e-4 + (5e-3 - 5e-4) * cosine, rel=1e-6)


def test_another_optimizer_layout_is_refused(model, tmp_path) -> None:
    common = (str(model), str(tmp_path), FULL, False)
    spawn(run_steps, 2, *common, DP2, 0, 1, str(tmp_path / "losses.txt"), timeout_s=200)
    with pytest.raises(
        RuntimeError, match="--use-distributed-optimizer False: the checkpoint .* was written with True"
    ):
        spawn(run_steps, 2, *common, TP2, 1, 2, str(tmp_path / "losses.txt"), timeout_s=200)


def test_overlapped_communication_changes_no_number(model, tmp_path) -> None:
    for name, grid in (("plain", DP2), ("overlap", OVERLAP)):
        spawn(
            run_steps,
            2,
            str(model),
            str(tmp_path / name),
            FULL,
            False,
            grid,
            0,
            3,
            str(tmp_path / name) + ".txt",
            timeout_s=200,
        )
    plain, overlap = numbers(tmp_path / "plain.txt"), numbers(tmp_path / "overlap.txt")
    torch.testing.assert_close(torch.tensor(overlap), torch.tensor(plain), rtol=1e-6, atol=0)


def test_tracker_errors_name_the_remedy(tmp_path) -> None:
    from megatron_trd.mcore.checkpoint import TRACKER, latest_iteration, resume_point

    assert latest_iteration(tmp_path) is None and resume_point(tmp_path, "auto") is None
    with pytest.raises(ValueError, match="--resume require"):
        resume_point(tmp_path, "require")
    (tmp_path / TRACKER).write_text("7")
    with pytest.raises(ValueError, match="names checkpoint '7'"):
        latest_iteration(tmp_path)
    (tmp_path / "iter_0000007").mkdir()
    assert resume_point(tmp_path, "require") == 7
    with pytest.raises(ValueError, match="--resume never"):
        resume_point(tmp_path, "never")
