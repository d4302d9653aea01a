"""Distributed checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is written into a directory that is none by its name. When the files of all ranks are complete and on the
disk, rank 0 adds the manifest, gives the directory its name, and then tells the tracker; whenever a run is killed, the
checkpoint in force is whole.
"""

from __future__ import annotations

import random
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_trd import __version__
from megatron_trd.config.schema import CheckpointConfig
from megatron_trd.data.broadcast import run_on_rank_zero
from megatron_trd.log import get_logger
from megatron_trd.mcore import checkpoint_files as files
from megatron_trd.mcore import checkpoint_writer as writer
from megatron_trd.mcore import optimizer_state
from megatron_trd.mcore.fingerprint import fingerprint
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.initial_weights import weights_directory
from megatron_trd.mcore.student import Student

logger = get_logger(__name__)

_SLOWEST_DISK = timedelta(hours=2)
"""How long ranks that have written wait for the others."""


class Checkpoints:
    """The checkpoints of a run. Its methods are collective over all ranks."""

    def __init__(self, config: CheckpointConfig, groups: Groups) -> None:
        """Look at `<run-dir>/checkpoints`; nothing is read or written yet."""
        self.root = Path(config.run_dir) / "checkpoints"
        self._config, self._groups = config, groups
        self._group = dist.new_group(backend="gloo", timeout=_SLOWEST_DISK)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # the end of the process waits for it
        self._saving: Future[None] | None = None
        self._swept = False

    def save(self, student: Student, progress: dict[str, Any]) -> None:
        """Save `progress["iteration"]`; with `--async-save` return when its state is copied.

        Args:
            progress: what only the trainer knows (iteration, step, data cursor, weight version): plain values.

        Raises:
            ValueError: this save, or the one before, could not be written. The last good checkpoint stays in force.
        """
        self.finish()
        iteration, asynchronous = progress["iteration"], self._config.async_save
        student.wait_for_parameters()
        state = _sharded_state(student, self._groups, is_loading=False)
        state |= {"progress": progress, **_facts(student, self._groups)}
        try:
            directory = run_on_rank_zero(lambda: self._make_directory(iteration), self._group)
            share = writer.plan(state, directory, self._groups.dp_cp, snapshot=asynchronous)
        except (OSError, RuntimeError) as error:
            raise self._failure(iteration, str(error)) from error
        manifest = {
            "project": f"megatron_trd {__version__}",
            "iteration": iteration,
            "step": progress.get("step"),
            "grid": state["grid"],
        }
        self._saving = self._thread.submit(self._write, share, manifest)
        if not asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is being written, if any.

        Raises:
            ValueError: it could not be written. The last good checkpoint stays in force.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def resume(self, student: Student) -> dict[str, Any]:
        """Restore the newest good checkpoint; return the `progress` it was saved with.

        Raises:
            ValueError: no checkpoint is good, `--resume require` and the newest is not, or it was written with
                settings that cannot change.
        """
        newest, iterations = run_on_rank_zero(self._candidates, self._group)
        damage: list[str] = []
        for iteration in iterations:
            found = self._problems(iteration)
            if not found:
                break
            damage += found
        else:
            raise self._refusal(damage)
        if damage:
            run_on_rank_zero(lambda: self._go_back(newest, iteration, damage), self._group)
        return load(files.checkpoint_directory(self.root, iteration), student, self._groups)

    def _make_directory(self, iteration: int) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        if not self._swept:
            files.sweep(self.root)
            self._swept = True
        directory = files.unfinished_directory(self.root, iteration)
        directory.mkdir()
        return directory

    def _write(self, share: writer.Share, manifest: dict[str, Any]) -> None:
        """Write in the background; collectives here use a group that nobody else uses meanwhile."""
        mine = writer.write(share, self._groups.rank)
        everyone: list[Any] | None = [None] * self._groups.world_size if self._groups.rank == 0 else None
        dist.gather_object(mine, everyone, group=self._group)
        run_on_rank_zero(lambda: self._complete(share, everyone or [], manifest), self._group)

    def _complete(self, share: writer.Share, written: list[writer.Written], manifest: dict[str, Any]) -> None:
        iteration = manifest["iteration"]
        try:
            if errors := [one.error for one in written if one.error]:
                raise OSError("; ".join(errors))
            described = writer.write_index(share, written)
            for one in written:
                described |= one.files
            files.write_manifest(share.directory, manifest, described)
            files.put_in_force(self.root, share.directory, iteration)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(share.directory, ignore_errors=True)
            failure = self._failure(iteration, str(error))
            logger.error("%s", failure)  # now; the trainer asks for it later
            raise failure from error
        logger.info("saved checkpoint %s", files.checkpoint_directory(self.root, iteration))
        if self._config.keep_checkpoints is not None:
            files.retire(self.root, iteration, self._config.keep_checkpoints, self._config.keep_every)

    def _failure(self, iteration: int, why: str) -> ValueError:
        return ValueError(
            f"{self.root}: the checkpoint of iteration {iteration} could not be written ({why}); the one before stays "
            "in force. Free space or correct the directory, and start again with --resume auto"
        )

    def _candidates(self) -> tuple[int, list[int]]:
        """The checkpoint in force, and those that may be resumed, newest first."""
        newest = files.latest_iteration(self.root)
        assert newest is not None  # whoever resumes has asked `resume_point`
        if self._config.resume == "require":
            return newest, [newest]
        return newest, [newest, *(i for i in files.iterations_up_to(self.root, newest) if i != newest)]

    def _problems(self, iteration: int) -> list[str]:
        """What is wrong with a checkpoint; every rank looks at its share of the files."""
        directory, world = files.checkpoint_directory(self.root, iteration), self._groups.world_size
        share, found = (self._groups.rank, world), [[""]] * world
        mine = files.problems(directory, share=share, checksums=self._config.verify_checkpoint)
        dist.all_gather_object(found, mine, group=self._group)
        return list(dict.fromkeys(line for lines in found for line in lines))

    def _refusal(self, damage: list[str]) -> ValueError:
        remedy = "no older checkpoint is good: restore these files, or start anew with another --run-dir"
        if self._config.resume == "require":
            remedy = "restore these files, or go on from an older checkpoint with --resume auto"
        return ValueError(
            "\n  ".join((f"--resume {self._config.resume}: damaged checkpoint in {self.root}; {remedy}", *damage))
        )

    def _go_back(self, newest: int, good: int, damage: list[str]) -> None:
        files.write_tracker(self.root, good)
        for iteration in files.iterations_up_to(self.root, newest):
            if iteration > good:
                files.set_aside(self.root, iteration)
        lines = "".join(f"\n  {line}" for line in damage)
        logger.warning(
            "GOING BACK from iteration %d to %d: newer checkpoints are damaged and now called *.damaged%s",
            newest,
            good,
            lines,
        )


