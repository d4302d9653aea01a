"""Run every check of `trd_kernels` that a device is needed for, in one go.

    PYTHONPATH=kernels python3 tests/gpu/run_kernels.py --out results

Prints a line per check and a table at the end, writes `results/kernels.json`; exit code 1 if any check failed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import accuracy, calls, determinism, memory, performance, sanitizer, shapes, tiny
from gpu.harness import Context
from gpu.runner import Script
from trd_kernels import linear_kl_div

SCRIPT = Script(
    path=Path(__file__).resolve(),
    description=__doc__,
    groups={
        "tiny": tiny.CHECKS,
        "accuracy": accuracy.CHECKS,
        "determinism": determinism.CHECKS,
        "memory": memory.CHECKS,
        "performance": performance.CHECKS,
        "shapes": shapes.CHECKS,
        "calls": calls.CHECKS,
        "rivals": performance.RIVALS,
        "sanitizer": sanitizer.CHECKS,
    },
)


def triton_version() -> str:
    """Return the version, or why there is none."""
    try:
        import triton
    except ImportError as e:
        return f"none ({e})"
    return triton.__version__


def backends_on(device: str) -> tuple[str, ...]:
    """Return the backends to check: on a GPU Triton has to work, on a CPU it does under its interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and not triton_version().startswith("none")
    return ("torch", "triton") if device == "cuda" or interpreted else ("torch",)


def main() -> int:
    """Run the checks and return the exit code."""
    args = SCRIPT.arguments()
    context = Context(
        operator=linear_kl_div,
        device=torch.device(args.device),
        full=args.scale == "full",
        backends=backends_on(args.device),
        deadline=time.monotonic() + args.deadline,
    )
    about = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton_version(),
        "scale": args.scale,
        "backends": " ".join(context.backends),
    }
    return SCRIPT.run(args, context, about)


if __name__ == "__main__":
    sys.exit(main())
