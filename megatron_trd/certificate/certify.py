"""The certificate of a layout: narrow copy, step, reference, verdict. Collective over all ranks of the layout."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from megatron_trd.certificate.comparison import Certificate, compare
from megatron_trd.certificate.dense_reference import dense_reference
from megatron_trd.certificate.narrow_copy import NarrowRun, narrow_run
from megatron_trd.certificate.training_step import StepTaken, take_step
from megatron_trd.config.schema import Config
from megatron_trd.mcore.groups import initialize_groups
from megatron_trd.mcore.models import read_models


def certify(config: Config, local_rank: int, num_layers: int | None = None) -> tuple[NarrowRun, Certificate]:
    """Certify the layout of a run on the ranks that are here; all ranks return the same.

    Args:
        config: the user's; its models need only `config.json`.
        num_layers: of the narrow student; None = as few as the layout allows.

    Raises:
        ValueError: a flag or a model cannot be used.
    """
    groups = initialize_groups(config.parallel, config.data.seed, local_rank)
    outcome: list[tuple[NarrowRun, Certificate] | ValueError | None] = [None]
    with TemporaryDirectory(prefix="certify-") as scratch:
        written: list[NarrowRun | ValueError | None] = [None]
        if groups.rank == 0:
            try:
                read_models(config)  # what the user's own run would refuse
                written[0] = narrow_run(config, Path(scratch), data_parallel=groups.dp_size, num_layers=num_layers)
            except ValueError as error:
                written[0] = error
        dist.broadcast_object_list(written, src=0)
        (run,) = written
        if isinstance(run, ValueError):
            raise run
        assert run is not None
        student, teacher = read_models(run.config)
        step = take_step(run, groups, student, teacher)
        if groups.rank == 0:
            try:
                outcome[0] = run, _judge(run, step)
            except ValueError as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0)
    (verdict,) = outcome
    if isinstance(verdict, ValueError):
        raise verdict
    assert verdict is not None
    return verdict


def _judge(run: NarrowRun, step: StepTaken) -> Certificate:
    config = run.config
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    student, lora = Path(config.model.hf_checkpoint), config.lora.lora_rank > 0
    teaches_itself = config.method.mode == "opsd" and config.method.opsd_teacher == "current"

    def step_in(dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
        return dense_reference(
            config.objective,
            run.samples,
            student,
            Path(config.model.teacher_hf_checkpoint or student),
            adapter=step.before if lora else None,
            lora=config.lora,
            teacher_is_student=teaches_itself,
            vocab_size=run.common_vocab,
            dtype=dtype,
        )

    return compare(step, step_in(torch.float64), step_in(dtype), config.optimizer, dtype)
