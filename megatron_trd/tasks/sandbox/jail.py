"""The command line that runs one job: in bubblewrap, or with nothing but resource limits."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from megatron_trd.tasks.sandbox.job import Job, Limits, SandboxError

NOBODY = 65534
WORK = "/work"
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # one order of sets in every process
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
PYTHON_FLAGS = ("-s", "-B")  # -I would ignore the hash seed, and -S would remove exit() and quit()

_DESCRIBE = "import json, sys; print(json.dumps([sys.executable, sys.prefix, sys.base_prefix]))"
_FOLDERS = ("lib", "lib64", "lib32", "libx32", "bin", "sbin")
_OPTIONAL = ("/etc/ld.so.cache", "/etc/alternatives")  # where shared libraries lie
_UNCOUNTED = 1 << 16
_SHELL = '"$@"; exit $?'  # a first process that is not the program: signals keep their usual meaning for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """The Python that runs the programs."""

    executable: str
    folders: tuple[str, ...]
    """What it needs outside of /usr."""


def find_interpreter(python: str | None) -> Interpreter:
    """Locate an interpreter that a process without privileges can run.

    Args:
        python: its path; None = the system's, then the running one.

    Raises:
        SandboxError: there is none.
    """
    candidates = [python] if python else ["/usr/bin/python3", "/usr/local/bin/python3", sys.executable]
    failures = []
    for candidate in candidates:
        command = [*_as_nobody(), candidate, "-s", "-c", _DESCRIBE]
        try:
            done = subprocess.run(command, env=ENVIRONMENT, cwd="/", capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            failures.append(f"{candidate}: {error}")
            continue
        if done.returncode == 0:
            executable, *prefixes = json.loads(done.stdout)
            folders = {folder for folder in prefixes if not Path(folder).is_relative_to("/usr")}
            return Interpreter(executable=executable, folders=tuple(sorted(folders)))
        failures.append(f"{candidate}: {done.stderr.decode(errors='replace').strip()[-200:]}")
    raise SandboxError(
        f"code sandbox: no Python for the programs ({'; '.join(failures)}); install python3 with the system's package "
        "manager, or give --code-python one that every user may read"
    )


def bubblewrap_command(
    job: Job, limits: Limits, python: Interpreter, *, files: Mapping[str, int], status: int, seccomp: int | None
) -> list[str]:
    """Return the command that runs `job` in namespaces of its own, with nothing of this machine but /usr.

    Needs bubblewrap 0.8 and util-linux. The files come from descriptors, so nothing is written on this machine. A shell
    is the first process inside: when it ends the kernel kills whatever the program left behind, and bubblewrap waits
    for it, so no zombie stays on machines whose first process reaps none.

    Args:
        files: name -> descriptor of each file of the job.
        status: descriptor for bubblewrap's report: process id of the first process, exit status.
        seccomp: descriptor of the filter of system calls.
    """
    megabyte = 2**20
    return [
        *_as_nobody(),
        *(
            _tool("bwrap"),
            "--unshare-all",
            "--unshare-user",
            "--uid",
            str(NOBODY),
            "--gid",
            str(NOBODY),
            "--disable-userns",
        ),
        *("--die-with-parent", "--new-session", "--as-pid-1", "--clearenv", "--hostname", "sandbox"),
        *(word for name, value in ENVIRONMENT.items() for word in ("--setenv", name, value)),
        *("--ro-bind", "/usr", "/usr", *_system_folders()),
        *(word for path in _OPTIONAL for word in ("--ro-bind-try", path, path)),
        *("--proc", "/proc", "--dev", "/dev"),
        *("--size", str(4 * limits.file_mib * megabyte), "--tmpfs", "/tmp"),
        *("--size", str(limits.file_mib * megabyte), "--tmpfs", "/dev/shm"),
        *(word for folder in python.folders for word in ("--ro-bind", folder, folder)),  # some lie in /tmp
        *(word for name, descriptor in files.items() for word in ("--file", str(descriptor), f"{WORK}/{name}")),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--cap-drop", "ALL"),
        *("--json-status-fd", str(status)),
        *(("--seccomp", str(seccomp)) if seccomp is not None else ()),
        *("--", "sh", "-c", _SHELL, "sh", *_limited(job, limits), python.executable, *PYTHON_FLAGS, f"{WORK}/main.py"),
    ]


def unsafe_command(job: Job, limits: Limits, python: Interpreter, *, folder: str) -> list[str]:
    """Return the command that runs `job` from `folder` with resource limits and nothing else."""
    if os.geteuid() != 0:
        limits = replace(limits, processes=_UNCOUNTED)  # it would count whatever else the user runs
    return [*_as_nobody(), *_limited(job, limits), python.executable, *PYTHON_FLAGS, f"{folder}/main.py"]


@lru_cache
def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        package = "bubblewrap" if name == "bwrap" else "util-linux"
        raise SandboxError(
            f"code sandbox: {name} is not installed; apt-get install {package} (as root), or run programs that you "
            "trust with --unsafe-code-execution"
        )
    return path


def _as_nobody() -> list[str]:
    """Root gives up its privileges, because the kernel never limits root's number of processes."""
    if os.geteuid() != 0:
        return []
    return [_tool("setpriv"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


def _limited(job: Job, limits: Limits) -> list[str]:
    """Set inside: a limit on processes counts those of the sandbox alone, whatever else the user runs."""
    memory_mib = max(limits.memory_mib, job.memory_mib)
    cpu_s = math.ceil(job.timeout_s * max(1, job.records)) + 1
    return [
        *(_tool("prlimit"), f"--cpu={cpu_s}:{cpu_s + 1}", f"--as={memory_mib * 2**20}", "--core=0"),
        *(f"--nproc={limits.processes}", f"--fsize={limits.file_mib * 2**20}", f"--nofile={limits.open_files}"),
    ]


def _system_folders() -> list[str]:
    words: list[str] = []
    for name in _FOLDERS:
        path = Path("/", name)
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    return words
