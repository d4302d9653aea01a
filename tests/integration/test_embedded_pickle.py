"""Payloads of strangers: tensors come through, nothing else does."""

from __future__ import annotations

import base64
import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_trd.rollout.embedded.unpickling import read_tensors


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_tensors_of_all_kinds_come_through(protocol: int) -> None:
    tensors = {
        "bfloat16": torch.randn(2, 3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "view": torch.arange(12.0)[::2].reshape(2, 3).t(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    for content in (tensors, list(tensors.items())):
        got = dict(read_tensors([_base64(pickle.dumps(content, protocol=protocol))], None))
        assert got.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
            assert torch.equal(got[name].float(), tensor.float())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


def _storage_with(content: Any) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


def _rebuilt(storage: Any, offset: int, size: Any, stride: Any) -> Any:
    return Reduced(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


def evil_payloads(proof: Path) -> dict[str, bytes]:
    touch = Reduced(os.mkdir, str(proof))
    storage = torch.ones(3).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    contents = {
        "a call": [("a", touch)],
        "a call in a storage": [("a", Reduced(torch.storage._load_from_bytes, _storage_with(touch)))],
        "another way to load": [("a", Reduced(torch.load, io.BytesIO(_storage_with(torch.ones(1)))))],
        "a view beyond the storage": [("a", _rebuilt(typed, 0, (1000,), (1,)))],
        "a view before the storage": [("a", _rebuilt(typed, -1, (2,), (1,)))],
        "a view backwards": [("a", _rebuilt(typed, 0, (2,), (-1,)))],
        "a storage that is none": [("a", _rebuilt("storage", 0, (2,), (1,)))],
        "no tensor": [("a", 3)],
        "no name": [(3, torch.ones(1))],
        "no pairs": [1, 2],
        "a number": 3,
    }
    # Sets an attribute of what it may call: GLOBAL, then BUILD with (None, {"__call__": 1}).
    change = b"\x80\x04ctorch.storage\n_load_from_bytes\nN}\x8c\x08__call__K\x01s\x86b."
    raw = {"a changed function": change, "half of it": pickle.dumps(contents["a call"])[:-9], "nothing": b""}
    return {name: pickle.dumps(content) for name, content in contents.items()} | raw


EVIL = tuple(evil_payloads(Path("/")))


@pytest.mark.parametrize("name", EVIL)
def test_evil_payloads_are_refused_and_not_obeyed(tmp_path: Path, name: str) -> None:
    proof = tmp_path / "proof"
    with pytest.raises(ValueError, match="cannot be read"):
        read_tensors([_base64(evil_payloads(proof)[name])], None)
    assert not proof.exists()


def test_the_evil_would_have_been_done(tmp_path: Path) -> None:
    """Otherwise the test above proves nothing."""
    proof = tmp_path / "proof"
    for name in ("a call", "a call in a storage"):
        pickle.loads(evil_payloads(proof)[name])
        proof.rmdir()
