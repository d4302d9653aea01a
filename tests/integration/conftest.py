"""The shipped tiny models, served by the embedded server and by SGLang in child processes."""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration.wire import CONTEXT, Engine, read_weights
from megatron_trd.rollout.server_process import (
    ServerProcess,
    launch_embedded_server,
    launch_sglang,
    lora_flags,
    running,
    start_sglang,
)
from megatron_trd.rollout.server_process import sglang_python as find_sglang_python

MODELS = Path(__file__).parents[2] / "examples/quickstart_cpu/models"
Post = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="session")
def student_dir() -> Path:
    return MODELS / "student"


@pytest.fixture(scope="session")
def tokenizer(student_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(student_dir)


@pytest.fixture(scope="session")
def hf_student(student_dir: Path) -> torch.nn.Module:
    """The same model as the server's, run by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def other_dir(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with other weights: every matrix is disturbed."""
    directory = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(student_dir, directory)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: w.float() + 0.05 * torch.randn(w.shape, generator=generator)
        for name, w in load_file(student_dir / "model.safetensors").items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def server(student_dir: Path) -> Iterator[str]:
    """A server whose weights no test may change."""
    with launch_embedded_server(student_dir) as url:
        yield url


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The interpreter that has SGLang."""
    python = find_sglang_python(os.environ)
    if python is None:
        pytest.skip("SGLang is not installed: run bash tools/setup_sglang_cpu.sh")
    return python


@pytest.fixture(scope="session")
def sglang_server(sglang_python: Path, student_dir: Path) -> Iterator[str]:
    """A real SGLang server; a test that changes its weights restores them."""
    with launch_sglang(student_dir, python=sglang_python, flags=lora_flags(16)) as url:
        yield url


@pytest.fixture(scope="session")
def post() -> Post:
    return _post


def _post(url: str, path: str, body: Any = None, *, raw: bytes | None = None) -> tuple[int, Any]:
    """Send JSON with the standard library; return status and decoded answer."""
    data = raw if raw is not None else json.dumps({} if body is None else body).encode()
    request = urllib.request.Request(url + path, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, _decoded(response)
    except urllib.error.HTTPError as error:
        return error.code, _decoded(error)


def _decoded(response: Any) -> Any:
    text = response.read().decode()
    return json.loads(text) if response.headers.get_content_type() == "application/json" else text


# ------------------------------------------------------------------ the conformance suite's servers


@pytest.fixture(scope="session")
def served_dir(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with a longer context: the same model as `hf_student`."""
    directory = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(student_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return directory


@pytest.fixture(scope="session", params=["embedded", "sglang"])
def engine(request: pytest.FixtureRequest, served_dir: Path) -> Iterator[Engine]:
    """Each kind of server, on the student's weights; a test that changes them restores them."""
    if request.param == "sglang":
        server = start_sglang(served_dir, python=request.getfixturevalue("sglang_python"), flags=lora_flags(8))
    else:
        server = ServerProcess.start(served_dir)
    with running(server):
        yield Engine(request.param, server.url)


@pytest.fixture(scope="session")
def partner(served_dir: Path) -> Iterator[Engine]:
    """A second server for what takes two."""
    with running(ServerProcess.start(served_dir)) as (server,):
        yield Engine("embedded", server.url)


@pytest.fixture
def restored(engine: Engine, served_dir: Path) -> Iterator[Engine]:
    """A server whose weights the test may change."""
    yield engine
    engine.load(served_dir, "default")
    assert engine.checksums() == engine.expected_checksums(read_weights(served_dir))
