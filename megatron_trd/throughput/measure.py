"""Times a trainer's steps, then looks into one more of them with torch's profiler."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from megatron_trd.data.packing import stream_lengths
from megatron_trd.records import Sample
from megatron_trd.throughput.stopwatch import Stopwatch

GIB = 2**30
PARTS = ("pack", "teacher forward", "optimizer")
REST = "student forward and backward"


class Contender(Protocol):
    """What is measured."""

    device: torch.device
    watch: Stopwatch
    vocab_size: int

    def step(self, samples: Sequence[Sample]) -> tuple[float, int, int]:
        """Train on samples; return loss, micro-batches of a rank, tokens of both streams with their padding."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One measured step."""

    seconds: float
    """Of the slowest rank."""
    cpu_seconds: float
    """Of all threads of all ranks: what a CPU's other guests do not change."""
    parts: dict[str, float]
    """Seconds of each part, the mean over ranks; what is no part of its own is `REST`."""
    loss: float
    micro_batches: int
    """Of a rank."""
    tokens: int
    """Of both streams, over all ranks, without padding."""
    response_tokens: int
    padding_share: float
    """Of the tokens that were computed."""


def time_step(contender: Contender, samples: Sequence[Sample]) -> Step:
    """Run and time one step. Collective over all ranks."""
    contender.watch.lap()
    if dist.is_initialized():
        dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    loss, micro_batches, processed = contender.step(samples)
    contender.watch.wait()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    parts = {**dict.fromkeys(PARTS, 0.0), **contender.watch.lap()}
    parts[REST] = seconds - sum(parts.values())
    tokens = sum(sum(stream_lengths(sample)) for sample in samples)
    return Step(
        seconds=max(_of_all_ranks(seconds, contender.device)),
        cpu_seconds=sum(_of_all_ranks(cpu_seconds, contender.device)),
        parts={name: statistics.fmean(_of_all_ranks(part, contender.device)) for name, part in parts.items()},
        loss=loss,
        micro_batches=micro_batches,
        tokens=tokens,
        response_tokens=sum(len(sample.response_ids) for sample in samples),
        padding_share=1 - tokens / processed,
    )


def look_into(contender: Contender, samples: Sequence[Sample], trace: Path | None) -> dict[str, float]:
    """Run one step under the profiler; return what it tells. Collective over all ranks.

    On a CPU `peak_gib`: bytes of live tensors at their highest, of the rank that holds most. With more than one rank
    `communication_share`: of the step's seconds, those in which a collective was under way; mean over ranks.

    Args:
        trace: write a Chrome trace there.
    """
    device = contender.device
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    contender.watch.wait()
    held = live_bytes()
    with profile(activities=activities, profile_memory=device.type == "cpu") as seen:
        start = time.perf_counter()
        contender.step(samples)
        contender.watch.wait()
        seconds = time.perf_counter() - start
    contender.watch.lap()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(trace))
    events = seen.profiler.kineto_results.events()
    found = {}
    if device.type == "cpu":
        found["peak_gib"] = max(_of_all_ranks((held + _peak(events)) / GIB, device))
    if dist.is_initialized() and dist.get_world_size() > 1:
        found["communication_share"] = statistics.fmean(_of_all_ranks(_communicating(events) / seconds, device))
    return found


def cuda_peaks(device: torch.device) -> dict[str, float]:
    """Return the allocator's peaks since they were last reset, of the rank with the highest; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_gib": max(_of_all_ranks(torch.cuda.max_memory_allocated() / GIB, device)),
        "peak_reserved_gib": max(_of_all_ranks(torch.cuda.max_memory_reserved() / GIB, device)),
    }


def live_bytes() -> int:
    """Return the bytes of all tensors on a CPU that Python knows, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # Subclasses may have no memory: a compiler's fake tensors outlive it in its caches.
        if type(thing) in (Tensor, Parameter) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, least and greatest."""
    numbers = list(values)
    return {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}


def _peak(events: Iterable[Any]) -> int:
    """What the allocator handed out at its highest, beyond what was out before."""
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _communicating(events: Iterable[Any]) -> float:
    """Seconds covered by collectives: NCCL's kernels, or gloo's work."""
    spans = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in events
        if e.name().startswith(("gloo:", "ncclDevKernel", "ncclKernel"))
    )
    covered = end = 0
    for first, last in spans:
        covered += max(0, last - max(first, end))
        end = max(end, last)
    return covered / 1e9


def _of_all_ranks(value: float, device: torch.device) -> list[float]:
    if not dist.is_initialized():
        return [value]
    values = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    return values.tolist()
