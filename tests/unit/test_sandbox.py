"""The sandbox's own work: honest programs, threads, limits, and machines where it cannot hold."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_trd.tasks.sandbox import Job, Limits, Sandbox, SandboxError, jail, shared_sandbox
from sandboxes import sandbox_or_skip


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_or_skip()


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str | None]]:
    """Tools by name that are found in place of the machine's."""
    replaced: dict[str, str | None] = {}
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: replaced.get(name, which(name)))
    jail._tool.cache_clear()
    yield replaced
    jail._tool.cache_clear()


@pytest.fixture
def bwrap_script() -> Iterator[Callable[[str], str]]:
    """Makes a shell script that nobody may run too, which pytest's own folders do not allow."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "bwrap")

        def write(text: str) -> str:
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
            return str(path)

        yield write


def _job(program: str, **options: object) -> Job:
    return Job(files={"main.py": program.encode()}, **{"timeout_s": 30.0, **options})  # type: ignore[arg-type]


def test_a_program_reads_prints_and_ends(sandbox: Sandbox) -> None:
    text = "line\n" * 100_000
    finished = sandbox.run(_job("import sys\nprint(len(sys.stdin.read()))\nsys.exit(3)", stdin=text.encode()))
    assert (finished.ending, finished.status, finished.stdout) == ("exited", 3, f"{len(text)}\n".encode())


def test_sets_have_one_order(sandbox: Sandbox) -> None:
    program = "print({str(number) for number in range(50)})"
    first, second = sandbox.run_all([_job(program)] * 2)
    assert first.stdout == second.stdout != b""


def test_a_signal_is_the_status(sandbox: Sandbox) -> None:
    finished = sandbox.run(_job("import ctypes\nctypes.string_at(0)"))
    assert (finished.ending, finished.status) == ("exited", 128 + 11)


def test_records_start_the_clock_anew(sandbox: Sandbox) -> None:
    program = "import os, sys, time\nfor _ in range(4): time.sleep(0.6), os.write(int(sys.argv[1]), b'x\\n')"
    limit_s = 1.2 / sandbox.slowness
    assert sandbox.run(_job(program, timeout_s=limit_s, records=4)).records == (b"x",) * 4
    assert sandbox.run(_job(program, timeout_s=limit_s, records=1)).ending == "timeout"


def test_output_may_be_as_long_as_the_job_says(sandbox: Sandbox) -> None:
    program = "print('x' * (3 << 20), end='')"
    assert sandbox.run(_job(program)).ending == "output_limit"
    assert len(sandbox.run(_job(program, output_kib=4096)).stdout) == 3 << 20


def test_memory(sandbox: Sandbox) -> None:
    finished = sandbox.run(_job("bytearray(2 << 30)"))
    assert finished.stderr.rstrip().endswith(b"MemoryError")


def test_many_threads_share_the_workers(sandbox: Sandbox) -> None:
    """More callers than workers: results stay with their caller, and no more programs run than there are workers."""
    most, done = 0, threading.Event()
    me = psutil.Process()
    others = set(me.children())

    def count() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, len(set(me.children()) - others))

    counter = threading.Thread(target=count)
    counter.start()
    try:
        with ThreadPoolExecutor(8) as threads:
            results = threads.map(lambda number: sandbox.run(_job(f"print({number})")).stdout, range(24))
            assert list(results) == [f"{number}\n".encode() for number in range(24)]
    finally:
        done.set()
        counter.join()
    assert 1 <= most <= sandbox.num_workers


def test_run_all_ends_at_the_first_stop(sandbox: Sandbox) -> None:
    jobs = [_job(f"raise SystemExit({status})") for status in (0, 0, 5, 0, 0)]
    finished = list(sandbox.run_all(jobs, stop=lambda finished: finished.status != 0))
    assert [one.status for one in finished] == [0, 0, 5]


def test_no_bubblewrap_no_programs(tools: dict[str, str | None]) -> None:
    tools["bwrap"] = None
    with pytest.raises(
        SandboxError, match="bwrap is not installed; apt-get install bubblewrap .*unsafe-code-execution"
    ):
        Sandbox()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1", "setting up uid map: Permission denied"),
        ("echo 'bwrap: Unknown option --disable-userns' >&2; exit 1", "is older than 0.8; install a newer one"),
    ],
)
def test_a_bubblewrap_that_fails(
    script: str, message: str, tools: dict[str, str | None], bwrap_script: Callable[[str], str]
) -> None:
    tools["bwrap"] = bwrap_script(script)
    with pytest.raises(SandboxError, match=message):
        Sandbox()


def test_a_bubblewrap_that_does_not_hold(tools: dict[str, str | None], bwrap_script: Callable[[str], str]) -> None:
    """One that leaves out what closes the network and /dev."""
    edit = """
for word; do
  shift
  case "$word" in
    --unshare-all) set -- "$@" "$word" --share-net ;;
    --remount-ro) set -- "$@" --dir ;;
    *) set -- "$@" "$word" ;;
  esac
done
"""
    tools["bwrap"] = bwrap_script(f'{edit}exec {shutil.which("bwrap")} "$@"')
    with pytest.raises(SandboxError, match="does not hold .*host loopback: done.*write to /dev: "):
        Sandbox()


def test_no_interpreter() -> None:
    with pytest.raises(SandboxError, match="no Python for the programs .*/nowhere/python.*--code-python"):
        Sandbox(python="/nowhere/python")


def test_unsafe_is_said_aloud_and_still_limited(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        unsafe = Sandbox(unsafe=True, limits=Limits(output_kib=64))
    assert "WITHOUT a sandbox" in caplog.text
    me = psutil.Process()
    before = {*me.children(recursive=True)}
    finished = unsafe.run(
        _job("import os\nif os.fork() == 0:\n    import time\n    time.sleep(1000)\nprint(os.environ['HOME'])")
    )
    assert (finished.status, finished.stdout) == (0, b"/tmp\n")
    unsafe.slowness = 1.0
    assert unsafe.run(_job("while True: pass", timeout_s=0.3)).ending == "timeout"
    assert unsafe.run(_job("while True: print('x' * 1000)")).ending == "output_limit"
    assert unsafe.run(_job("bytearray(2 << 30)")).status == 1
    assert {*me.children(recursive=True)} == before


def test_it_belongs_to_its_process(sandbox: Sandbox) -> None:
    assert shared_sandbox() is shared_sandbox() is sandbox
    child = os.fork()
    if child == 0:
        os._exit(0 if shared_sandbox() is not sandbox else 1)
    assert os.waitpid(child, 0)[1] == 0
