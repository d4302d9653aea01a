"""The sandbox of the tests that run programs; they are skipped where the machine has none, not where ours is broken."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from megatron_trd.tasks.sandbox import Sandbox, shared_sandbox


def sandbox_or_skip() -> Sandbox:
    """Return the sandbox that this process shares; skip the test where bubblewrap is missing or not allowed."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    command = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--ro-bind", "/", "/", "true"]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if plain.returncode != 0:
        pytest.skip(f"bubblewrap does not work here: {plain.stderr.strip()}")
    return shared_sandbox()
