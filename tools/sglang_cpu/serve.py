"""SGLang where there is no GPU: `python serve.py FLAGS` is `python -m sglang.launch_server FLAGS` with stand-ins.

SGLang as the package index has it runs on a CPU but for six things. They are put right here and in sgl_kernel/ beside
this file, where Python looks first; SGLang itself stays as it came.

1. Of its kernel package there is no CPU wheel: sgl_kernel/ has the one function that plain-torch paths call.
2. torchvision's wheel is built for CUDA. Beside another torch its operators are missing and its import fails for want
   of their names: they are declared.
3. LoRA asks for pinned memory, which takes an accelerator: without one it gets ordinary memory.
4. /weights_checker waits for CUDA's work to end: there is none to wait for.
5. The CPU engine is chosen by the environment, and so are the cores of each tensor-parallel rank.
6. Scheduler and detokenizer would each import everything anew. A process that has touched no accelerator can be forked
   instead, which nearly halves the start.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import runpy
from collections.abc import Callable
from typing import Any

import torch

FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "ones_like", "full_like")


def choose_cpu_engine(num_ranks: int) -> None:
    """Set the environment that SGLang's CPU engine reads; what is set already holds.

    Args:
        num_ranks: processes that share the cores; SGLang asks for a division where they are more than NUMA nodes.
    """
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    if num_ranks > 1:
        cores = sorted(os.sched_getaffinity(0))
        groups = [cores[rank::num_ranks] or [cores[rank % len(cores)]] for rank in range(num_ranks)]
        binding = "|".join(",".join(map(str, group)) for group in groups)
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding)


def declare_torchvision_operators() -> torch.library.Library:
    """Declare the two operators that `import torchvision` looks up; the declaration lives as long as the result."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def leave_memory_unpinned() -> None:
    """Make `pin_memory` a no-op."""

    def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            return make(*args, **kwargs)

        return made

    for name in FACTORIES:
        setattr(torch, name, unpinned(getattr(torch, name)))
    setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor)  # noqa: B010


def wait_for_no_cuda() -> None:
    """Make `torch.cuda.synchronize` a no-op."""
    torch.cuda.synchronize = lambda device=None: None


def fork_workers() -> None:
    """Fork where SGLang asks for a fresh interpreter."""
    choose = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: choose("fork", force)


if __name__ == "__main__":
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--tensor-parallel-size", "--tp-size", "--tp", type=int, default=1, dest="tp")
    choose_cpu_engine(flags.parse_known_args()[0].tp)
    operators = declare_torchvision_operators()
    if not torch.accelerator.is_available():
        leave_memory_unpinned()
        wait_for_no_cuda()
        fork_workers()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
