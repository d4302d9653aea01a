"""Train: parse the command line, then build and run the job.

torchrun --nproc-per-node 2 -m megatron_trd.train --hf-checkpoint DIR --student-urls URL ... [--dry-run]
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_trd.config.cli import exit_on_value_error, parse_config
from megatron_trd.log import configure
from megatron_trd.tasks import TASKS, TaskMakers, make_task

DRY_RUN = "Print the resolved configuration, the grid of ranks, memory and time, and stop. Needs no GPU."
SHOW_PROMPTS = "Print every prompt of this many training problems as the servers get it, and stop. Needs no server."


def main(argv: Sequence[str] | None = None, tasks: TaskMakers = TASKS) -> None:
    """Run one training job on this rank. A project with tasks of its own passes them in."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    configure(rank)
    with exit_on_value_error():
        config, extras = parse_config(
            argv,
            description="Trajectory-refined distillation.",
            extra={"dry_run": (bool, False, DRY_RUN), "show_prompts": (int, 0, SHOW_PROMPTS)},
        )
        if not (extras.dry_run or extras.show_prompts) and "RANK" not in os.environ:
            raise ValueError("start it with torchrun --nproc-per-node N -m megatron_trd.train ..., or add --dry-run")
        # Only rank 0 draws problems: the others need not read the files.
        samples, evaluates = config.data.trajectories is None, bool(config.rollout.student_urls)
        task = make_task(
            config,
            tasks,
            trains=rank == 0 and (samples or extras.show_prompts > 0),
            evaluates=rank == 0 and evaluates and config.eval.eval_num_problems > 0 and not extras.show_prompts,
            grades=not (extras.show_prompts or extras.dry_run),
        )
        # Not at the top: flags are refused, and --help answers, without waiting for torch and Megatron.
        if extras.show_prompts:
            from megatron_trd.rollout.show_prompts import show_prompts

            print(show_prompts(config, task, extras.show_prompts) if rank == 0 else "", end="")
            return
        from megatron_trd import job

        if extras.dry_run:
            print(job.describe(config, world_size) if rank == 0 else "", end="")
        else:
            job.run(config, task, rank, int(os.environ.get("LOCAL_RANK", "0")))


if __name__ == "__main__":
    main()
