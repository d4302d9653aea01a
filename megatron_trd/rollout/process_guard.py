"""Runs a command that must not outlive whoever started it; the standard library alone.

    python -IS process_guard.py GRACE_SECONDS COMMAND...

Standard input is a pipe whose other end the starter holds. When it closes, because the starter is dead (of `kill -9`
too), or on SIGTERM, the command gets SIGTERM and after the grace its process group SIGKILL. If the guard itself is
killed, the kernel kills the command with it. The starter could not ask that of the kernel for itself: it would hold for
the thread that starts the command, and threads end earlier.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def main() -> int:
    """Run the command to its end; return its exit status, 128 + n for signal n."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_guard)

    def end(*_: Any) -> None:
        server.terminate()
        force = threading.Timer(grace_s, os.killpg, (server.pid, signal.SIGKILL))
        force.daemon = True
        force.start()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    status = server.wait()
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)  # what the server left behind
    return status if status >= 0 else 128 - status


def _die_with_guard() -> None:
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_starter() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
