"""Compare `linear_kl_div` with the dense formula: time, extra memory and gradient error against fp64.

    PYTHONPATH=kernels python kernels/bench/bench_linear_kl.py --tokens 512 --vocab-size 32000

Runs on the CPU. Memory is the rise of the process's peak resident set, so each variant has a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

from trd_kernels import linear_kl_div, linear_kl_div_reference

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Inputs, argparse.Namespace], Tensor]


def peaked_inputs(args: argparse.Namespace) -> Inputs:
    """Return heads and hidden states whose distributions are peaked and close to each other."""
    g = torch.Generator().manual_seed(0)
    head = torch.randn(args.vocab_size, args.hidden, generator=g) * (3.0 / args.hidden**0.5)
    picks = torch.randint(args.vocab_size, (args.tokens,), generator=g)
    base = torch.randn(args.tokens, args.hidden, generator=g) + 1.3 * head[picks]
    return base + 0.05 * torch.randn(base.shape, generator=g), head, base, head.clone()


def chunked(inputs: Inputs, args: argparse.Namespace) -> Tensor:
    """The operator of this package."""
    return linear_kl_div(
        *inputs, vocab_size=args.vocab_size, divergence=args.divergence, workspace_mb=args.workspace_mb
    ).loss


def dense(inputs: Inputs, args: argparse.Namespace) -> Tensor:
    """The textbook formula over `[N, V]` in fp32."""
    dtype = torch.float32
    return linear_kl_div_reference(*inputs, vocab_size=args.vocab_size, divergence=args.divergence, dtype=dtype).loss


VARIANTS: dict[str, Loss] = {"chunked": chunked, "dense": dense}


def input_gradient(loss: Loss, inputs: Inputs, args: argparse.Namespace) -> Tensor:
    """Run forward and backward with a frozen head and return the gradient of the student's hidden states."""
    hidden = inputs[0].clone().requires_grad_()
    loss((hidden, *inputs[1:]), args).backward()
    return hidden.grad


def exact_gradient(inputs: Inputs, args: argparse.Namespace, rows: int = 64) -> Tensor:
    """Return the same in fp64 for the first rows (rows do not interact)."""
    hidden, head, teacher, teacher_head = inputs
    cut = (hidden[:rows].double().requires_grad_(), head, teacher[:rows], teacher_head)
    linear_kl_div_reference(*cut, vocab_size=args.vocab_size, divergence=args.divergence).loss.backward()
    return cut[0].grad


def measure(name: str, args: argparse.Namespace) -> tuple[float, float, float]:
    """Return milliseconds (median of `--repeats`), extra MiB, relative error of the gradient."""
    torch.set_num_threads(args.threads)
    inputs = peaked_inputs(args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        gradient = input_gradient(VARIANTS[name], inputs, args)
        times.append((time.perf_counter() - start) * 1e3)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    want = exact_gradient(inputs, args)
    error = (gradient[: len(want)].double() - want).norm() / want.norm()
    return sorted(times)[len(times) // 2], extra, float(error)


def main() -> None:
    """Print one line per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--workspace-mb", type=float, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{'variant':<10}{'ms':>10}{'extra MiB':>12}{'dH error':>12}")
    context = multiprocessing.get_context("spawn")
    for name in VARIANTS:
        with context.Pool(1) as pool:
            milliseconds, extra, error = pool.apply(measure, (name, args))
        print(f"{name:<10}{milliseconds:>10.0f}{extra:>12.0f}{error:>12.1e}")


if __name__ == "__main__":
    main()
