"""The certificate of a layout: narrow copy, step, reference, verdict. Collective over all ranks of the layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_trd.certificate.comparison import Certificate, compare
from megatron_trd.certificate.dense_reference import dense_reference
from megatron_trd.certificate.narrow_copy import NarrowRun, narrow_run
from megatron_trd.certificate.training_step import StepTaken, take_step
from megatron_trd.config.schema import Config
from megatron_trd.data.broadcast import make_handout_group, run_on_rank_zero
from megatron_trd.mcore.groups import initialize_groups
from megatron_trd.mcore.models import read_models

T = TypeVar("T")


def certify(config: Config, local_rank: int, num_layers: int | None = None) -> tuple[NarrowRun, Certificate]:
    """Certify the layout of a run on the ranks that are here; all ranks return the same.

    Args:
        config: the user's; its models need only `config.json`.
        num_layers: of the narrow student; None = as few as the layout allows.

    Raises:
        ValueError: a flag or a model cannot be used.
    """
    groups = initialize_groups(config.parallel, config.data.seed, local_rank)
    handout_group = make_handout_group(config.parallel.rollout_timeout_minutes)  # the reference may take its time
    with TemporaryDirectory(prefix="certify-") as scratch:

        def narrow() -> NarrowRun:
            read_models(config)  # what the user's own run would refuse
            return narrow_run(config, Path(scratch), data_parallel=groups.dp_size, num_layers=num_layers)

        run = _on_rank_zero(narrow, handout_group)
        student, teacher = read_models(run.config)
        step = take_step(run, groups, student, teacher)
        return run, _on_rank_zero(lambda: _judge(run, step), handout_group)


def _on_rank_zero(fn: Callable[[], T], group: dist.ProcessGroup) -> T:
    """As `run_on_rank_zero`, but what the user did wrong is raised as it is on every rank."""

    def result_or_error() -> T | ValueError:
        try:
            return fn()
        except ValueError as error:
            return error

    result = run_on_rank_zero(result_or_error, group)
    if isinstance(result, ValueError):
        raise result
    return result


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
