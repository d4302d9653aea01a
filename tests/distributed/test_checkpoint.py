"""A resumed run equals an uninterrupted one; damage, a full disk and another base are named."""

from __future__ import annotations

import logging
import math
import resource
import signal
import threading
from pathlib import Path

import psutil
import pytest
import torch

from launch import spawn
from megatron_trd.mcore.checkpoint_files import TRACKER
from tests.distributed.checkpoint_runs import CP2, DISTOPT, OVERLAP, PP2, TP2, VPP2, open_run
from tiny_models import make_model

ADAPTER = {"lora_rank": 4, "lora_alpha": 8.0}
DROPOUT = {**ADAPTER, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tied=True, layers=4)


def save_train_and_resume(rank, world, model, root, lora, bf16, grids):
    """Save in the middle of a run while it goes on; resume it on the last grid; return steps 2 and 3 of both."""
    run = open_run(model, grids[0], lora=lora, bf16=bf16)
    checkpoints = run.checkpoints(root, async_save=True)
    for number in range(2):
        run.step(number)
    go_on = threading.Event()
    checkpoints._thread.submit(go_on.wait)  # not a byte is written before the run has gone on
    checkpoints.save(run.student, {"iteration": 2, "note": "kept"})
    straight = [run.step(number) for number in range(2, 4)]
    go_on.set()
    checkpoints.finish()
    assert not psutil.Process().children(), "a killed rank would leave these behind"
    again = open_run(model, grids[-1], lora=lora, bf16=bf16)
    assert again.checkpoints(root).resume(again.student) == {"iteration": 2, "note": "kept"}
    return straight, [again.step(number) for number in range(2, 4)]


@pytest.mark.parametrize(
    ("world", "lora", "bf16", "grids"),
    [
        (2, DROPOUT, False, [{"tensor_model_parallel_size": 2}]),
        (2, DROPOUT, False, [VPP2]),
        (4, {}, True, [{**PP2, **CP2, **OVERLAP}]),
        (4, ADAPTER, False, [{**VPP2, **OVERLAP}, {**TP2, **CP2, **DISTOPT}]),
    ],
)
def test_resumed_run_equals_uninterrupted(model, tmp_path, world, lora, bf16, grids) -> None:
    straight, resumed = spawn(save_train_and_resume, world, model, tmp_path, lora, bf16, grids)[0]
    assert straight[0][0] != straight[1][0]
    if len(grids) == 1:
        assert resumed == straight
    else:  # on another grid the same numbers up to rounding
        torch.testing.assert_close(torch.tensor(resumed), torch.tensor(straight), rtol=1e-6, atol=0)


def resume_longer(rank, world, model, root):
    """Save before the first step, resume a longer run from there and take its first step."""
    run = open_run(model, {})
    run.checkpoints(root).save(run.student, {"iteration": 0})
    first = run.step(0)
    again = open_run(model, {}, steps=20)
    again.checkpoints(root).resume(again.student)
    return first, again.step(0), again.step(1), again.step(2)


def test_a_resumed_run_may_be_longer(model, tmp_path) -> None:
    ((first, again, _, third),) = spawn(resume_longer, 1, model, tmp_path)
    assert again[:2] == first[:2]
    warmup, total = 2, 20  # the third step of the new schedule
    cosine = 0.5 * (1 + math.cos(math.pi * (3 - warmup) / (total - warmup)))
    assert third[2] == pytest.approx(5e-4 + (5e-3 - 5e-4) * cosine, rel=1e-6)


