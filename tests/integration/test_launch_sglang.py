"""tools/launch_sglang.py and its servers: real SGLang on a CPU, from start to end, and what ends it too early."""

from __future__ import annotations

import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_trd.rollout.server_process import GUARD, ServerProcess, is_free, running, start_sglang

LAUNCHER = Path(__file__).parents[2] / "tools/launch_sglang.py"
DEADLINE_S = 300.0  # of anything awaited here, on a machine that has other work too
PROMPT = [3, 20, 66, 70]


class Launcher:
    """The tool as a child process; what it says can be awaited."""

    def __init__(self, *flags: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, LAUNCHER, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.said: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the match with the next line that has it."""
        end = time.monotonic() + DEADLINE_S
        while line := self._lines.get(timeout=max(0.0, end - time.monotonic())):
            self.said.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"it ended before it said {pattern!r}:\n{''.join(self.said)}")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def server(self, port: str) -> psutil.Process:
        """SGLang's main process on a port: the child of its guard."""
        guards = psutil.Process(self.process.pid).children()
        (server,) = next(guard for guard in guards if port in guard.cmdline()).children()
        return server


@pytest.fixture
def launch() -> Iterator[Any]:
    launchers: list[Launcher] = []

    def start(*flags: str | Path) -> Launcher:
        launchers.append(Launcher(*flags))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.process.terminate()
        launcher.process.wait(DEADLINE_S)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=DEADLINE_S)[1]


def ask(url: str, body: dict[str, Any] | None = None, key: str = "") -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None)
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


@torch.no_grad()
def test_two_servers_from_launch_to_end(
    launch: Any, sglang_python: Path, student_dir: Path, hf_student: torch.nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("open sesame\n")
    launcher = launch(
        *("--model-path", student_dir, "--device", "cpu", "--python", sglang_python, "--num-servers", "2", "--restart"),
        *("--urls-file", tmp_path / "urls", "--log-dir", tmp_path / "logs", "--api-key-file", tmp_path / "key"),
        *("--weight-version", "first", "--lora-rank", "8", "--random-seed", "4321"),
    )
    urls = [launcher.wait_for(r"^student (http://127.0.0.1:\d+)$")[1] for _ in range(2)]
    assert (tmp_path / "urls").read_text().split() == urls
    assert len(set(urls)) == 2
    expected = hf_student(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 1},
        "return_logprob": True,
    }

    def check(url: str) -> None:
        meta = ask(f"{url}/generate", body, "open sesame")["meta_info"]
        ((logprob, token, _),) = meta["output_token_logprobs"]
        assert token == int(expected.argmax())
        assert logprob == pytest.approx(float(expected.max()), abs=1e-4)
        assert meta["weight_version"] == "first"

    for url in urls:
        check(url)
        info = ask(f"{url}/server_info", key="open sesame")
        assert (info["random_seed"], info["max_lora_rank"], info["device"]) == (4321, 8, "cpu")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{url}/server_info")
    family = launcher.family()
    assert not [p for p in family if "open sesame" in " ".join(p.cmdline())]  # a command line is no secret
    killed = launcher.server(urls[0].rpartition(":")[2])
    _, _, key_file = " ".join(killed.cmdline()).partition("--config ")
    assert not Path(key_file).exists()
    killed.kill()
    launcher.wait_for(f"^{urls[0]} died")
    check(urls[1])
    launcher.wait_for(f"^{urls[0]} answers again")
    check(urls[0])
    assert launcher.server(urls[0].rpartition(":")[2]) != killed

    family += launcher.family()
    launcher.process.terminate()
    assert launcher.process.wait(DEADLINE_S) == 0
    assert all_gone(family)
    assert not (tmp_path / "urls").exists()


def test_servers_end_with_a_killed_launcher(launch: Any, sglang_python: Path, student_dir: Path) -> None:
    launcher = launch("--model-path", student_dir, "--device", "cpu", "--python", sglang_python, "--role", "teacher")
    launcher.wait_for("^teacher http")
    family = launcher.family()
    assert len(family) >= 4  # guard, server, scheduler, detokenizer
    launcher.process.kill()
    assert all_gone(family)


def test_a_server_that_cannot_start_says_why(launch: Any, sglang_python: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model", "architectures": ["None"]}')
    launcher = launch("--model-path", tmp_path, "--device", "cpu", "--python", sglang_python)
    launcher.wait_for(f"^error: SGLang on {tmp_path} died; the end of its log:")
    launcher.wait_for("no-such-model")
    assert launcher.process.wait(DEADLINE_S) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines reach it.*give --api-key-file"),
        (["--host", "0.0.0.0", "--api-key-file", "/dev/null"], "--api-key-file /dev/null: it is empty"),
        (["--num-servers", "2", "--ports", "4000"], "--ports 4000: give as many"),
    ],
)
def test_refused(launch: Any, tmp_path: Path, flags: list[str], said: str) -> None:
    launcher = launch("--model-path", tmp_path, *flags)
    launcher.wait_for(said)
    assert launcher.process.wait(DEADLINE_S) == 2


def test_a_port_that_is_taken_is_refused(launch: Any, server: str, tmp_path: Path) -> None:
    port = server.rpartition(":")[2]
    assert not is_free(int(port), "127.0.0.1")
    launcher = launch("--model-path", tmp_path, "--ports", port)
    launcher.wait_for(f"--ports {port}: another process listens there")
    assert launcher.process.wait(DEADLINE_S) == 2


def test_no_answer_in_time(sglang_python: Path, student_dir: Path) -> None:
    with pytest.raises(RuntimeError, match=r"was not ready after 0.5 s; the end of its log"):
        start_sglang(student_dir, python=sglang_python, deadline_s=0.5)


STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("way", ["starter gone", "told to end", "guard killed"])
def test_guard_ends_a_stubborn_command(way: str) -> None:
    """However its guard ends, the command does; its children do where the guard could see to it."""
    guard = subprocess.Popen(
        [sys.executable, "-IS", GUARD, "0.1", sys.executable, "-c", STUBBORN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert guard.stdin is not None and guard.stdout is not None
    child = psutil.Process(int(guard.stdout.readline()))
    (command,) = psutil.Process(guard.pid).children()
    if way == "starter gone":
        guard.stdin.close()
    else:
        guard.send_signal(signal.SIGTERM if way == "told to end" else signal.SIGKILL)
    assert guard.wait(DEADLINE_S) == (-9 if way == "guard killed" else 128 + 9)
    if way == "guard killed":
        child.kill()
    assert all_gone([command, child])


def test_guard_hands_on_the_exit_status_and_the_log() -> None:
    command = [sys.executable, "-c", "print('last words'); raise SystemExit(7)"]
    with running(ServerProcess.spawn("it", command, "http://127.0.0.1:9")) as (server,):
        assert server.process.wait(DEADLINE_S) == 7
        with pytest.raises(RuntimeError, match="it died; the end of its log:\nlast words"):
            server.wait_until_healthy(DEADLINE_S)
