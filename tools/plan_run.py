"""Say what a run needs before anyone rents a GPU: memory of every rank, seconds of every stage, what to change.

    python tools/plan_run.py --hf-checkpoint DIR --num-gpus 8 --gpu h100-80gb [flags of megatron_trd.train] [--sweep]

DIR needs no weights, only `config.json`. Takes every flag of `megatron_trd.train`; servers' URLs are not asked for.
What is computed and how far it was off: docs/planning.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_trd.config.cli import exit_on_value_error, parse_config
from megatron_trd.planning import report
from megatron_trd.planning.devices import DEVICES, Assumptions
from megatron_trd.planning.plan import Resources, make_plan
from megatron_trd.planning.sweep import sweep
from megatron_trd.planning.workload import Lengths

NOWHERE = ["--student-urls", "http://planned", "--teacher-urls", "http://planned"]  # a flag given later wins
FLAGS = {
    "num_gpus": (int, 8, "GPUs of the trainer."),
    "gpu": (str, "h100-80gb", f"Kind of GPU: {', '.join(DEVICES)}."),
    "student_server_gpus": (int | None, None, "GPUs of the student's servers; unset = as many as --num-gpus."),
    "teacher_server_gpus": (int | None, None, "GPUs of the teacher's servers; unset = as many as --num-gpus."),
    "server_tp": (int, 1, "GPUs that share one server."),
    "mean_prompt_tokens": (float | None, None, "Mean prompt; unset = an eighth of --max-prompt-tokens."),
    "mean_y_o_tokens": (float | None, None, "Mean y_o; unset = a quarter of --max-response-tokens."),
    "mean_y_r_tokens": (float | None, None, "Mean y_r; unset = an eighth of --max-response-tokens."),
    "mean_reference_tokens": (float | None, None, "Mean y*; unset = an eighth of --max-response-tokens."),
    "sweep": (bool, False, "Try the layouts for these GPUs and print the fastest that fit."),
    "json": (str | None, None, "Write the numbers to this file."),
    **{f.name: (float, f.default, "Assumption of the estimate.") for f in fields(Assumptions)},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan of a run."""
    with exit_on_value_error():
        given = [*NOWHERE, *(sys.argv[1:] if argv is None else argv)]
        config, extras = parse_config(given, description="Plan a run.", extra=FLAGS)
        usual = Lengths.assumed(config)
        means = {name: getattr(extras, f"mean_{name}_tokens") for name in ("prompt", "y_o", "y_r", "reference")}
        resources = Resources.of(
            config,
            extras.num_gpus,
            extras.gpu,
            student_server_gpus=extras.student_server_gpus,
            teacher_server_gpus=extras.teacher_server_gpus,
            server_tp=extras.server_tp,
        )
        plan = make_plan(
            config,
            resources,
            lengths=Lengths(**{n: getattr(usual, n) if mean is None else mean for n, mean in means.items()}),
            assumptions=Assumptions(**{f.name: getattr(extras, f.name) for f in fields(Assumptions)}),
        )
        print(report.text(plan))
        if extras.sweep:
            print("\n" + report.sweep_text(sweep(plan)))
        if extras.json is not None:
            Path(extras.json).write_text(json.dumps(report.as_json(plan), indent=2) + "\n")


if __name__ == "__main__":
    main()