class Messages(logging.Handler):
    """Collects what the project says."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        logging.getLogger("megatron_trd").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def damage_and_resume(rank, world, model, root):
    """Damage the newest two of three checkpoints in several ways; return what each way of resuming says."""
    import torch.distributed as dist

    run = open_run(model, DISTOPT)
    for iteration in (1, 2, 3):
        run.checkpoints(root).save(run.student, {"iteration": iteration})
    paths = [root / f"checkpoints/iter_000000{i}" for i in (1, 2, 3)]
    flipped, truncated = paths[2] / "__1_0.distcp", paths[1] / "common.pt"
    if rank == 0:
        data = bytearray(flipped.read_bytes())
        data[len(data) // 2] ^= 1
        flipped.write_bytes(data)
        truncated.write_bytes(truncated.read_bytes()[:-1])
        (paths[1] / "__0_1.distcp").unlink()
    dist.barrier()

    def said(**flags) -> str:
        heard = Messages()
        try:
            return f"iteration {run.checkpoints(root, **flags).resume(run.student)['iteration']}: {heard.texts}"
        except ValueError as error:
            return f"refused: {error}"

    answers = [said(verify_checkpoint=False), said(resume="require"), said(), said()]
    dist.barrier()
    if rank == 0:
        (paths[0] / "manifest.json").write_text("{")
    dist.barrier()
    return [*answers, said()]


def test_damaged_checkpoints_are_named_and_passed_over(model, tmp_path) -> None:
    answers = spawn(damage_and_resume, 2, model, tmp_path)
    unverified, required, auto, again, nothing = answers[0]
    root = tmp_path / "checkpoints"
    flipped = f"{root}/iter_0000003/__1_0.distcp: expected CRC-32 "
    assert unverified == "iteration 3: []"
    assert required.startswith("refused: --resume require: ") and flipped in required and "--resume auto" in required
    assert auto.startswith("iteration 1: ['GOING BACK from iteration 3 to 1") and flipped in auto
    size = (root / "iter_0000002.damaged/common.pt").stat().st_size
    assert f"{root}/iter_0000002/common.pt: expected {size + 1} bytes, found {size}" in auto
    assert f"{root}/iter_0000002/__0_1.distcp: expected " in auto and "No such file" in auto
    assert again == "iteration 1: []" and (root / TRACKER).read_text() == "1"
    assert nothing.startswith("refused: --resume auto: ")
    assert f"{root}/iter_0000001/manifest.json: is damaged" in nothing
    assert [answer.split(": ")[0] for answer in answers[1]] == [answer.split(": ")[0] for answer in answers[0]]


def fill_the_disk(rank, world, model, root):
    """Let rank 1, then rank 0, run out of space in the middle of a file; return the errors and the files left."""
    run = open_run(model, DISTOPT)
    checkpoints = run.checkpoints(root, async_save=True)
    checkpoints.save(run.student, {"iteration": 1})
    checkpoints.finish()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the system call fails instead
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    errors = []
    for iteration, full in ((2, 1), (3, 0)):
        if rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
        checkpoints.save(run.student, {"iteration": iteration})
        run.step(iteration)
        try:
            checkpoints.save(run.student, {"iteration": 9})  # tells what became of the one before
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    left = sorted(path.name for path in (root / "checkpoints").iterdir())
    checkpoints.save(run.student, {"iteration": 4})
    checkpoints.finish()
    return errors, left, run.checkpoints(root).resume(run.student)["iteration"]


def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint(model, tmp_path) -> None:
    for errors, left, resumed in spawn(fill_the_disk, 2, model, tmp_path):
        for error, iteration, full in zip(errors, (2, 3), (1, 0), strict=True):
            assert f"{tmp_path}/checkpoints: the checkpoint of iteration {iteration} could not be written" in error
            assert f"rank {full}: " in error and "--resume auto" in error
        assert left == ["iter_0000001", TRACKER]
        assert resumed == 4


def resume_on_another_base(rank, world, models, root):
    run = open_run(models[0], {}, lora=ADAPTER)
    run.checkpoints(root).save(run.student, {"iteration": 1})
    same = open_run(models[1], {}, lora=ADAPTER)
    same.checkpoints(root).resume(same.student)
    other = open_run(models[2], {}, lora=ADAPTER)
    with pytest.raises(ValueError) as refused:
        other.checkpoints(root).resume(other.student)
    return str(refused.value)


def test_adapters_want_the_base_they_were_trained_on(tmp_path) -> None:
    models = [make_model(tmp_path / name, seed=seed) for name, seed in (("base", 0), ("copy", 0), ("other", 1))]
    (error,) = spawn(resume_on_another_base, 1, models, tmp_path / "run")
    assert error.startswith(f"--hf-checkpoint {models[2]}: the adapters in {tmp_path}/run/checkpoints/iter_0000001 ")
    assert f"another base, {models[0]} (model.safetensors differ)" in error
