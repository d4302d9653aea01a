"""Check the trainer on a device: layers, precisions, optimizers, memory, checkpoints, speed.

    PYTHONPATH=.:kernels python3 tests/gpu/run_megatron.py --out results

Prints a line per check and a table at the end, writes `results/megatron.json`; exit code 1 if any check failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import trainer_accuracy, trainer_memory, trainer_speed, trainer_state
from gpu.harness import Check, Context, Outcome, device_works, run_check

GROUPS = {
    "accuracy": trainer_accuracy.CHECKS,
    "fp8": trainer_accuracy.FP8,
    "state": trainer_state.CHECKS,
    "memory": trainer_memory.CHECKS,
    "speed": trainer_speed.CHECKS,
}
CHECKS: dict[str, Check] = {f"{group}/{name}": check for group, of in GROUPS.items() for name, check in of.items()}
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers")
# A collective that hangs outlasts any look at the clock; this long after the deadline the process ends.
GRACE_SECONDS = 60.0


def selected(only: str | None) -> list[str]:
    """Return the checks whose name or group is listed, in order."""
    wanted = only.split(",") if only is not None else list(GROUPS)
    unknown = [w for w in wanted if w not in CHECKS and w not in GROUPS]
    if unknown:
        raise SystemExit(f"--only {', '.join(unknown)}: choose from {', '.join([*GROUPS, *CHECKS])}")
    return [name for name in CHECKS if name in wanted or name.split("/")[0] in wanted]


def in_a_new_process(names: list[str], args: argparse.Namespace, seconds_left: float) -> list[Outcome]:
    """Run checks where no earlier one has broken the device."""
    with tempfile.TemporaryDirectory() as scratch:
        options = {"--out": scratch, "--device": args.device, "--scale": args.scale, "--only": ",".join(names)}
        flags = [word for pair in options.items() for word in pair]
        command = [sys.executable, __file__, *flags, "--deadline", str(max(seconds_left, 0.0))]
        subprocess.run(command, check=False)
        report = Path(scratch, "megatron.json")
        done = json.loads(report.read_text())["checks"] if report.exists() else []
    found = {entry["name"]: Outcome(**entry) for entry in done}
    return [found.get(name) or Outcome(name=name, verdict="not run", key="its process died") for name in names]


def write(out: Path | None, about: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Write all results so far, so that a crash later on loses none."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        report = {"about": about, "checks": [asdict(outcome) for outcome in outcomes]}
        (out / "megatron.json").write_text(json.dumps(report, indent=1))


def versions() -> dict[str, str]:
    """Return what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def parsed_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for megatron.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=("full", "small"), default="full", help="sizes that fill a GPU, or toy ones")
    parser.add_argument("--only", help="names of checks or groups, with commas")
    parser.add_argument("--deadline", type=float, default=480.0, help="seconds; checks not begun by then fail")
    return parser.parse_args()


def main() -> int:
    """Run the checks and return the exit code."""
    args = parsed_arguments()
    if (args.device == "cuda") != torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: the trainer takes CUDA where it is; hide or show the GPU")
    names = selected(args.only)
    context = Context(
        operator=None,
        device=torch.device(args.device),
        full=args.scale == "full",
        backends=(),
        deadline=time.monotonic() + args.deadline,
    )
    faulthandler.dump_traceback_later(args.deadline + GRACE_SECONDS, exit=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    about = {"device": device, "scale": args.scale, **versions()}
    print(*(f"{key} {value}" for key, value in about.items()), sep=", ")
    outcomes: list[Outcome] = []
    for i, name in enumerate(names):
        outcomes.append(run_check(name, CHECKS[name], context))
        print(outcomes[-1], flush=True)
        if args.device == "cuda" and not device_works():
            print("the device is lost to this process: the rest runs in a new one", flush=True)
            outcomes += in_a_new_process(names[i + 1 :], args, context.seconds_left())
            break
        write(args.out, about, outcomes)
    write(args.out, about, outcomes)
    print("\n" + "\n".join(map(str, outcomes)))
    bad = [outcome.name for outcome in outcomes if not outcome.good]
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} good" + (f"; not: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
