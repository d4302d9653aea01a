"""Compare `linear_kl_div` with its ideal and its rivals: time, memory and gradient error in one table.

    PYTHONPATH=kernels python kernels/bench/bench_linear_kl.py --json table.json

Every variant computes the sum of the token divergences of the same peaked data and its gradients. `gemm-only` repeats
the matrix products of `ours` alone and is what `ratio` refers to. Errors are relative Frobenius norms against fp64.
Variants take turns, run by run. Ends with 1 if a variant raised an error; one that is not available is only reported.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from cases import HEADS, OBJECTIVES, TOP_K, Case, Chunk, Heads, Settings, mean_kl, peaked_heads
from measure import Row, measure
from variants import VARIANTS

from trd_kernels import DEFAULT_WORKSPACE_MB

_H200 = {"tokens": 8192, "student_hidden": 2048, "teacher_hidden": 4096}
PRESETS: dict[str, dict[str, Any]] = {
    "small-cpu": {
        "tokens": 2048,
        "vocab_size": 32000,
        "student_hidden": 256,
        "teacher_hidden": 256,
        "workspace_mb": 96.0,
    },
    "h200": _H200 | {"vocab_size": 151936},
    # One rank's share of the vocabulary and of the workspace, on one GPU.
    "h200-tp4": _H200 | {"vocab_size": 38016, "workspace_mb": DEFAULT_WORKSPACE_MB / 4},
    "h200-tp8": _H200 | {"vocab_size": 19072, "workspace_mb": DEFAULT_WORKSPACE_MB / 8},
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = (  # title, width, field of Row, format
    ("variant", -22, "variant", "s"),
    ("objective", -11, "objective", "s"),
    ("head", -10, "head", "s"),
    ("ms", 10, "ms", ".2f"),
    ("ratio", 8, "ratio", ".2f"),
    ("TFLOP/s", 9, "tflops", ".3g"),
    ("extra MiB", 11, "extra_mib", ".0f"),
    ("dH error", 10, "dh_error", ".1e"),
    ("dW error", 10, "dw_error", ".1e"),
)


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated names out of `known`."""
    known = list(known)

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; known: {', '.join(known)}")
        return chosen

    return parse


def chunk_size(text: str) -> Chunk:
    """Parse "512" or "512:2048"."""
    sizes = text.split(":")
    if len(sizes) > 2 or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is neither TOKENS nor LOGITS_TOKENS:GRADIENT_TOKENS")
    return int(text) if len(sizes) == 1 else (int(sizes[0]), int(sizes[1]))


def chunk_text(chunk: Chunk | None) -> str:
    """Write it as it is parsed."""
    return "default" if chunk is None else ":".join(map(str, chunk if isinstance(chunk, tuple) else (chunk,)))


def chunk_sizes(text: str) -> list[Chunk]:
    """Parse a comma-separated list of them."""
    return [chunk_size(part) for part in text.split(",")]


