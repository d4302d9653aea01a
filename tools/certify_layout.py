"""Show, before a long run, that its layout trains as one device would: one step of a narrow copy beside fp64.

    python tools/certify_layout.py [--num-gpus N] -- --hf-checkpoint DIR --tensor-model-parallel-size 2 ...
    python tools/certify_layout.py -- torchrun --nproc-per-node 8 -m megatron_trd.train --hf-checkpoint DIR ...

After `--` come the flags of `megatron_trd.train`, or its whole command. DIR needs no weights, only `config.json`.
Starts its own ranks, on GPUs where there are enough, else on the CPU; under torchrun it uses those it is started as.
Exit code 0: certified, 1: not certified, 2: no verdict. What is compared, and the limits: docs/certify.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_trd.config.cli import exit_on_value_error, parse_config
from megatron_trd.config.schema import Config
from megatron_trd.log import configure

NOWHERE = ["--student-urls", "http://certified", "--teacher-urls", "http://certified"]  # a flag given later wins
PROGRAM = "megatron_trd.train"
DATA_PARALLEL = 2
"""More replicas show nothing more."""
GB_OF_RANK, BYTES_OF_PARAMETER, BYTES_OF_REFERENCE = 0.45, 24, 80


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into this tool's flags and the user's command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, help="ranks of the run; unset = those of the command, or the fewest")
    parser.add_argument(
        "--data-parallel-size", type=int, help=f"replicas; default: of the run, at most {DATA_PARALLEL}"
    )
    parser.add_argument(
        "--num-layers", type=int, help="of the narrow student; default: the fewest that the layout takes"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)  # by this tool: it has the exit code
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    if not argv[at + 1 :]:
        parser.error("give the flags of the run after --")
    return args, list(argv[at + 1 :])


def flags_and_ranks(command: Sequence[str]) -> tuple[list[str], int | None]:
    """Return the flags of the run, and its ranks where the command tells them."""
    at = next((i for i, word in enumerate(command) if word == PROGRAM or word.endswith("megatron_trd/train.py")), None)
    if at is None:
        return list(command), None
    sizes = {"nproc-per-node": 1, "nnodes": 1}
    words = [part for word in command[:at] for part in word.split("=", 1)]
    for flag, value in itertools.pairwise(words):
        name = flag.lstrip("-").replace("_", "-")
        if name in sizes:
            if not value.isdigit():
                raise ValueError(f"--{name} {value}: not a number; give the ranks of the run as --num-gpus")
            sizes[name] = int(value)
    return list(command[at + 1 :]), sizes["nproc-per-node"] * sizes["nnodes"]


def choose_ranks(config: Config, ranks: int | None, data_parallel: int | None) -> tuple[int, str | None]:
    """Return how many ranks to start, and a note where they are fewer than the run's.

    Raises:
        ValueError: no number of replicas fits the layout.
    """
    parallel = config.parallel
    size = parallel.model_parallel_size
    etp = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    experts = parallel.expert_model_parallel_size * etp * parallel.pipeline_model_parallel_size
    if ranks is not None and (ranks % size or ranks < size):
        raise ValueError(f"--num-gpus {ranks}: must be a multiple of the {size} ranks that hold a model")
    most = ranks // size if ranks is not None else None
    wanted = data_parallel or min(DATA_PARALLEL, most or DATA_PARALLEL)
    fitting = [dp for dp in range(wanted, (data_parallel or most or experts + wanted) + 1) if size * dp % experts == 0]
    if not fitting:
        raise ValueError(
            f"--data-parallel-size {wanted}: {size} x {wanted} ranks are no multiple of the {experts} that hold all "
            "experts; give another, or more --num-gpus"
        )
    cut = most is not None and fitting[0] < most
    return size * fitting[0], f"data-parallel size {fitting[0]} in place of {most}" if cut else None


def require_memory(config: Config, ranks: int) -> str:
    """Say what the ranks need on the CPU.

    Raises:
        ValueError: this machine has less.
    """
    import psutil

    from megatron_trd.certificate.narrow_copy import HIDDEN, TEACHER_HIDDEN
    from megatron_trd.mcore.hf_config import read_hf_model

    student = read_hf_model(config.model.hf_checkpoint, "hf-checkpoint", 1)  # the ranks look at the layout
    rows = student.geometry.vocab_size
    matrices = HIDDEN * (1 if student.tied else 2)
    matrices += TEACHER_HIDDEN if config.model.teacher_hf_checkpoint else HIDDEN
    parameters = rows * matrices
    sharers = config.parallel.tensor_model_parallel_size
    need = (
        ranks * (GB_OF_RANK + BYTES_OF_PARAMETER * parameters / sharers / 1e9) + BYTES_OF_REFERENCE * parameters / 1e9
    )
    there = psutil.virtual_memory().available / 1e9
    if need > there:
        raise ValueError(
            f"{ranks} ranks on the CPU need about {need:.1f} GB of memory, but {there:.1f} GB are free; use a machine "
            "with more, or with GPUs, or a layout of the same kind with fewer ranks"
        )
    return f"{ranks} ranks on the CPU, about {need:.1f} GB of memory"


def launch(args: argparse.Namespace, command: list[str]) -> int:
    """Start the ranks and return the exit code that they come to."""
    import torch

    flags, named = flags_and_ranks(command)
    config = parse_config([*NOWHERE, *flags])
    for flag in ("hf_checkpoint", "teacher_hf_checkpoint"):
        path = getattr(config.model, flag)
        if path is not None and not (Path(path) / "config.json").is_file():
            raise ValueError(f"--{flag.replace('_', '-')} {path}: no config.json there; give a Hugging Face directory")
    ranks, note = choose_ranks(config, args.num_gpus or named, args.data_parallel_size)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if torch.cuda.device_count() < ranks:
        print(require_memory(config, ranks), flush=True)
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if note:
        print(f"note: {note}", flush=True)
    with tempfile.TemporaryDirectory(prefix="certify-") as scratch:
        file = args.json or Path(scratch) / "certificate.json"
        file.unlink(missing_ok=True)
        own = ["--launched", "--json", str(file)]
        own += ["--num-layers", str(args.num_layers)] if args.num_layers is not None else []
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
        # fmt: off
        subprocess.run(
            [sys.executable, *torchrun, str(ranks), str(Path(__file__).resolve()), *own, "--", *flags],
            env=environment, check=False,
        )
        # fmt: on
        if not file.is_file():
            print("no verdict: the ranks failed, see above", file=sys.stderr)
            return 2
        return 0 if json.loads(file.read_text())["certified"] else 1


def run_rank(args: argparse.Namespace, command: list[str]) -> int:
    """Be one rank; rank 0 reports. Return the exit code, but 0 if the tool that launched it will."""
    from megatron_trd.certificate import report
    from megatron_trd.certificate.certify import certify
    from megatron_trd.mcore.groups import destroy_groups

    rank = int(os.environ["RANK"])
    configure(rank)
    flags, _ = flags_and_ranks(command)
    config = parse_config([*NOWHERE, *flags])
    run, certificate = certify(config, int(os.environ.get("LOCAL_RANK", "0")), args.num_layers)
    if rank == 0:
        layout = report.layout(config, int(os.environ["WORLD_SIZE"]))
        print(report.text(certificate, layout, run.notes), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(report.as_json(certificate, layout, run.notes), indent=2) + "\n")
    destroy_groups()
    return 0 if args.launched or certificate.certified else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Certify a layout; return the exit code."""
    args, command = arguments(sys.argv[1:] if argv is None else argv)
    with exit_on_value_error():
        return run_rank(args, command) if "RANK" in os.environ else launch(args, command)


if __name__ == "__main__":
    sys.exit(main())
