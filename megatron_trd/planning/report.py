"""The plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_trd.planning.plan import RunPlan
from megatron_trd.planning.servers import GIB
from megatron_trd.planning.sweep import Sweep, remedies

TOP = 10


def text(plan: RunPlan) -> str:
    """Render memory, time, servers, verdict and what was assumed."""
    return "\n\n".join(
        "\n".join(part) for part in (memory(plan), servers(plan), time(plan), verdict(plan), assumed(plan)) if part
    )


def memory(plan: RunPlan) -> list[str]:
    """Render the memory of the first, a middle, the last and the worst stage."""
    last = plan.grid.pp - 1
    shown = sorted({0, last // 2, last, plan.worst.stage})
    columns = [plan.stages[stage] for stage in shown]
    purposes = list(dict.fromkeys(name for stage in columns for name in stage.at_peak))
    rows = [
        (name, *(f"{stage.at_peak.get(name, 0) / GIB:.2f}" for stage in columns))
        for name in purposes
        if any(stage.at_peak.get(name) for stage in columns)
    ]
    extra = [plan.needed_gib(stage) - stage.total / GIB for stage in columns]
    rows.append(("CUDA contexts, fragmentation", *(f"{gib:.2f}" for gib in extra)))
    rows.append(("total", *(f"{plan.needed_gib(stage):.2f}" for stage in columns)))
    names = [f"stage {stage}" + (" (worst)" if stage == plan.worst.stage else "") for stage in shown]
    most = plan.work.largest
    return [
        f"memory of one rank in GiB, of {plan.resources.device.memory_gib:.1f} on {plan.resources.device_name}; the "
        f"largest micro-batch: {most.student.tokens:,} tokens of the student's stream, {most.teacher.tokens:,} of the "
        "teacher's",
        *_table(("", *names), rows),
        f"  most of stage {plan.worst.stage}: {plan.worst.peak_moment}",
    ]


def servers(plan: RunPlan) -> list[str]:
    """Render what the servers hold."""
    lines = []
    for role, group in (("student", plan.servers.student), ("teacher", plan.servers.teacher)):
        if group is None:
            continue
        prompt = plan.work.lengths.prompt if role == "student" else plan.work.refine_prompt
        mean = prompt + (plan.work.lengths.y_o if role == "student" else plan.work.lengths.y_r)
        budget = plan.config.rollout
        longest = budget.max_response_tokens + (
            budget.max_prompt_tokens if role == "student" else budget.max_refine_prompt_tokens
        )
        lines.append(
            f"{role} servers: {group.replicas} x TP {group.tp}; a GPU holds {group.weight_bytes / GIB:.2f} GiB of "
            f"weights; a server {group.cached_tokens:,} tokens of cache ({group.kv_bytes_per_token / 1024:.0f} KiB a "
            f"token and GPU): {group.cached_tokens / mean:,.0f} sequences of mean length, "
            f"{group.cached_tokens / longest:,.0f} of the longest"
        )
    return lines


def time(plan: RunPlan) -> list[str]:
    """Render an iteration's stages."""
    rows = [
        (
            stage.name,
            f"{stage.seconds:.1f}",
            f"{stage.flops / 1e15:.1f}" if stage.flops else "",
            stage.limit,
        )
        for stage in plan.time.stages
        if stage.seconds >= 0.05
    ]
    traffic = "; ".join(f"{one.name} {one.num_bytes / 1e9:.2f}" for one in plan.time.traffic)
    gpus = plan.resources.total_gpus(plan.config)
    speed = plan.time.tokens / plan.time.seconds / gpus
    work = plan.work
    return [
        f"time of one iteration: {work.problems} problems, {work.steps} steps of {work.micro_batches} micro-batches a "
        "rank",
        *_table(("", "seconds", "PFLOP", "waits for"), rows),
        f"  GB that a rank sends in a step: {traffic or 'none'}",
        f"  pipeline bubble: {plan.time.bubble_share:.1%} of the passes",
        f"  iteration {plan.time.seconds:.1f} s; {speed:,.0f} tokens/s/GPU (generated and trained on, {gpus} GPUs); "
        f"run of {plan.config.data.num_iterations} iterations: {plan.hours:.1f} h",
    ]