def load(directory: Path, student: Student, groups: Groups) -> dict[str, Any]:
    """Restore model, optimizer and schedule, on the same grid the random state too; return the saved `progress`.

    Collective over all ranks.

    Raises:
        ValueError: the checkpoint was written with settings that cannot change.
    """
    saved = dist_checkpointing.load_common_state_dict(str(directory))
    facts = _facts(student, groups)
    for flag, value in facts["settings"].items():
        if saved["settings"][flag] != value:
            raise ValueError(
                f"--{flag} {value}: the checkpoint {directory} was written with {saved['settings'][flag]}; go on with "
                "that, or start anew with another --run-dir"
            )
    _require_same_base(directory, saved["base"], facts["base"])
    wanted = _sharded_state(student, groups, is_loading=True)
    # Under a name of its own, or what the checkpoint says around the tensors would come along.
    prefixes = facts["main_value_prefix"], saved["main_value_prefix"]
    wanted["optimizer tensors"] = optimizer_state.read_from(wanted.pop("optimizer"), *prefixes)
    if saved["grid"] != facts["grid"]:  # random numbers belong to a rank's place in the grid
        del wanted["random"]
    state = dist_checkpointing.load(wanted, str(directory))
    for chunk, chunk_state in zip(student.gpt.chunks, state["model"], strict=True):
        missing = chunk.load_state_dict(chunk_state, strict=False)
        assert not missing.unexpected_keys, missing
    optimizer_state.restore(student.optimizer, state["optimizer tensors"], saved["optimizer_steps"])
    student.scheduler.num_steps = 0  # load_state_dict counts on from here
    student.scheduler.load_state_dict(state["schedule"])
    if "random" in wanted:
        _set_random_state(state["random"])
    return state["progress"]


def _facts(student: Student, groups: Groups) -> dict[str, Any]:
    """What a checkpoint says about the run that writes it. `settings` must be the same after a resume, by flag."""
    config = student.config
    parallel = config.parallel
    distributed, bf16, rank = parallel.use_distributed_optimizer, config.model.bf16, config.lora.lora_rank
    flag = "hf-checkpoint" if config.model.megatron_checkpoint is None else "megatron-checkpoint"
    base = weights_directory(student.gpt, config.model.megatron_checkpoint, flag)
    return {
        "settings": {"lora-rank": rank, "lora-alpha": config.lora.lora_alpha if rank else None, "bf16": bf16},
        "grid": {
            "world": groups.world_size,
            "tensor": parallel.tensor_model_parallel_size,
            "pipeline": parallel.pipeline_model_parallel_size,
            "context": parallel.context_parallel_size,
            "expert": groups.ep_size,
            "expert tensor": groups.etp_size,
        },
        "lora": asdict(config.lora) if rank else None,
        "base": {"flag": flag, "path": str(base), "files": _files_of_base(base)} if rank else None,
        "main_value_prefix": optimizer_state.main_value_prefix(distributed=distributed, bf16=bf16),
        "optimizer_steps": optimizer_state.steps_taken(student.optimizer),
    }


@lru_cache(maxsize=1)
def _files_of_base(base: Path) -> dict[str, str]:
    """Look at the base once: it stays as it is while a run lives, and every save names it."""
    return fingerprint(base)


def _require_same_base(directory: Path, saved: dict[str, Any] | None, ours: dict[str, Any] | None) -> None:
    if saved is None or ours is None:
        return
    names = saved["files"].keys() | ours["files"].keys()
    if other := sorted(name for name in names if saved["files"].get(name) != ours["files"].get(name)):
        raise ValueError(
            f"--{ours['flag']} {ours['path']}: the adapters in {directory} were trained on another base, "
            f"{saved['path']} ({', '.join(other)} differ); give that base, or start anew with another --run-dir"
        )


def _sharded_state(student: Student, groups: Groups, *, is_loading: bool) -> dict[str, Any]:
    # Megatron's default sharding needs FusedAdam; this one loads at any data-parallel size.
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": groups.dp_cp,
        "chained_optim_avoid_prefix": True,  # the keys do not tell how many optimizers there were
    }
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
