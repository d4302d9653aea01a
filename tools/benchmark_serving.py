"""Measure what the client adds to a server, and what each way of weight resync costs.

    python tools/benchmark_serving.py rollout --url URL --model-path DIR --sglang-python V/bin/python
    python tools/benchmark_serving.py sync --urls URL URL --model-path DIR --transports disk,distributed,tensor

`rollout`: tokens/s of our client and of SGLang's own benchmark client, in turns, on the same server: random prompts,
fixed lengths, log-probabilities returned, nothing streamed. `sync`: seconds per GB of each transport, in turns, beside
a plain copy of the same tensors in this process's memory. SGLang's client asks for the package `datasets` beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_trd.config.schema import Config, ModelConfig, RolloutConfig, WeightSyncConfig
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.weight_sync.transports import make_weight_sync

Weights = list[tuple[str, torch.Tensor]]
SGLANG_CLIENT = f"""
import runpy, sys, torch
sys.path.insert(0, {str(Path(__file__).parent / "sglang_cpu")!r})
import serve
operators = None if torch.accelerator.is_available() else serve.declare_torchvision_operators()
runpy.run_module("sglang.bench_serving", run_name="__main__", alter_sys=True)
"""


# --------------------------------------------------------------------- rollout


def ours(args: argparse.Namespace, seed: int) -> float:
    """Return our client's output tokens per second."""
    rng = random.Random(seed)
    vocab_size = json.loads(Path(args.model_path, "config.json").read_text())["vocab_size"]
    prompts = [[rng.randrange(vocab_size) for _ in range(args.input_len)] for _ in range(args.num_prompts)]
    params = SamplingParams(max_new_tokens=args.output_len, temperature=1.0, top_p=1.0, top_k=-1, ignore_eos=True)

    async def main() -> float:
        async with SGLangFleet([args.url], max_concurrent_requests=args.concurrency) as fleet:
            await fleet.wait_healthy()
            await fleet.generate(prompts[0], params)
            start = time.perf_counter()
            done = await asyncio.gather(*(fleet.generate(prompt, params) for prompt in prompts))
            seconds = time.perf_counter() - start
        failed = [completion.error for completion in done if len(completion.token_ids) != args.output_len]
        if failed:
            raise SystemExit(f"error: {len(failed)} requests did not give {args.output_len} tokens: {failed[0]}")
        return args.num_prompts * args.output_len / seconds

    return asyncio.run(main())


def theirs(args: argparse.Namespace, seed: int) -> float:
    """Return SGLang's benchmark client's output tokens per second."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.jsonl")
        flags = {
            "backend": "sglang",
            "base-url": args.url,
            "model": args.model_path,
            "dataset-name": "random-ids",
            "num-prompts": args.num_prompts,
            "random-input-len": args.input_len,
            "random-output-len": args.output_len,
            "random-range-ratio": 1.0,
            "max-concurrency": args.concurrency,
            "temperature": 1.0,
            "seed": seed,
            "output-file": report,
        }
        command = [args.sglang_python, "-c", SGLANG_CLIENT, "--tokenize-prompt", "--disable-stream"]
        command += ["--disable-tqdm", "--return-logprob", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: SGLang's client failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        return float(json.loads(report.read_text())["output_throughput"])


def rollout(args: argparse.Namespace) -> None:
    """Compare the two clients."""
    rates: dict[str, list[float]] = {"ours": [], "sglang": []}
    for seed in range(args.repeats + 1):  # the first turn warms up
        for name, client in (("ours", ours), ("sglang", theirs)):
            rate = client(args, seed)
            if seed:
                rates[name].append(rate)
                print(f"{name:>7} {rate:9.1f} tokens/s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["sglang"], strict=True))
    print(f"ours / sglang, median of {args.repeats} pairs: {ratio:.3f}")


# --------------------------------------------------------------------- sync


def read_weights(directory: str) -> Weights:
    """Return all tensors of a Hugging Face directory."""
    weights: Weights = []
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            weights += [(name, tensors.get_tensor(name)) for name in tensors.keys()]  # noqa: SIM118 - not a mapping
    return weights


def copy_seconds(weights: Weights) -> float:
    """Copy every tensor into memory that was touched before."""
    targets = [torch.zeros_like(tensor) for _, tensor in weights]
    start = time.perf_counter()
    for target, (_, tensor) in zip(targets, weights, strict=True):
        target.copy_(tensor)
    return time.perf_counter() - start


def sync(args: argparse.Namespace) -> None:
    """Publish the same weights by each transport, in turns."""
    weights = read_weights(args.model_path)
    gigabytes = sum(tensor.nbytes for _, tensor in weights) / 1e9
    seconds: dict[str, list[tuple[float, float]]] = {"copy": []} | {name: [] for name in args.transports}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        asyncio.run(publish_in_turns(args, weights, seconds, scratch))
    print(f"{gigabytes:.3f} GB in {len(weights)} tensors to {len(args.urls)} servers, median of {args.repeats}")
    print(f"{'transport':>12} {'s/GB':>8} {'paused s/GB':>12} {'x copy':>8}")
    plain = statistics.median(total for total, _ in seconds["copy"])
    for name, times in seconds.items():
        total, paused = (statistics.median(part) for part in zip(*times, strict=True))
        print(f"{name:>12} {total / gigabytes:8.2f} {paused / gigabytes:12.2f} {total / plain:8.1f}")


async def publish_in_turns(
    args: argparse.Namespace, weights: Weights, seconds: dict[str, list[tuple[float, float]]], scratch: str
) -> None:
    """Fill in (whole publication, time the servers rested) of every transport and turn."""
    async with SGLangFleet(args.urls) as fleet:
        await fleet.wait_healthy()
        transports = {}
        for name in args.transports:
            config = Config(
                model=ModelConfig(hf_checkpoint=args.model_path),
                rollout=RolloutConfig(student_urls=tuple(args.urls), teacher_urls=tuple(args.urls)),
                weight_sync=WeightSyncConfig(weight_sync=name, weight_sync_dir=scratch),
            )
            transports[name] = make_weight_sync(config, fleet)
        for turn in range(args.repeats + 1):  # the first turn warms up
            took = {"copy": (copy_seconds(weights), 0.0)}
            for name, transport in transports.items():
                report = await transport.publish(weights, f"{name}-{turn}")
                if report.failures:
                    raise SystemExit(f"error: {name}: {report.failures}")
                took[name] = (report.seconds, report.paused_seconds)
            for name, times in took.items():
                if turn:
                    seconds[name].append(times)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("rollout", help="tokens/s of our client and of SGLang's")
    one.add_argument("--url", required=True)
    one.add_argument("--model-path", required=True, help="the directory that is served, for its vocabulary")
    one.add_argument("--sglang-python", required=True, help="interpreter that has SGLang")
    one.add_argument("--num-prompts", type=int, default=256)
    one.add_argument("--input-len", type=int, default=64, help="tokens")
    one.add_argument("--output-len", type=int, default=64, help="tokens")
    one.add_argument("--concurrency", type=int, default=64, help="requests in flight")
    one.add_argument("--repeats", type=int, default=5)
    one.set_defaults(run=rollout)
    two = commands.add_parser("sync", help="seconds per GB of each transport")
    two.add_argument("--urls", nargs="+", required=True)
    two.add_argument("--model-path", required=True, help="weights to send; the servers hold that shape")
    two.add_argument("--transports", type=lambda s: s.split(","), default=["disk", "distributed", "tensor"])
    two.add_argument("--scratch", help="where `disk` writes; default: the system's temporary directory")
    two.add_argument("--repeats", type=int, default=3)
    two.set_defaults(run=sync)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
