"""Short training runs on tiny models for the tests of checkpoints; import it from a spawned rank's function."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_trd.certificate.training_step import loss_of_all_ranks
from megatron_trd.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from tests.distributed.parity import pack_step
from tiny_models import VOCAB, make_samples

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "num_virtual_stages_per_pipeline_rank": 2}
CP2 = {"context_parallel_size": 2}
DISTOPT = {"use_distributed_optimizer": True}
OVERLAP = {**DISTOPT, "overlap_grad_reduce": True, "overlap_param_gather": True}


@dataclass(slots=True)
class Run:
    """A student on a grid, and how to train and save it."""

    config: Config
    groups: Any
    student: Any
    teacher: Any

    def checkpoints(self, directory: str | Path, **flags: Any) -> Any:
        from megatron_trd.mcore.checkpoint import Checkpoints

        return Checkpoints(CheckpointConfig(run_dir=str(directory), **flags), self.groups)

    def step(self, number: int) -> tuple[float, float, float]:
        """Train step `number`, the same on every grid; return its loss, gradient norm and learning rate."""
        batch = pack_step(make_samples(6, seed=number), self.groups, self.config.parallel, max_tokens=100)
        result = self.student.train_step(batch[self.groups.dp_rank], self.teacher)
        return loss_of_all_ranks(result.sums, self.groups).item(), result.grad_norm, result.lr


def open_run(
    model: str | Path, grid: dict[str, Any], *, lora: dict[str, Any] | None = None, bf16: bool = False, steps: int = 6
) -> Run:
    from megatron.core import parallel_state

    from megatron_trd.mcore.groups import initialize_groups
    from megatron_trd.mcore.hf_config import padded_vocab_size, read_hf_model
    from megatron_trd.mcore.student import Student
    from megatron_trd.mcore.teacher import build_teacher

    config = Config(
        model=ModelConfig(hf_checkpoint=str(model), bf16=bf16),
        parallel=ParallelConfig(**grid),
        lora=LoraConfig(**(lora or {})),
        optimizer=OptimizerConfig(lr=5e-3),
        data=DataConfig(trajectories="unused"),
    )
    gc.freeze()  # Megatron collects garbage in every save and load; all that is imported need not be looked at
    parallel_state.destroy_model_parallel()  # of the run before in these processes
    groups = initialize_groups(config.parallel, 7, 0)
    hf = read_hf_model(str(model), "hf-checkpoint", groups.tp_size)
    hf = hf.padded_to(padded_vocab_size(VOCAB, 1, groups.tp_size))
    student = Student(config, groups, hf, total_steps=steps, vocab_size=VOCAB, epistemic_ids=[1])
    return Run(config, groups, student, build_teacher(config, groups, student.gpt, hf))


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole and without vocabulary padding; read by torch alone."""
    described = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=directory, no_dist=True)
    return {key: t[:VOCAB] if "embedding" in key or "output_layer" in key else t for key, t in tensors.items()}