def parse_arguments() -> tuple[argparse.Namespace, Settings]:
    """Read the command line; what it leaves open comes from the preset and the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="shape (small-cpu on a CPU, h200 on CUDA)")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--student-hidden", type=int)
    parser.add_argument("--teacher-hidden", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on CUDA, fp32 on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--variants", type=names(VARIANTS), default=list(VARIANTS), metavar="NAME,...")
    parser.add_argument("--objectives", type=names(OBJECTIVES), default=list(OBJECTIVES), metavar="NAME,...")
    parser.add_argument("--heads", type=names(HEADS), default=list(HEADS), metavar="NAME,...")
    parser.add_argument("--workspace-mb", type=float, help="of ours")
    parser.add_argument("--chunk", type=chunk_size, metavar="C|C_L:C_G", help="of ours, in tokens")
    parser.add_argument(
        "--sweep-chunks", type=chunk_sizes, metavar="C_L:C_G,...", help="only ours and gemm-only, with each of these"
    )
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="chunks and liger-chunked run eagerly, naive-compiled not at all: for trying things out",
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--error-rows", type=int, default=256, help="rows whose dH is compared with fp64")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table there as well")
    args = parser.parse_args()

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device == "cpu"
    preset = PRESETS[args.preset or ("small-cpu" if on_cpu else "h200")]
    given = {name: x for name, x in vars(args).items() if x is not None}
    values = {"workspace_mb": None, "chunk": None, "dtype": "fp32" if on_cpu else "bf16"} | preset | given
    values |= {"device": device, "dtype": DTYPES[values["dtype"]]}
    settings = Settings(**{field.name: values[field.name] for field in fields(Settings)})
    for name in ("tokens", "vocab_size", "student_hidden", "teacher_hidden", "threads", "repeats", "error_rows"):
        if values[name] < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1, is {values[name]}")
    if "top_k" in args.objectives and settings.vocab_size < TOP_K:
        parser.error(f"argument --vocab-size: top_k takes {TOP_K} ids, there are only {settings.vocab_size}")
    return args, settings


def describe(settings: Settings, heads: Heads) -> dict[str, Any]:
    """Return what a reader has to know about the machine and the data."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": cpu if settings.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "liger": version("liger-kernel"),
        "date": datetime.date.today().isoformat(),
        "mean_kl": mean_kl(settings, heads),
    }


def print_header(settings: Settings, facts: dict[str, Any]) -> None:
    """Print machine, shape and the columns' titles."""
    s = settings
    print(", ".join(f"{name} {x}" for name, x in facts.items() if name != "mean_kl") + f", threads {s.threads}")
    print(
        f"N {s.tokens}, V {s.vocab_size}, Hs {s.student_hidden}, Ht {s.teacher_hidden}, {s.dtype}, seed {s.seed}, "
        f"workspace MiB {s.workspace_mb or 'default'}, chunk {chunk_text(s.chunk)}, compile {s.compile}, "
        f"mean KL {facts['mean_kl']:.3g} nats"
    )
    print("".join(f"{title:{'<' if width < 0 else '>'}{abs(width)}}" for title, width, _, _ in COLUMNS), flush=True)


def print_row(row: Row) -> None:
    """Print a line of the table; the error instead of numbers where there is one."""
    cells = []
    for _, width, name, form in COLUMNS:
        value = getattr(row, name)
        text = "-" if value is None else format(value, form)
        cells.append(f"{text:{'<' if width < 0 else '>'}{abs(width)}}")
    print("".join(cells[:3]) + "  " + row.error.splitlines()[0] if row.error else "".join(cells), flush=True)


def variants_of(args: argparse.Namespace, case: Case) -> list[tuple[str, str, Case]]:
    """Return (label, variant name, case) of every row that is asked for."""
    if args.sweep_chunks is None:
        return [(name, name, case) for name in args.variants]
    return [
        (f"{name} {chunk_text(chunk)}", name, replace(case, settings=replace(case.settings, chunk=chunk)))
        for chunk in args.sweep_chunks
        for name in ("gemm-only", "ours")
    ]


def main() -> int:
    """Print the table and return the exit code."""
    args, settings = parse_arguments()
    torch.set_num_threads(settings.threads)
    heads = peaked_heads(settings)
    facts = describe(settings, heads)
    print_header(settings, facts)
    rows: list[Row] = []
    skipped: list[dict[str, str]] = []
    for objective, head in itertools.product(args.objectives, args.heads):
        case = Case(settings=settings, objective=objective, head=head, heads=heads)
        new_rows, reasons = measure(variants_of(args, case))
        for row in new_rows:
            print_row(row)
        for variant, reason in reasons.items():
            print(f"skipped {variant}, {objective}, {head}: {reason}", flush=True)
            skipped.append({"variant": variant, "objective": objective, "head": head, "reason": reason})
        rows += new_rows
        if args.json is not None:  # each time, so that a run cut short leaves what it measured
            table = {
                "settings": asdict(settings) | {"dtype": str(settings.dtype)},
                **facts,
                "rows": [asdict(row) for row in rows],
                "skipped": skipped,
            }
            args.json.write_text(json.dumps(table, indent=1) + "\n")
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
