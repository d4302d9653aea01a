"""Check the trainer on a device: layers, precisions, optimizers, memory, checkpoints, speed.

    PYTHONPATH=.:kernels python3 tests/gpu/run_megatron.py --out results

Prints a line per check and a table at the end, writes `results/megatron.json`; exit code 1 if any check failed.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import trainer_accuracy, trainer_memory, trainer_speed, trainer_state
from gpu.harness import Context
from gpu.runner import Script

SCRIPT = Script(
    path=Path(__file__).resolve(),
    description=__doc__,
    groups={
        "accuracy": trainer_accuracy.CHECKS,
        "fp8": trainer_accuracy.FP8,
        "state": trainer_state.CHECKS,
        "memory": trainer_memory.CHECKS,
        "speed": trainer_speed.CHECKS,
    },
)
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers")


def versions() -> dict[str, str]:
    """Return what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def main() -> int:
    """Run the checks and return the exit code."""
    args = SCRIPT.arguments()
    if (args.device == "cuda") != torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: the trainer takes CUDA where it is; hide or show the GPU")
    context = Context(
        operator=None,
        device=torch.device(args.device),
        full=args.scale == "full",
        backends=(),
        deadline=time.monotonic() + args.deadline,
    )
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    return SCRIPT.run(args, context, {"device": device, "scale": args.scale, **versions()})


if __name__ == "__main__":
    sys.exit(main())
