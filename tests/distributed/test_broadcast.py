from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from launch import ROOT, run, spawn, torchrun
from megatron_trd.data.broadcast import broadcast_object, make_handout_group, run_on_rank_zero


def _hand_out(rank: int, world_size: int) -> tuple:
    group = make_handout_group(timeout_minutes=1)
    calls = []

    def prepare() -> dict[str, object]:
        calls.append(rank)
        return {"ids": torch.arange(5), "from": os.getpid(), "nothing": None}

    handout = run_on_rank_zero(prepare, group)
    last = broadcast_object(f"from {rank}", group, src=world_size - 1)
    return calls, handout["ids"].tolist(), handout["from"], last, run_on_rank_zero(lambda: None, group)


def test_every_rank_gets_what_rank_zero_made() -> None:
    results = spawn(_hand_out, 3)
    assert [calls for calls, *_ in results] == [[0], [], []]
    assert len({pid for _, _, pid, *_ in results}) == 1
    assert all(rest == ([0, 1, 2, 3, 4], results[0][2], "from 2", None) for _, *r in results for rest in [tuple(r)])


def _fail(rank: int, world_size: int, kind: str) -> tuple[str, str]:
    group = make_handout_group(timeout_minutes=1)

    def broken() -> object:
        if kind == "unpicklable":
            return lambda: None
        raise FileNotFoundError("no servers.json")

    try:
        run_on_rank_zero(broken, group)
    except Exception as error:
        seen = type(error).__name__, str(error)
    assert run_on_rank_zero(lambda: "still in step", group) == "still in step"
    return seen


def test_a_failure_of_rank_zero_reaches_every_rank() -> None:
    first, second = spawn(_fail, 2, "raises")
    assert first == ("FileNotFoundError", "no servers.json")
    assert second == ("RuntimeError", "rank 0 failed: FileNotFoundError: no servers.json")


def test_a_result_that_cannot_be_sent_does_not_hang() -> None:
    first, second = spawn(_fail, 2, "unpicklable")
    assert "pickle" in first[1] and second[0] == "RuntimeError" and "pickle" in second[1]


# The launcher itself: what it promises is what keeps the other tests from hanging.


def _one_rank_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise LookupError("rank one is broken")
    torch.distributed.barrier()


def _one_rank_dies(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    torch.distributed.barrier()


def _hang(rank: int, world_size: int) -> None:
    if rank == 0:
        torch.distributed.barrier()
    else:
        os.read(os.pipe()[0], 1)


def test_spawn_tells_who_failed() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: (?s:.*)LookupError: rank one is broken"):
        spawn(_one_rank_fails, 2)
    with pytest.raises(RuntimeError, match="rank 1 of 2: died with exit code 7"):
        spawn(_one_rank_dies, 2)


def test_spawn_ends_ranks_that_hang_and_shows_where() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)ranks .*1.* not done.*in _hang"):
        spawn(_hang, 2, timeout_s=10)
    assert time.monotonic() - start < 60


def test_torchrun_returns_output_and_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, torch.distributed as dist, megatron_trd, trd_kernels\n"
        "dist.init_process_group('gloo')\n"
        "box = [None] * dist.get_world_size()\n"
        "dist.all_gather_object(box, (dist.get_rank(), sys.argv[1], os.getcwd()))\n"
        "dist.get_rank() or print(box)\n"
        "dist.destroy_process_group()\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    done = torchrun(2, script, "word", "0")
    assert done.returncode == 0, done.stderr
    assert str([(0, "word", str(ROOT)), (1, "word", str(ROOT))]) in done.stdout
    assert torchrun(1, script, "word", "3").returncode != 0


def test_a_command_that_hangs_is_ended() -> None:
    with pytest.raises(TimeoutError, match="said this"):
        run([sys.executable, "-c", "import signal; print('said this', flush=True); signal.pause()"], timeout_s=5)
