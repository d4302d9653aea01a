"""Buckets hold every byte once, in order, aligned, within their size; payloads come out as they went in."""

from __future__ import annotations

import pickle
import pickletools
from base64 import b64decode
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_trd.rollout.embedded.unpickling import read_tensors
from megatron_trd.weight_sync.buckets import Bucket, buckets
from megatron_trd.weight_sync.payload import bucket_payload, inline

SIZES = [(3, 5), (), (1,), (7,), (0, 4), (100,), (2, 3, 4), (1,), (33,)]
DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.float64, torch.bool)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {
        f"w{i}": (10 * torch.randn(shape, generator=generator)).to(DTYPES[i % len(DTYPES)])
        for i, shape in enumerate(SIZES)
    }
    return made | {"view": torch.arange(40.0).view(5, 8).T[1:4, ::2]}


def read_back(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    for name, dtype, shape, (start, end) in zip(
        bucket.names, bucket.dtypes, bucket.shapes, bucket.spans(), strict=True
    ):
        yield name, bucket.flat[start:end].view(dtype).reshape(shape).clone()  # view fails where it is misaligned
    assert end == bucket.flat.numel()


@pytest.mark.parametrize("max_bytes", [1, 16, 64, 250, 1 << 20])
def test_a_stream_through_buckets_is_the_stream(max_bytes: int) -> None:
    original = tensors()
    back: list[tuple[str, Tensor]] = []
    for bucket in buckets(original.items(), max_bytes):
        assert bucket.flat.nbytes <= max_bytes or len(bucket.names) == 1
        back += read_back(bucket)
    assert [name for name, _ in back] == list(original)
    for name, tensor in back:
        assert tensor.dtype == original[name].dtype and torch.equal(tensor, original[name])


def test_tensors_of_one_dtype_fill_a_bucket_before_the_next_begins() -> None:
    stream = [(str(i), torch.full((25,), float(i))) for i in range(10)]
    assert [list(b.names) for b in buckets(stream, 300)] == [list("012"), list("345"), list("678"), ["9"]]
    assert list(buckets([], 300)) == []


def test_a_bucket_is_made_before_the_next_tensor_is_taken() -> None:
    taken: list[int] = []

    def export() -> Iterator[tuple[str, Tensor]]:
        for i in range(6):
            taken.append(i)
            yield str(i), torch.zeros(25)

    seen = [(list(bucket.names), len(taken)) for bucket in buckets(export(), 200)]
    assert seen == [(["0", "1"], 3), (["2", "3"], 5), (["4", "5"], 6)]


def test_payloads_are_read_as_they_were_written_and_carry_only_their_own_bytes() -> None:
    original = tensors()
    for bucket in buckets(original.items(), 250):
        content = dict(read_tensors([bucket_payload(bucket)], "flattened_bucket"))
        for name, tensor in content.items():
            assert tensor.dtype == original[name].dtype and torch.equal(tensor, original[name])
    content = dict(read_tensors([inline(original)], None))
    assert content.keys() == original.keys()
    assert all(torch.equal(content[name], original[name]) for name in original)
    whole = torch.zeros(1_000_000)
    assert len(b64decode(inline({"part": whole[:10]}))) < 2000


def test_a_payload_names_nothing_but_what_real_servers_let_through() -> None:
    let_through = {  # of SafeUnpickler.ALLOWED_GLOBALS in SGLang 0.5.21
        "types SimpleNamespace",
        "torch Size",
        "torch float32",
        "torch uint8",
        "torch._utils _rebuild_tensor_v2",
        "torch.storage _load_from_bytes",
        "collections OrderedDict",
    }
    (bucket,) = buckets([("a", torch.zeros(3)), ("b", torch.zeros(2))], 1000)
    pickled = b64decode(bucket_payload(bucket))
    assert pickled[1] == 4 and pickle.HIGHEST_PROTOCOL >= 4
    strings: list[str] = []
    named = set()
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in ("SHORT_BINUNICODE", "BINUNICODE"):
            strings.append(str(argument))
        elif code.name == "STACK_GLOBAL":
            named.add(" ".join(strings[-2:]))
        elif code.name == "GLOBAL":
            named.add(str(argument))
    assert named and named <= let_through
