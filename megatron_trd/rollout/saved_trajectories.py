"""The trajectories that a run trained on, one file for each iteration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_trd.config.schema import Config
from megatron_trd.records import Trajectory
from megatron_trd.rollout.refine import describe_refinement
from megatron_trd.rollout.trajectory_file import TrajectoryWriter


def save_trajectories(config: Config, iteration: int, trajectories: Sequence[Trajectory]) -> Path:
    """Write the file of an iteration, whole or not at all; one that runs again after a resume replaces its own.

    Args:
        iteration: 1, 2, ... as in metrics.jsonl.
    """
    path = Path(config.checkpoint.run_dir) / "trajectories" / f"iter_{iteration:07d}.jsonl"
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    fingerprint = {
        "task": config.data.task,
        "mode": config.method.mode,
        "student": f"{config.model.hf_checkpoint}, trained in {config.checkpoint.run_dir}",
        "refinement": describe_refinement(config.method),
        "seed": str(config.data.seed),
    }
    with TrajectoryWriter(partial, fingerprint) as writer:
        for trajectory in trajectories:
            writer.append(trajectory)
    os.replace(partial, path)
    return path
