"""Starts several processes for a test and never hangs: every call has a deadline."""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
# A server that has imported torch forks the ranks: they start in milliseconds and inherit no threads.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "transformers", "megatron_trd.job"])


def spawn(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run `fn(rank, world_size, *args)` in gloo processes on the CPU; return what each rank returned.

    `fn` must be a function at the top of its module, `args` and the results must be picklable.

    Raises:
        RuntimeError: a rank raised or died; carries the tracebacks of all ranks that failed.
        TimeoutError: not done after `timeout_s`; carries the stacks of the ranks that hang.
    """
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # which the ranks inherit from the server
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as scratch:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            call = (rank, world_size, scratch, timeout_s, sender, fn, args)
            process = _CONTEXT.Process(target=_rank_main, args=call)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            results = _collect(pipes, processes, timeout_s, Path(scratch))
            for process in processes:
                process.join(20)  # lets a rank end its own children
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def torchrun(
    nproc: int, *args: str | Path, timeout_s: float = 120.0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node nproc *args` to its end; return its exit code, stdout and stderr.

    Args:
        args: a script, or `-m`, a module, and their arguments.
        env: variables on top of this process's.

    Raises:
        TimeoutError: not done after `timeout_s`; carries the end of its output.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
    return run([sys.executable, *launcher, str(nproc), *map(str, args)], timeout_s=timeout_s, env=env)


def run(
    command: Sequence[str], *, timeout_s: float = 120.0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command from the project's root in a process group of its own; see `torchrun`."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # also on a machine with CUDA: two ranks cannot share one GPU
        }
        | dict(env or {})
    )
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=out, stderr=err, text=True, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    if code is None:
        raise TimeoutError(f"not done after {timeout_s} s: {' '.join(command)}\n" + "".join(t[-4000:] for t in texts))
    return subprocess.CompletedProcess(list(command), code, *texts)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and what it started: torchrun ends its workers on TERM; KILL is for what is left."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _rank_main(
    rank: int,
    world_size: int,
    scratch: str,
    timeout_s: float,
    sender: Connection,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    with open(f"{scratch}/stack{rank}", "w") as stack:
        faulthandler.dump_traceback_later(0.9 * timeout_s, file=stack)
        try:
            torch.set_num_threads(1)
            deadline = timedelta(seconds=timeout_s)
            store = f"file://{scratch}/store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=deadline)
            # Plain pickle: multiprocessing's own would pass tensors as handles that die with this process.
            message = (True, pickle.dumps(fn(rank, world_size, *args)))
        except BaseException:
            message = (False, traceback.format_exc())
        sender.send(message)
        if message[0]:
            dist.barrier()  # nobody leaves while another may still read from it
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def _collect(pipes: list[Connection], processes: list[Any], timeout_s: float, scratch: Path) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_s
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                processes[rank].join()
                ok, value = False, f"died with exit code {processes[rank].exitcode}\n"
            if ok:
                results[rank] = pickle.loads(value)
            else:
                if not failures:  # its peers fail next, or hang: give them a moment to tell
                    deadline = min(deadline, time.monotonic() + 1.0)
                failures[rank] = value
        if not ready and waiting:
            if failures:
                break
            stacks = "\n".join(f"rank {r}:\n{(scratch / f'stack{r}').read_text()}" for r in waiting.values())
            raise TimeoutError(f"ranks {sorted(waiting.values())} not done after {timeout_s} s\n{stacks}")
    if failures:
        raise RuntimeError("\n".join(f"rank {r} of {len(pipes)}: {text}" for r, text in failures.items()))
    return [results[rank] for rank in range(len(pipes))]
