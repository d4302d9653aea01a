"""Programs that attack the machine they run on: each must be contained, and nothing may stay behind."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

from megatron_trd.tasks.sandbox import Finished, Job, Sandbox
from sandboxes import sandbox_or_skip

BECOME_REAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans become our children, so none can hide
SHORT_S = 0.3
SECRET = "do-not-read-me"

HELPERS = """
import ctypes, fcntl, os, resource, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def refused(action):
    try:
        result = action()
    except (OSError, ValueError, MemoryError):
        return True
    return result == -1
def fill(path, limit):
    total = 0
    try:
        for number in range(limit):
            with open(f"{path}/{number}", "wb", 0) as file:
                total += file.write(bytes(1 << 20))
    except OSError:
        pass
    return total >> 20
"""

REFUSED = {  # expression that must raise OSError (or the like), or return -1
    "the network": 'socket.create_connection(("192.0.2.1", 80), timeout=5)',
    "a name server": 'socket.getaddrinfo("example.org", 80)',
    "raw sockets": "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
    "packet sockets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "a file in /": 'open("/new", "w")',
    "a file in /work": 'open("/work/new", "w")',
    "its own program": 'open("/work/main.py", "a")',
    "a file in /usr": 'open("/usr/new", "w")',
    "a file in /dev": 'open("/dev/new", "w")',
    "a link in /work": 'os.symlink("/etc/passwd", "/work/link")',
    "removing its program": 'os.remove("/work/main.py")',
    "/etc/passwd": 'open("/etc/passwd")',
    "/etc/passwd by a link": '(os.symlink("/etc/passwd", "/tmp/link"), open("/tmp/link"))',
    "/root": 'os.listdir("/root")',
    "/home": 'os.listdir("/home")',
    "/sys": 'os.listdir("/sys")',
    "/proc/1/root": 'os.listdir("/proc/1/root/home")',
    "kernel settings": 'open("/proc/sys/kernel/core_pattern", "w")',
    "sysrq": 'open("/proc/sysrq-trigger", "w")',
    "kernel memory": 'open("/proc/kcore", "rb").read(64)',
    "the terminal": 'open("/dev/tty", "w")',
    "typing on standard input": 'fcntl.ioctl(0, 0x5412, b"x")',
    "typing on standard output": 'fcntl.ioctl(1, 0x5412, b"x")',
    "device files": 'os.mknod("/tmp/disk", 0o660 | 0o060000, os.makedev(254, 0))',
    "another root": 'os.chroot("/tmp")',
    "mounting": 'libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)',
    "remounting": 'libc.mount(b"none", b"/", None, 32, None)',
    "unmounting": 'libc.umount2(b"/work", 2)',
    "a user namespace": "libc.unshare(0x10000000)",
    "a user namespace by clone": "libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)",
    "a mount namespace": "libc.unshare(0x00020000)",
    "joining a namespace": 'libc.setns(os.open("/proc/1/ns/net", os.O_RDONLY), 0)',
    "becoming root": "os.setuid(0)",
    "another group": "os.setgid(0)",
    "tracing the first process": "libc.ptrace(16, 1, 0, 0)",
    "another process's memory": "libc.process_vm_readv(1, None, 0, None, 0, 0)",
    "memory of System V": "libc.shmget(0, 1 << 20, 0o1666)",
    "memory files": 'os.memfd_create("x")',
    "keys": 'libc.syscall(248, b"user", b"name", b"x", 1, -3)',
    "io_uring": "libc.syscall(425, 8, ctypes.create_string_buffer(256))",
    "bpf": "libc.syscall(321, 0, ctypes.create_string_buffer(128), 128)",
    "perf events": "libc.syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
    "user faults": "libc.syscall(323, 1)",
    "more processes": "resource.setrlimit(resource.RLIMIT_NPROC, (1 << 20, 1 << 20))",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "more time": "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "larger files": "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))",
    "more files": "resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))",
    "a higher priority": "os.nice(-5)",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "the host's name": 'socket.sethostname("x")',
    "128 MiB in one file": 'os.truncate(os.open("/tmp/file", os.O_CREAT | os.O_RDWR), 1 << 27)',
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """A program, and what must come of it."""

    program: str
    ending: str = "exited"
    printed: str | None = None


ATTACKS = {
    "an endless loop": Attack(program="while True: pass", ending="timeout"),
    "sleep": Attack(program="time.sleep(1000)", ending="timeout"),
    "ignored signals": Attack(
        program="for number in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(number, signal.SIG_IGN)\n"
        "print('ignored', flush=True)\nwhile True: time.sleep(1000)",
        ending="timeout",
        printed="ignored",
    ),
    "a stopped process": Attack(program="os.kill(os.getpid(), signal.SIGSTOP)", ending="timeout"),
    "a stopped first process": Attack(program="os.kill(1, signal.SIGSTOP)\nprint('on')", printed="on"),
    "killing everything": Attack(
        program="if os.fork() == 0: time.sleep(1000)\nos.kill(-1, signal.SIGKILL)\nprint('alone')", printed="alone"
    ),
    "killing the first process": Attack(program="os.kill(1, signal.SIGKILL)\nprint('alive')", printed="alive"),
    "another clock": Attack(program="time.time = time.monotonic = lambda: 0\nwhile True: pass", ending="timeout"),
    "a thread that outlives": Attack(
        program="threading.Thread(target=time.sleep, args=(1000,)).start()\nprint('main ends')",
        ending="timeout",
        printed="main ends",
    ),
    "a fork bomb": Attack(
        program="while True:\n    try: os.fork()\n    except OSError: pass",
        ending="timeout",
    ),
    "zombies": Attack(program="for _ in range(20):\n    if os.fork() == 0: os._exit(0)\nprint('left')", printed="left"),
    "a daemon": Attack(
        program="if os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0:\n        signal.signal(1, signal.SIG_IGN)\n        time.sleep(1000)\n"
        "    os._exit(0)\nos.wait()\nprint('gone')",
        printed="gone",
    ),
    "a daemon that keeps the output open": Attack(
        program="if os.fork() == 0:\n    os.setsid()\n    while True: os.write(1, b'x'), time.sleep(1)\nos._exit(0)"
    ),
    "threads without end": Attack(
        program="try:\n    for number in range(10000):\n"
        "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "except RuntimeError: print(number < 64, flush=True)\nos._exit(0)",
        printed="True",
    ),
    "memory of many processes": Attack(
        program="for _ in range(8):\n"
        "    if os.fork() == 0:\n        x = bytearray(400 << 20)\n        time.sleep(1000)\ntime.sleep(1000)",
        ending="memory",
    ),
    "a flood of output": Attack(program="while True: os.write(1, bytes(65536))", ending="output_limit"),
    "a flood of errors": Attack(program="while True: os.write(2, bytes(65536))", ending="output_limit"),
    "a full /tmp": Attack(program="print(16 < fill('/tmp', 400) <= 64)", printed="True"),
    "a full /dev/shm": Attack(program="print(fill('/dev/shm', 400) <= 16)", printed="True"),
    "every descriptor": Attack(
        program="for number in range(3, 4096):\n"
        "    try: os.write(number, b'{\"exit-code\": 0}')\n    except OSError: pass\n"
        "os.closerange(0, 4096)\nos._exit(7)"
    ),
    "the environment": Attack(
        program="for pid in filter(str.isdigit, os.listdir('/proc')): print(open(f'/proc/{pid}/environ').read())"
    ),
    "the command lines": Attack(
        program="for pid in filter(str.isdigit, os.listdir('/proc')): print(open(f'/proc/{pid}/cmdline').read())"
    ),
    "the processes": Attack(program="print(sum(map(str.isdigit, os.listdir('/proc'))))", printed="2"),
    "the folders": Attack(program="print(*sorted({*os.listdir('/')} - {'lib32', 'libx32', 'sbin', 'etc'}))"),
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox_or_skip()
    made = Sandbox()
    made.slowness = 1.0  # what never ends need not run for longer on a slow machine
    prctl = ctypes.CDLL(None).prctl
    assert prctl(BECOME_REAPER, 1, 0, 0, 0) == 0
    before, descriptors = {*psutil.Process().children(recursive=True)}, len(os.listdir("/proc/self/fd"))
    yield made
    left = {*psutil.Process().children(recursive=True)} - before  # zombies too
    prctl(BECOME_REAPER, 0, 0, 0, 0)
    assert not left
    assert len(os.listdir("/proc/self/fd")) == descriptors


def _run(sandbox: Sandbox, program: str, *, timeout_s: float = 20.0) -> Finished:
    return sandbox.run(Job(files={"main.py": (HELPERS + program).encode()}, timeout_s=timeout_s))


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, sandbox: Sandbox) -> None:
    finished = _run(sandbox, f"print(refused(lambda: {REFUSED[what]}))")
    assert (finished.ending, finished.stdout.strip()) == ("exited", b"True"), finished


@pytest.mark.parametrize("what", ATTACKS)
def test_contained(what: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRD_SECRET", SECRET)
    attack = ATTACKS[what]
    finished = _run(sandbox, attack.program, timeout_s=SHORT_S if attack.ending == "timeout" else 20)
    assert finished.ending == attack.ending, finished
    if attack.printed is not None:
        assert finished.stdout.decode().strip() == attack.printed
    assert SECRET.encode() not in finished.stdout and str(os.getpid()).encode() not in finished.stdout


def test_the_machine_looks_empty(sandbox: Sandbox) -> None:
    assert (
        _run(sandbox, ATTACKS["the folders"].program).stdout.split() == b"bin dev lib lib64 proc tmp usr work".split()
    )


def test_services_of_this_machine_are_out_of_reach(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"\0trd-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        port = server.getsockname()[1]
        program = f"""
