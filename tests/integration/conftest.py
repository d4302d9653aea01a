"""The shipped tiny models, served by the embedded server in a child process."""

from __future__ import annotations

import json
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

from megatron_trd.rollout.embedded_server import launch_embedded_server

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
