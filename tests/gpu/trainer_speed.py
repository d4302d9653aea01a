"""How fast a step of a real model's shape is, through `tools/benchmark_throughput.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu.harness import Check, Context, Rows, Skipped
from gpu.trainer_runs import HAS_TRANSFORMERS

ROOT = Path(__file__).resolve().parents[2]
LEAST_MFU = 0.30
LONGEST_S = 120.0
SETTINGS = (
    *("--random-weights", "--opsd-teacher", "current", "--num-steps", "2", "--warmup-steps", "1"),
    *("--global-batch-size", "16", "--rollout-batch-size", "16"),
    *("--lengths", "prompt=fixed:512", "y_o=fixed:2048", "y_r=fixed:1024", "reference=fixed:512"),
)


def utilisation(*flags: str) -> Check:
    """Make the check of Qwen3-1.7B with random weights, that teaches itself; its speed is only reported."""

    def check(context: Context) -> Rows:
        context.need_cuda()
        missing = [name for name in ("aiohttp", "yaml", "jinja2") if importlib.util.find_spec(name) is None]
        if missing or not HAS_TRANSFORMERS:
            raise Skipped(f"needs {', '.join(missing or ['transformers'])}")
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            report = Path(folder, "throughput.json")
            path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
            rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            rank |= {"MASTER_PORT": str(free.getsockname()[1]), "PYTHONPATH": path}
            free.close()
            model = ["--hf-checkpoint", str(ROOT / "examples" / "shapes" / "Qwen3-1.7B"), "--json", str(report)]
            command = [sys.executable, str(ROOT / "tools" / "benchmark_throughput.py"), *model, *SETTINGS, *flags]
            seconds = min(LONGEST_S, context.seconds_left())
            subprocess.run(command, env=os.environ | rank, timeout=seconds, check=True)
            measured = json.loads(report.read_text())
        rows = Rows()
        speed = f"{measured['tokens_per_s_per_gpu']['median']:,.0f} tokens/s, {measured['peak_gib']:.1f} GiB"
        mfu = measured["mfu"]["median"]
        rows.at_most("MFU", mfu, 1.0, note=speed)
        rows.at_most(f"{LEAST_MFU} over MFU", LEAST_MFU / mfu, 1.0, binding=False)
        return rows

    return check


CHECKS: dict[str, Check] = {
    "1.7b": utilisation(),
    "1.7b-fp8": utilisation("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"),
    "1.7b-lora": utilisation("--lora-rank", "64", "--recompute-granularity", "full"),
}