def verdict(plan: RunPlan) -> list[str]:
    """Say whether it fits, and if not, what helps."""
    need, have = plan.needed_gib(plan.worst), plan.resources.device.memory_gib
    lines = []
    if plan.training_fits:
        lines.append(f"verdict: fits: stage {plan.worst.stage} needs {need:.1f} of {have:.1f} GiB")
    else:
        lines.append(f"verdict: does not fit: stage {plan.worst.stage} needs {need:.1f} of {have:.1f} GiB")
        for remedy in remedies(plan)[:3]:
            ending = "fits" if remedy.plan.training_fits else "not enough alone"
            lines.append(
                f"  {remedy.flags}: {remedy.needed_gib:.1f} GiB, iteration {remedy.plan.time.seconds:.1f} s; {ending}"
            )
    if not plan.servers_fit:
        lines.append("verdict: servers cannot hold the longest sequence; raise --server-tp, or lower the budgets")
    return lines


def assumed(plan: RunPlan) -> list[str]:
    """Print everything that was not computed."""
    lengths, device = plan.work.lengths, plan.resources.device
    return [
        f"assumed: mean tokens: prompt {lengths.prompt:.0f}, y_o {lengths.y_o:.0f}, y_r {lengths.y_r:.0f}, y* "
        f"{lengths.reference:.0f}; layers: {plan.models.precision.implementation}",
        "  " + ", ".join(f"{name} {value:g}" for name, value in asdict(plan.assumptions).items()),
        f"  {plan.resources.device_name}: {device.bf16_tflops:g} bf16 TFLOP/s, {device.memory_tb_s:g} TB/s, "
        f"{device.node_gb_s:g} GB/s in a machine of {device.gpus_per_node}, {device.network_gb_s:g} GB/s between "
        f"machines ({device.source})",
    ]


def sweep_text(found: Sweep) -> str:
    """Render the fastest layouts, and why there are no others."""
    rows = [
        (
            str(plan.grid.tp),
            str(plan.grid.pp),
            str(plan.grid.virtual_stages),
            str(plan.grid.cp),
            str(plan.grid.ep),
            str(plan.grid.dp),
            plan.config.model.recompute_granularity,
            f"{plan.needed_gib(plan.worst):.1f}",
            f"{sum(stage.seconds for stage in plan.time.training):.1f}",
            f"{plan.time.seconds:.1f}",
            f"{plan.hours:.1f}",
        )
        for plan in found.fitting[:TOP]
    ]
    header = ("TP", "PP", "virtual", "CP", "EP", "DP", "recompute", "GiB", "training s", "iteration s", "run h")
    lines = [f"layouts that fit: {len(found.fitting)}", *_table(header, rows)]
    lines += [f"  {number} refused: {why}" for why, number in sorted(found.refused.items(), key=lambda x: -x[1])]
    return "\n".join(lines)


def as_json(plan: RunPlan) -> dict[str, Any]:
    """Return the numbers of the plan: bytes, seconds, FLOP."""
    return {
        "resources": asdict(plan.resources),
        "grid": asdict(plan.grid),
        "assumptions": asdict(plan.assumptions),
        "lengths": asdict(plan.work.lengths),
        "trainable_parameters": plan.trainable_parameters,
        "memory": [
            {
                "stage": stage.stage,
                "layers": stage.layers,
                "moment": stage.peak_moment,
                "bytes": stage.at_peak,
                "needed_gib": plan.needed_gib(stage),
            }
            for stage in plan.stages
        ],
        "worst_stage": plan.worst.stage,
        "fits": plan.fits,
        "servers": {
            role: {
                "weight_bytes": group.weight_bytes,
                "kv_bytes_per_token": group.kv_bytes_per_token,
                "cached_tokens": group.cached_tokens,
            }
            for role, group in (("student", plan.servers.student), ("teacher", plan.servers.teacher))
            if group is not None
        },
        "stages": [asdict(stage) for stage in plan.time.stages],
        "step_traffic": [asdict(one) for one in plan.time.traffic],
        "bubble_share": plan.time.bubble_share,
        "iteration_seconds": plan.time.seconds,
        "hours": plan.hours,
    }


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
