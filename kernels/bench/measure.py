"""Time, extra memory and gradient errors of variants, taken in turns."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cases import Case, Exact, Settings, peaked_heads
from gemm_replay import Replay
from variants import VARIANTS, Job, UnavailableError

L2_FLUSH_BYTES = 256 * 2**20  # more than the second-level cache of any device

M_MMAP_THRESHOLD = -3  # of malloc.h
MAPPED_BYTES = 2**18


@dataclass(kw_only=True)
class Row:
    """One line of the table. None: not measured or without meaning for the variant."""

    variant: str
    objective: str
    head: str
    ms: float | None = None
    """Median of forward and backward together."""
    ms_min: float | None = None
    ms_max: float | None = None
    ratio: float | None = None
    """Of `ms` to that of `gemm-only` with the same chunks."""
    tflops: float | None = None
    """Useful operations by `ms`."""
    extra_mib: float | None = None
    """Peak during forward and backward above what was live before; returned gradients count."""
    dh_error: float | None = None
    dw_error: float | None = None
    product_flops: int | None = None
    """Of the products that `gemm-only` repeats."""
    error: str | None = None


@dataclass(kw_only=True)
class Entry:
    """A variant under way."""

    row: Row
    name: str
    case: Case
    job: Job
    times: list[float] = field(default_factory=list)

    def attempt(self, step: Callable[..., None], *args: Any) -> None:
        """Call `step(self, *args)` unless an earlier one failed; a failure becomes the row's error."""
        if self.row.error is not None:
            return
        try:
            step(self, *args)
        except Exception as error:
            self.row.error = describe(error)


def describe(error: Exception) -> str:
    """Return class and message."""
    return f"{type(error).__name__}: {error}"


def measure(variants: list[tuple[str, str, Case]]) -> tuple[list[Row], dict[str, str]]:
    """Measure (label, variant name, case) triples that share objective, head and data.

    Returns rows, and label -> reason of those that are unavailable.
    """
    case = variants[0][2]
    settings = case.settings
    if settings.compile:
        torch.compiler.reset()  # else one objective's graphs would count against the next one's limit
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than running eagerly without a word
    entries: list[Entry] = []
    skipped: dict[str, str] = {}
    for label, name, own_case in variants:
        row = Row(variant=label, objective=case.objective, head=case.head)
        entry = Entry(row=row, name=name, case=own_case, job=lambda: None)
        try:
            entry.job = VARIANTS[name](own_case)
        except UnavailableError as reason:
            skipped[label] = str(reason)
            continue
        except Exception as error:
            row.error = describe(error)
        entries.append(entry)

    _attempt_all(entries, _check, Exact.of(case))
    for _ in range(settings.warmup):
        _attempt_all(entries, _time)
    for entry in entries:
        entry.times.clear()
    for _ in range(settings.repeats):  # in turns, so that all variants meet the same disturbances
        _attempt_all(entries, _time)
    _attempt_all(entries, _measure_memory)
    _fill(entries)
    return [entry.row for entry in entries], skipped


def _attempt_all(entries: list[Entry], step: Callable[..., None], *args: Any) -> None:
    for entry in entries:
        entry.attempt(step, *args)


def _check(entry: Entry, exact: Exact) -> None:
    gradients = entry.job()
    if isinstance(entry.job, Replay):
        entry.row.product_flops = entry.job.flops
    if gradients is not None:
        entry.row.dh_error, entry.row.dw_error = (*exact.errors(gradients), None)[:2]


def _time(entry: Entry) -> None:
    """Add the milliseconds of one run."""
    device = entry.case.settings.device
    if device == "cpu":
        start = time.perf_counter()
        entry.job()
        entry.times.append((time.perf_counter() - start) * 1e3)
        return
    torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    entry.job()
    end.record()
    end.synchronize()
    entry.times.append(begin.elapsed_time(end))


def _fill(entries: list[Entry]) -> None:
    ideal = {}
    for entry in entries:
        row = entry.row
        if entry.times and row.error is None:
            row.ms, row.ms_min, row.ms_max = statistics.median(entry.times), min(entry.times), max(entry.times)
            row.tflops = entry.case.useful_flops / row.ms / 1e9
            if isinstance(entry.job, Replay):
                ideal[entry.case.settings.chunk] = row.ms
    for entry in entries:
        chunk = entry.case.settings.chunk
        if entry.row.ms is not None and chunk in ideal:
            entry.row.ratio = entry.row.ms / ideal[chunk]


def _measure_memory(entry: Entry) -> None:
    case = entry.case
    if isinstance(entry.job, Replay):
        return
    if case.settings.device == "cpu":
        # A process of its own: what another variant left in the allocator would hide what this one needs.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "trd_kernels"])  # slow to import
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            extra_mib = pool.submit(resident_extra_mib, entry.name, case.settings, case.objective, case.head).result()
        if isinstance(extra_mib, str):
            raise RuntimeError(extra_mib)
        entry.row.extra_mib = extra_mib
        return
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    entry.job()
    entry.row.extra_mib = (torch.cuda.max_memory_allocated() - before) / 2**20


def resident_extra_mib(name: str, settings: Settings, objective: str, head: str) -> float | str:
    """Return by how many MiB the resident set of this process rises in a run of the variant, or the error."""
    torch.set_num_threads(settings.threads)
    gc.freeze()  # nothing imported is garbage; looking through it takes long
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)  # else holes in the heap count, which vary by tens of MiB
    try:
        case = Case(settings=settings, objective=objective, head=head, heads=peaked_heads(settings))
        job = VARIANTS[name](case)
        job()  # compiles, and loads what is loaded once
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _status_mib("VmRSS")
        gradients = job()
        peak = _status_mib("VmHWM")
        del gradients
        return peak - before
    except Exception as error:
        return describe(error)


def _status_mib(name: str) -> float:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, name
    return int(match[1]) / 1024
