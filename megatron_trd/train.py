"""Train: parse, build, run. The composition root, and the only place that knows every concrete class.

    torchrun --nproc-per-node 2 -m megatron_trd.train --hf-checkpoint DIR --student-urls URL ... [--dry-run]
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_trd.config.cli import exit_on_value_error, parse_config, save_resolved, to_yaml
from megatron_trd.config.schema import Config
from megatron_trd.log import configure, get_logger
from megatron_trd.tasks import TASKS
from megatron_trd.tasks.base import Task

logger = get_logger(__name__)


def main(argv: Sequence[str] | None = None, tasks: Mapping[str, Callable[[], Task]] = TASKS) -> None:
    """Run one training job on this rank. Other projects pass their own `tasks`."""
    with exit_on_value_error():
        config, extras = parse_config(
            argv, description="Trajectory-refined distillation.", extra={"dry_run": (bool, False, DRY_RUN)}
        )
        if config.data.task not in tasks:
            raise ValueError(f"--task {config.data.task}: unknown; use one of {', '.join(sorted(tasks))}")
        if extras.dry_run:
            print(to_yaml(config) + "\n" + plan(config))
            return
        train(config, tasks[config.data.task]())


DRY_RUN = "Print the resolved configuration, the grid of ranks and the memory plan, and stop. Needs no GPU."


def train(config: Config, task: Task) -> None:
    """Build every part on this rank and run to the end."""
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    configure(int(os.environ.get("RANK", "0")))
    from megatron_trd.data.broadcast import make_handout_group
    from megatron_trd.mcore import checkpoint
    from megatron_trd.mcore.groups import destroy_groups, initialize_groups
    from megatron_trd.mcore.hf_config import common_padding, read_hf_model
    from megatron_trd.mcore.student import Student
    from megatron_trd.mcore.teacher import build_teacher
    from megatron_trd.metrics import Reporter
    from megatron_trd.rollout.vocabulary import epistemic_token_ids, load_tokenizer, require_same_vocabulary
    from megatron_trd.trainer import Trainer

    run_dir = Path(config.checkpoint.run_dir)
    start = resume_point(config, checkpoint.latest_iteration(run_dir / "checkpoints"))
    tokenizer = load_tokenizer(config.model.hf_checkpoint, "hf-checkpoint")
    teacher_path = config.model.teacher_hf_checkpoint or config.model.hf_checkpoint
    if config.model.teacher_hf_checkpoint:
        teacher_tokenizer = load_tokenizer(teacher_path, "teacher-hf-checkpoint")
        require_same_vocabulary(tokenizer, teacher_tokenizer, teacher_path)
    tp_size = config.parallel.tensor_model_parallel_size
    student_hf, teacher_hf = common_padding(
        read_hf_model(config.model.hf_checkpoint, "hf-checkpoint", tp_size),
        read_hf_model(teacher_path, "teacher-hf-checkpoint", tp_size),
        config.model.make_vocab_size_divisible_by,
        tp_size,
    )
    groups = initialize_groups(config.parallel, config.data.seed, int(os.environ.get("LOCAL_RANK", "0")))
    steps = config.data.num_iterations * (config.data.rollout_batch_size // config.data.global_batch_size)
    student = Student(
        config,
        groups,
        student_hf,
        total_steps=steps,
        vocab_size=min(student_hf.geometry.vocab_size, teacher_hf.geometry.vocab_size),
        epistemic_ids=epistemic_token_ids(tokenizer, task.epistemic_words),
    )
    teacher = build_teacher(config, groups, student.gpt, teacher_hf)
    world, reporter = None, None
    if groups.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_resolved(config, run_dir / "config.yaml")
        reporter = Reporter(run_dir)
        world = build_world(config, task, tokenizer)
    handout_group = make_handout_group(config.parallel.rollout_timeout_minutes)
    trainer = Trainer(config, groups, handout_group, student, teacher, world, reporter)
    try:
        if start is not None:
            trainer.resume(start)
        after = trainer.run()
        export(config, student, groups.rank)
        if reporter is not None:
            summary = summarize_run(config, trainer, after)
            (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            print(closing_table(summary))
    finally:
        if world is not None:
            world.close()
        if reporter is not None:
            reporter.close()
    destroy_groups()