print(refused(lambda: socket.create_connection(("127.0.0.1", {port}), timeout=5)))
print(refused(lambda: socket.socket(socket.AF_UNIX).connect({name!r})))"""
        assert _run(sandbox, program).stdout.split() == [b"True", b"True"]


def test_jobs_do_not_see_each_other(sandbox: Sandbox) -> None:
    wrote = _run(sandbox, "for path in ('/tmp/note', '/dev/shm/note'): print(open(path, 'w').write('note'))")
    assert wrote.stdout.split() == [b"4", b"4"]
    assert _run(sandbox, "print(os.listdir('/tmp'), os.listdir('/dev/shm'))").stdout.strip() == b"[] []"
    assert not os.path.exists("/tmp/note")


def test_recursion_without_end(sandbox: Sandbox) -> None:
    finished = _run(
        sandbox, "sys.setrecursionlimit(10**9)\ndef down(n): return repr([down(n + 1)])\ndown(0)", timeout_s=SHORT_S
    )
    assert finished.ending != "failed" and (finished.ending != "exited" or finished.status != 0)


def test_a_program_cannot_pass_for_a_broken_sandbox(sandbox: Sandbox) -> None:
    """A broken one would leave the program without a verdict."""
    finished = _run(sandbox, "print('bwrap: Creating new namespace failed', file=sys.stderr)\nos._exit(1)")
    assert (finished.ending, finished.status) == ("exited", 1)
