"""Measure training steps: tokens/s, TFLOP/s, memory, parts of a step, communication; no server, no data, no weights.

    torchrun --nproc-per-node 8 tools/benchmark_throughput.py --hf-checkpoint DIR --random-weights [trainer's flags]
    python tools/benchmark_throughput.py --hf-checkpoint DIR --sweep "TP=2;TP=2,SP;PP=2"
    python tools/benchmark_throughput.py --hf-checkpoint DIR --random-weights --baseline --repeats 5

Takes every flag of `megatron_trd.train`; servers and problems are not asked for. Steps are the trainer's own, on random
samples of `--global-batch-size` sequences. Under torchrun it measures one layout (or, with `--baseline`, the baseline);
started with python it starts torchrun for each layout in turn and prints one table.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_trd.config.cli import exit_on_value_error, parse_config, save_resolved
from megatron_trd.config.schema import Config
from megatron_trd.log import configure
from megatron_trd.planning.devices import DEVICES
from megatron_trd.throughput.lengths import DEFAULT_TEXTS, FORMS, LengthMix, draw_samples

NO_SERVERS = ["--trajectories", "unused"]
FLAGS: dict[str, tuple[Any, Any, str]] = {
    "lengths": (tuple[str, ...], DEFAULT_TEXTS, f"Lengths of prompt, y_o, y_r, reference as NAME={FORMS}, in tokens."),
    "num_steps": (int, 5, "Measured steps."),
    "warmup_steps": (int, 2, "Steps before them."),
    "random_weights": (bool, False, "Read no weights, only config.json; student and teacher then differ."),
    "gpu": (str | None, None, f"Peak for the MFU, in bf16: {', '.join(DEVICES)}; unset = this machine's, if known."),
    "json": (str | None, None, "Write the numbers to this file."),
    "profile": (str | None, None, "Write a Chrome trace of one more step of each rank into this directory."),
    "sweep": (str | None, None, 'Layouts to compare, as "TP=2;TP=2,SP;PP=2"; any flag of the trainer may stand there.'),
    "num_gpus": (int | None, None, "Ranks of each layout; unset = the fewest that all of them can have."),
    "baseline": (bool, False, "Compare with a plain trainer on transformers, in turns."),
    "baseline_batch_size": (int | None, None, "Its sequences in a micro-batch; unset = as many of the step's longest "
                            "as --max-tokens-per-micro-batch holds."),
    "repeats": (int, 3, "Turns of each with --baseline or --sweep; the ratios are medians of pairs."),
}  # fmt: skip
HANDED_DOWN = ("num_steps", "warmup_steps", "random_weights", "gpu", "baseline_batch_size")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or start what measures."""
    with exit_on_value_error():
        given = [*NO_SERVERS, *(sys.argv[1:] if argv is None else argv)]
        config, extras = parse_config(given, description="Measure training steps.", extra=FLAGS)
        for name, least in (("num_steps", 1), ("warmup_steps", 0), ("repeats", 1)):
            if getattr(extras, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(extras, name)}: give {least} or more")
        LengthMix.parse(extras.lengths)
        if extras.baseline:
            from megatron_trd.throughput.baseline import require_supported

            require_supported(config)
        if "RANK" not in os.environ:
            start(config, extras)
        elif extras.sweep is not None:
            raise ValueError(f"--sweep {extras.sweep}: starts torchrun itself; start this script with python")
        else:
            work(config, extras)


