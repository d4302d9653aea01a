"""Main of a worker process: answers one comparison after the other until its connection closes."""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

_GRACE_S = 2.0
_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def main(descriptor: int, deadline_s: float, memory_gib: float) -> None:
    """Serve comparisons on an inherited connection.

    A request is `{"rule": "expressions" | "amo", ...}`, its reply `{"equal": bool}` or `{"error": str}`. The first
    message, `{"ready": true}`, follows the imports, which take seconds. The kernel ends a process whose request
    outlives its deadline, so none stays behind a parent that was killed.

    Args:
        descriptor: file descriptor of the duplex connection.
        deadline_s: seconds that the parent waits for a reply.
        memory_gib: address space of the process.
    """
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that somebody else must watch the time
    sys.set_int_max_str_digits(0)
    connection = Connection(descriptor)
    rules = _load_rules()
    connection.send_bytes(b'{"ready": true}')
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, deadline_s + _GRACE_S)
        try:
            reply: dict[str, object] = {"equal": rules[request.pop("rule")](**request)}
        except _FAILURES as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(reply).encode())


def _load_rules() -> dict[str, Callable[..., bool]]:
    from megatron_trd.tasks.math_problems.amo import equal_by_amo
    from megatron_trd.tasks.math_problems.compare import equal_answers
    from megatron_trd.tasks.math_problems.symbolic import equal_expressions

    def equal_by_algebra(gold: str, answer: str) -> bool:
        return bool(equal_answers(gold, answer, equal_expressions))

    return {"expressions": equal_by_algebra, "amo": equal_by_amo}
