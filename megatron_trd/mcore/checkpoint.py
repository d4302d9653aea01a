"""Distributed checkpoints: everything a run needs to go on as if it had never stopped.

Layout is Megatron's: `iter_0000010/` directories and `latest_checkpointed_iteration.txt`, which is written last,
so an interrupted save leaves the previous checkpoint in force.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # noqa: F401  (Megatron's writer processes hang for ever without it)
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.student import Student

TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint_directory(root: Path, iteration: int) -> Path:
    """Megatron's name for the checkpoint of an iteration."""
    return root / f"iter_{iteration:07d}"


def latest_iteration(root: Path) -> int | None:
    """Return the iteration of the newest complete checkpoint, or None.

    Raises:
        ValueError: the tracker names a checkpoint that is not there, or is not a number.
    """
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit() or not checkpoint_directory(root, int(text)).is_dir():
        raise ValueError(
            f"{tracker}: names checkpoint {text!r}, which is not there; write the number of an existing iter_* "
            "directory into it, or remove it to start anew"
        )
    return int(text)


def resume_point(root: Path, policy: str) -> int | None:
    """Decide which checkpoint to go on from; None starts anew.

    Raises:
        ValueError: `require` finds none, or `never` would write over one.
    """
    latest = latest_iteration(root)
    if policy == "require" and latest is None:
        raise ValueError(f"--resume require: there is no checkpoint in {root}; use --resume auto to start anew")
    if policy == "never" and latest is not None:
        raise ValueError(
            f"--resume never: {root} already holds a checkpoint of iteration {latest}; give another --run-dir or "
            "remove that directory"
        )
    return latest


def save(root: Path, student: Student, groups: Groups, progress: dict[str, Any]) -> Path:
    """Write a checkpoint of `progress["iteration"]`. Collective over all ranks.

    Args:
        progress: what only the trainer knows (iteration, step, data cursor, weight version): plain values.
    """
    directory = checkpoint_directory(root, progress["iteration"])
    if groups.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)  # the remains of an interrupted save
        directory.mkdir(parents=True)
    dist.barrier()
    student.wait_for_parameters()
    state = _sharded_state(student, groups, is_loading=False)
    state |= {"progress": progress, "settings": _settings(student), "grid": _grid(student, groups)}
    dist_checkpointing.save(state, str(directory))
    # Megatron keeps a helper process per rank for the next save; a rank that is killed would leave it behind for ever.
    filesystem_async._results_queue = None
    dist.barrier()
    if groups.rank == 0:
        temporary = root / f".{TRACKER}.tmp"
        temporary.write_text(str(progress["iteration"]))
        os.replace(temporary, root / TRACKER)
    dist.barrier()
    return directory


def load(root: Path, iteration: int, student: Student, groups: Groups) -> dict[str, Any]:
    """Restore model, optimizer and schedule, on the same grid the random state too; return the saved `progress`.

    Collective over all ranks.

    Raises:
        ValueError: the checkpoint was written with settings that its optimizer state depends on.
    """
    directory = checkpoint_directory(root, iteration)
    saved = dist_checkpointing.load_common_state_dict(str(directory))
    for flag, value in _settings(student).items():
        if saved["settings"][flag] != value:
            raise ValueError(
                f"--{flag} {value}: the checkpoint {directory} was written with {saved['settings'][flag]}; go on with "
                "that, or start anew with another --run-dir"
            )
    wanted = _sharded_state(student, groups, is_loading=True)
    if saved.get("grid") != _grid(student, groups):  # random numbers belong to a rank's place in the grid
        del wanted["random"]
    state = dist_checkpointing.load(wanted, str(directory))
    for chunk, chunk_state in zip(student.gpt.chunks, state["model"], strict=True):
        missing = chunk.load_state_dict(chunk_state, strict=False)
        assert not missing.unexpected_keys, missing
    student.optimizer.load_state_dict(state["optimizer"])
    student.scheduler.num_steps = 0  # load_state_dict counts on from here
    student.scheduler.load_state_dict(state["schedule"])
    if "random" in wanted:
        _set_random_state(state["random"])
    return state["progress"]


def _settings(student: Student) -> dict[str, Any]:
    """What must be the same after a resume, by flag. The grid of ranks may change."""
    config = student.config
    return {
        "use-distributed-optimizer": config.parallel.use_distributed_optimizer,
        "lora-rank": config.lora.lora_rank,
        "bf16": config.model.bf16,
    }


def _grid(student: Student, groups: Groups) -> dict[str, int]:
    parallel = student.config.parallel
    return {
        "world": groups.world_size,
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
    }


def _sharded_state(student: Student, groups: Groups, *, is_loading: bool) -> dict[str, Any]:
    # Megatron's default sharding needs FusedAdam; this one loads at any data-parallel size.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.dp_cp}
    model = [chunk.sharded_state_dict(metadata=metadata) for chunk in student.gpt.chunks]
    if student.config.lora.lora_rank > 0:  # the base never changes: it is read from --hf-checkpoint
        model = [{key: value for key, value in chunk.items() if "lora_" in key} for chunk in model]
    return {
        "model": model,
        "optimizer": student.optimizer.sharded_state_dict({"model": model}, is_loading=is_loading, metadata=metadata),
        "schedule": student.scheduler.state_dict(),
        "random": ShardedObject("random", _random_state(), (groups.world_size,), (groups.rank,)),
    }


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
