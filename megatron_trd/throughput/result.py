"""What was measured of one contender, as plain values and as lines of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_trd.config.schema import Config
from megatron_trd.planning.devices import find_device, this_device
from megatron_trd.planning.grid import Grid
from megatron_trd.planning.plan import read_models
from megatron_trd.records import Sample
from megatron_trd.throughput.measure import Step, spread
from megatron_trd.throughput.work import step_flops

Result = dict[str, Any]


def peak_tflops(config: Config, gpu: str | None) -> float | None:
    """Return the bf16 peak of a GPU of the planner's table, or of this machine's; None where nobody knows it.

    Raises:
        ValueError: not in the table.
    """
    if gpu is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        entry = this_device(name)
        gpu = entry if entry.partition("-")[0] in name.lower().replace(" ", "") else None
    return find_device(gpu).bf16_tflops if gpu is not None and config.model.bf16 else None


def summarize(
    config: Config,
    steps: Sequence[tuple[Sequence[Sample], Step]],
    seen: Mapping[str, float],
    *,
    kind: str,
    world_size: int,
    first_loss: float,
    peak: float | None,
) -> Result:
    """Put together what was measured: medians over steps, with the least and the greatest.

    Args:
        steps: with the samples of each.
        seen: memory and communication.
        first_loss: of the very first step, on the first weights.
        peak: TFLOP/s of one GPU, for the utilisation.
    """
    grid = Grid.of(config.parallel, world_size)
    models = read_models(config, grid, "cpu")

    def per_gpu(amounts: Sequence[float]) -> dict[str, float]:
        return spread(n / step.seconds / world_size for n, (_, step) in zip(amounts, steps, strict=True))

    flops = [step_flops(config, models, samples) for samples, _ in steps]
    result: Result = {
        "kind": kind,
        "world_size": world_size,
        "grid": {"tp": grid.tp, "pp": grid.pp, "cp": grid.cp, "dp": grid.dp, "ep": grid.ep},
        "precision": "bf16" if config.model.bf16 else "fp32",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sequences": [len(samples) for samples, _ in steps],
        "tokens": [step.tokens for _, step in steps],
        "response_tokens": [step.response_tokens for _, step in steps],
        "first_loss": first_loss,
        "losses": [step.loss for _, step in steps],
        "micro_batches": [step.micro_batches for _, step in steps],
        "model_flops": [model for model, _ in flops],
        "hardware_flops": [hardware for _, hardware in flops],
        "step_seconds": spread(step.seconds for _, step in steps),
        "part_seconds": {part: spread(s.parts[part] for _, s in steps) for part in steps[0][1].parts},
        "tokens_per_s_per_gpu": per_gpu([step.tokens for _, step in steps]),
        "response_tokens_per_s_per_gpu": per_gpu([step.response_tokens for _, step in steps]),
        "model_tflops_per_s_per_gpu": per_gpu([model / 1e12 for model, _ in flops]),
        "padding_share": spread(step.padding_share for _, step in steps),
        **seen,
    }
    if result["device"] == "cpu":
        result["step_cpu_seconds"] = spread(step.cpu_seconds for _, step in steps)
    if kind == "ours":  # the baseline may compute other things again
        result["hardware_tflops_per_s_per_gpu"] = per_gpu([hardware / 1e12 for _, hardware in flops])
    if peak is not None:
        result["mfu"] = {name: rate / peak for name, rate in result["model_tflops_per_s_per_gpu"].items()}
    return result


def table(results: Mapping[str, Result]) -> str:
    """Render one line for each contender; what was not measured is a dash."""
    head = ("", "tokens/s/GPU", "[min, max]", "of which y", "TFLOP/s", "MFU", "peak GiB", "comm.", "padding", "s/step")
    rows: list[tuple[str, ...]] = [head]
    for name, result in results.items():
        if "error" in result:
            rows.append((name, f"failed: {result['error']}"))
            continue
        tokens, share = result["tokens_per_s_per_gpu"], result.get("communication_share")
        rows.append(
            (
                name,
                f"{tokens['median']:,.1f}",
                f"[{tokens['min']:,.1f}, {tokens['max']:,.1f}]",
                f"{result['response_tokens_per_s_per_gpu']['median']:,.1f}",
                f"{result['model_tflops_per_s_per_gpu']['median']:.4g}",
                f"{result['mfu']['median']:.1%}" if "mfu" in result else "-",
                f"{result['peak_gib']:.3f}",
                "-" if share is None else f"{share:.1%}",
                f"{result['padding_share']['median']:.1%}",
                f"{result['step_seconds']['median']:.3f}",
            )
        )
    widths = [max(len(row[i]) for row in rows if len(row) == len(head)) for i in range(len(head))]
    widths[0] = max(len(row[0]) for row in rows)
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows)


def parts_table(results: Mapping[str, Result]) -> str:
    """Render the median seconds of each part of a step."""
    lines = []
    for name, result in results.items():
        if "error" not in result:
            parts = ", ".join(f"{part} {s['median']:.3f}" for part, s in result["part_seconds"].items())
            lines.append(f"{name}: {parts} (seconds)")
    return "\n".join(lines)
