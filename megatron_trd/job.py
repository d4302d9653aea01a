"""One training job from its configuration: the composition root, the only place that knows every concrete class."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_trd.config.cli import save_resolved, to_yaml
from megatron_trd.config.schema import Config
from megatron_trd.data.broadcast import make_handout_group
from megatron_trd.log import get_logger
from megatron_trd.mcore import hf_weights
from megatron_trd.mcore.checkpoint_files import require_writable, resume_point
from megatron_trd.mcore.groups import destroy_groups, initialize_groups
from megatron_trd.mcore.models import read_models
from megatron_trd.mcore.student import Student
from megatron_trd.mcore.teacher import build_teacher
from megatron_trd.metrics import Reporter
from megatron_trd.planning import report
from megatron_trd.planning.devices import this_device
from megatron_trd.planning.plan import Resources, make_plan
from megatron_trd.reporting.table import closing_table, summarize_run
from megatron_trd.rollout.vocabulary import epistemic_token_ids, load_tokenizer, require_same_vocabulary
from megatron_trd.rollout.world import World
from megatron_trd.tasks.base import Task
from megatron_trd.trainer import Trainer
from megatron_trd.weight_sync.disk import write_hf_directory

logger = get_logger(__name__)


def describe(config: Config, world_size: int) -> str:
    """Describe a run without starting it: its memory and its time are those of `tools/plan_run.py`.

    Raises:
        ValueError: a model or a layout cannot be used.
    """
    read_models(config)
    parallel = config.parallel
    size = parallel.model_parallel_size
    world_size = max(world_size, size)  # without torchrun: the smallest grid
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    plan = make_plan(config, Resources.of(config, world_size, this_device(gpu)))
    steps = total_steps(config)
    return "\n".join(
        (
            to_yaml(config),
            f"ranks: {world_size} = tensor {parallel.tensor_model_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} x data "
            f"{world_size // size}",
            f"steps: {steps} ({config.data.num_iterations} iterations)",
            f"trainable parameters: {plan.trainable_parameters:,}",
            "",
            report.text(plan),
            "",
        )
    )


def run(config: Config, task: Task, rank: int, local_rank: int) -> None:
    """Build every part on this rank and run to the end.

    Raises:
        ValueError: a flag, a model, a server or a file cannot be used.
    """
    run_dir = Path(config.checkpoint.run_dir)
    require_writable(run_dir)
    start = resume_point(run_dir / "checkpoints", config.checkpoint.resume)
    student_hf, teacher_hf = read_models(config)
    tokenizer = load_tokenizer(student_hf.path, "hf-checkpoint")
    if teacher_hf.path != student_hf.path:
        require_same_vocabulary(tokenizer, load_tokenizer(teacher_hf.path, "teacher-hf-checkpoint"), teacher_hf.path)
    groups = initialize_groups(config.parallel, config.data.seed, local_rank)
    handout_group = make_handout_group(config.parallel.rollout_timeout_minutes)
    world = World(config, task, tokenizer) if rank == 0 else None
    reporter = Reporter(run_dir, config.data.num_iterations) if rank == 0 else None
    try:
        student = Student(
            config,
            groups,
            student_hf,
            total_steps=total_steps(config),
            vocab_size=min(student_hf.geometry.vocab_size, teacher_hf.geometry.vocab_size),
            epistemic_ids=epistemic_token_ids(tokenizer, task.epistemic_words),
        )
        teacher = build_teacher(config, groups, student.gpt, teacher_hf)
        if rank == 0:
            save_resolved(config, run_dir / "config.yaml")
        trainer = Trainer(config, groups, handout_group, student, teacher, world, reporter)
        if start is not None:
            trainer.resume()
        after = trainer.run()
        export(config, student, rank)
        if rank == 0:
            summary = summarize_run(config, trainer.progress, trainer.clock.totals, after)
            (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            print(closing_table([summary]), flush=True)
    finally:
        for opened in (world, reporter):
            if opened is not None:
                opened.close()
    destroy_groups()


def total_steps(config: Config) -> int:
    """Optimizer steps of the whole run."""
    return config.data.num_iterations * (config.data.rollout_batch_size // config.data.global_batch_size)


def export(config: Config, student: Student, rank: int) -> None:
    """Write the trained student, and its adapter, where the flags say. Collective over all ranks."""
    wanted = config.checkpoint
    template = Path(config.model.hf_checkpoint)
    if wanted.save_hf is not None:
        weights = student.export()
        if rank == 0:
            write_hf_directory(weights, wanted.save_hf, template)
            logger.info("exported the student to %s", wanted.save_hf)
        for _ in weights:
            pass
    if wanted.save_adapter is not None:
        weights = student.export_adapter()
        if rank == 0:
            hf_weights.write_adapter(dict(weights), wanted.save_adapter, config.lora, template)
            logger.info("exported the adapter to %s", wanted.save_adapter)
        for _ in weights:
            pass