def work(config: Config, extras: Any) -> None:
    """Measure on this rank."""
    import torch

    from megatron_trd.data.packing import stream_lengths
    from megatron_trd.throughput.baseline import Baseline
    from megatron_trd.throughput.measure import Contender, cuda_peaks, look_into, time_step
    from megatron_trd.throughput.ours import Ours
    from megatron_trd.throughput.result import parts_table, peak_tflops, summarize, table

    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    configure(rank)
    peak = peak_tflops(config, extras.gpu)
    number = extras.warmup_steps + extras.num_steps
    contender: Contender
    if not extras.baseline:
        contender = Ours(config, local_rank, num_steps=number + 1, random_weights=extras.random_weights)
    elif world_size == 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        contender = Baseline(config, device, extras.baseline_batch_size)
    else:
        raise ValueError(f"--baseline: it is one process, not {world_size}; use --nproc-per-node 1")
    mix, size = LengthMix.parse(extras.lengths), config.data.global_batch_size
    batches = [draw_samples(config, mix, size, contender.vocab_size, f"{config.data.seed}:{i}") for i in range(number)]
    warm = [time_step(contender, batch) for batch in batches[: extras.warmup_steps]]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    measured = batches[extras.warmup_steps :]
    steps = [time_step(contender, batch) for batch in measured]
    seen = cuda_peaks(contender.device)
    trace = Path(extras.profile) / f"rank{rank}.json" if extras.profile else None
    # The largest of them: its memory is the peak.
    largest = max(measured, key=lambda batch: sum(sum(stream_lengths(sample)) for sample in batch))
    seen |= look_into(contender, largest, trace)
    if rank == 0:
        result = summarize(
            config,
            list(zip(measured, steps, strict=True)),
            seen,
            kind="baseline" if extras.baseline else "ours",
            world_size=world_size,
            first_loss=(*warm, *steps)[0].loss,
            peak=peak,
        )
        if extras.json is not None:
            Path(extras.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(table({result["kind"]: result}) + "\n" + parts_table({result["kind"]: result}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(config: Config, extras: Any) -> None:
    """Start torchrun for every contender in turn, and compare."""
    from megatron_trd.throughput.baseline import write_random_model
    from megatron_trd.throughput.result import parts_table, table
    from megatron_trd.throughput.turns import Turn, compare, middle, read_layout, take_turns

    configure(0)
    layouts = extras.sweep.split(";") if extras.sweep is not None else [""]
    with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
        if extras.baseline and extras.random_weights:
            extras.random_weights = False  # both sides shall have the same
            names = [name for name in ("hf_checkpoint", "teacher_hf_checkpoint") if getattr(config.model, name)]
            for seed, name in enumerate(names):
                write_random_model(getattr(config.model, name), f"{scratch}/{name}", seed)
            config = replace(config, model=replace(config.model, **{name: f"{scratch}/{name}" for name in names}))
        save_resolved(config, f"{scratch}/config.yaml")
        common = ["--config", f"{scratch}/config.yaml", "--lengths", *extras.lengths]
        for name in HANDED_DOWN:
            value, flag = getattr(extras, name), "--" + name.replace("_", "-")
            common += [] if value is None or value is False else [flag] if value is True else [flag, str(value)]
        chosen = {layout.strip() or "ours": read_layout(layout) if layout.strip() else [] for layout in layouts}
        num_ranks = ranks_for([parse_config([*common, *flags], extra=FLAGS)[0] for flags in chosen.values()], extras)
        turns = [
            Turn(name=name, arguments=(*common, *flags, *profiled(extras, name)), num_ranks=num_ranks)
            for name, flags in chosen.items()
        ]
        if extras.baseline:
            turns.append(Turn(name="baseline", arguments=(*common, "--baseline"), num_ranks=1))
        results = take_turns(turns, extras.repeats, __file__, Path(scratch))
    typical = {name: middle(runs) for name, runs in results.items()}
    print(table(typical) + "\n\n" + parts_table(typical))
    failed = [name for name, result in typical.items() if "error" in result]
    comparisons = {}
    if extras.baseline and "baseline" not in failed:
        for name in [name for name in chosen if name not in failed]:
            comparisons[name] = compared = compare(results[name], results["baseline"])
            print(f"{name} over baseline: {describe(compared)}")
    if extras.json is not None:
        found = {"runs": results, "over_baseline": comparisons}
        Path(extras.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def ranks_for(configs: Sequence[Config], extras: Any) -> int:
    """Return how many ranks every layout gets; each must be able to use them."""
    from megatron_trd.planning.grid import Grid

    least = 1
    for parallel in (config.parallel for config in configs):
        experts = parallel.expert_model_parallel_size * (
            parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
        )
        least = math.lcm(least, parallel.model_parallel_size, experts * parallel.pipeline_model_parallel_size)
    number = extras.num_gpus or least
    for config in configs:
        Grid.of(config.parallel, number)
    return number


def profiled(extras: Any, name: str) -> list[str]:
    """Return the flag that gives each contender a directory of its own for its traces."""
    return ["--profile", str(Path(extras.profile) / name.replace("/", "_"))] if extras.profile else []


def describe(compared: dict[str, Any]) -> str:
    """Render one comparison."""
    loss = compared["first_loss"]
    rates = [
        f"{ratio['median']:.2f} x {what} [{ratio['min']:.2f}, {ratio['max']:.2f}]"
        for what, name in (("tokens/s/GPU", "tokens_per_s_per_gpu"), ("tokens/CPU second", "tokens_per_cpu_second"))
        if (ratio := compared.get(name))
    ]
    return (
        f"{', '.join(rates)}, {compared['peak_gib']:.2f} x peak memory; "
        f"first losses {loss['ours']:.7g} and {loss['baseline']:.7g}"
    )


if __name__ == "__main__":
    main()
