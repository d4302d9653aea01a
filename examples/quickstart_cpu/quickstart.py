"""Starts the servers, then `torchrun megatron_trd.train`, and ends the servers again.

Unknown flags go to the trainer. `--compare` trains three methods one after another from the same weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megatron_trd.report import main as report
from megatron_trd.rollout.server_process import launch_embedded_server, launch_sglang, sglang_python

HERE = Path(__file__).resolve().parent
METHODS = {
    "trd": ["--trajectory", "y_r", "--divergence", "forward-kl"],
    "forward-kl": ["--trajectory", "y_o", "--divergence", "forward-kl"],
    "reverse-kl": ["--trajectory", "y_o", "--divergence", "reverse-kl"],
}

SGLANG_FLAGS = ["--max-running-requests", "256", "--max-total-tokens", "65536"]  # a whole batch at once


def main() -> None:
    """Run the quickstart."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--mode", choices=("opsd", "opd"), default="opsd", help="who teaches")
    parser.add_argument("--engine", choices=("embedded", "sglang"), default="embedded", help="what serves the models")
    parser.add_argument("--run-dir", type=Path, default=None, help="default: runs/quickstart-<time>")
    parser.add_argument("--compare", action="store_true", help="train TRD, forward KL and reverse KL")
    parser.add_argument("--nproc-per-node", default="2", help="ranks of the trainer")
    args, flags = parser.parse_known_args()
    run_dir = args.run_dir or Path("runs") / f"quickstart-{time.strftime('%Y%m%d-%H%M%S')}"
    student, teacher = HERE / "models" / "student", HERE / "models" / "teacher"
    runs = {run_dir / name: method for name, method in METHODS.items()} if args.compare else {run_dir: []}
    python = sglang_python(os.environ)
    if args.engine == "sglang" and python is None:
        parser.error("--engine sglang: SGLang is not installed; run it as ENGINE=sglang bash run.sh")
    launch = (
        partial(launch_sglang, python=python, flags=SGLANG_FLAGS) if args.engine == "sglang" else launch_embedded_server
    )
    with ExitStack() as servers:
        student_url = servers.enter_context(launch(student))
        # OPSD's teacher is the student's first weights: a server that is never resynced.
        teacher_url = servers.enter_context(launch(teacher if args.mode == "opd" else student))
        print(f"student served at {student_url}, teacher at {teacher_url}", flush=True)
        for directory, method in runs.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
            command += ["--nproc-per-node", args.nproc_per_node, "-m", "megatron_trd.train"]
            command += ["--config", str(HERE / "config.yaml"), "--mode", args.mode, "--hf-checkpoint", str(student)]
            command += ["--student-urls", student_url, "--teacher-urls", teacher_url]
            command += ["--teacher-hf-checkpoint", str(teacher)] if args.mode == "opd" else []
            command += ["--run-dir", str(directory), "--save-hf", str(directory / "student-hf"), *flags, *method]
            code = subprocess.run(command, check=False).returncode
            if code:
                sys.exit(code)
    if args.compare:
        print("\nSide by side, from the same weights and problems (one seed):")
        report([str(directory) for directory in runs])


if __name__ == "__main__":
    main()
