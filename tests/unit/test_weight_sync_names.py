"""An export is what the checkpoint says, and a server has a place for it; where servers reach this machine."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_trd.weight_sync.base import ServerError
from megatron_trd.weight_sync.distributed import address_towards
from megatron_trd.weight_sync.names import checked, expected_shapes, keeps_own_head, with_head
from megatron_trd.weight_sync.tensors import is_local
from tiny_models import make_model

URL = "http://a:1"


def fused(names: set[str]) -> set[str]:
    """What SGLang calls them."""
    for parts, whole in ((("q_proj", "k_proj", "v_proj"), "qkv_proj"), (("gate_proj", "up_proj"), "gate_up_proj")):
        for part in parts:
            names = {name.replace(f".{part}.", f".{whole}.") for name in names}
    return names


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_the_files_and_fit_fused_servers(family: str, tied: bool, tmp_path: Path) -> None:
    make_model(tmp_path, family=family, tied=tied)
    weights = load_file(tmp_path / "model.safetensors")
    shapes = expected_shapes(tmp_path)
    assert shapes == {name: tuple(weight.shape) for name, weight in weights.items()}
    assert ("lm_head.weight" in shapes) is not tied
    held = fused(set(weights))
    assert len(held) < len(weights) and not keeps_own_head(URL, held | {"rotary_emb.cos_sin_cache"}, shapes)
    assert not keeps_own_head(URL, weights, shapes)
    assert list(checked(weights.items(), shapes)) == list(weights.items())


def test_a_head_that_is_tied_is_not_expected_although_files_repeat_it(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 2)}
    for tied, names in ((True, ["model.embed_tokens.weight"]), (False, sorted(weights))):
        (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        save_file(weights, tmp_path / "model.safetensors")
        assert sorted(expected_shapes(tmp_path)) == names


def test_shards_are_read_together_and_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--hf-checkpoint .*safetensors"):
        expected_shapes(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2, 3)}, tmp_path / "model-00002-of-00002.safetensors")
    assert expected_shapes(tmp_path) == {"a": (2,), "b": (2, 3)}


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ([("a", (2,)), ("a", (2,))], "a comes twice"),
        ([("c", (2,))], "c is not in --hf-checkpoint"),
        ([("a", (3,))], r"a is \(3,\), not \(2,\)"),
        ([("a", (2,))], "missing b"),
    ],
)
def test_a_stream_that_does_not_fit_is_refused(stream: list[tuple[str, tuple[int, ...]]], words: str) -> None:
    passed: list[str] = []
    with pytest.raises(ValueError, match=words):
        for name, _ in checked(((name, torch.zeros(shape)) for name, shape in stream), {"a": (2,), "b": (1,)}):
            passed.append(name)
    assert passed == ["a"] * (stream[0] == ("a", (2,)))


def test_a_server_that_keeps_its_own_head_gets_the_embedding_twice() -> None:
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    assert keeps_own_head(URL, names | {"lm_head.weight"}, names)
    embedding = torch.ones(3)
    sent = list(with_head([("model.embed_tokens.weight", embedding), ("model.norm.weight", torch.zeros(1))]))
    assert [name for name, _ in sent] == ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    assert sent[1][1] is embedding


def test_a_server_of_another_model_is_named_with_what_differs() -> None:
    names = {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "x.bias"}
    with pytest.raises(ServerError, match=r"http://a:1: .*does not know x\.bias; .*the student's architecture"):
        keeps_own_head(URL, {"model.embed_tokens.weight", "model.layers.0.self_attn.qkv_proj.weight"}, names)
    with pytest.raises(ServerError, match="has besides a.weight, b.weight, c.weight, d.weight and 1 more"):
        keeps_own_head(URL, names | {f"{letter}.weight" for letter in "abcde"}, names)
    with pytest.raises(ServerError, match="serve it without LoRA, or use --weight-sync adapter"):
        held = {"model.embed_tokens.weight", "x.bias", "model.layers.0.self_attn.qkv_proj.base_layer.weight"}
        keeps_own_head(URL, held, names)


def test_addresses() -> None:
    assert address_towards(["http://127.0.0.1:1", "http://localhost:2"]) == "127.0.0.1"
    with pytest.raises(ValueError, match=r"http://nowhere\.invalid:1.*--weight-sync-address"):
        address_towards(["http://nowhere.invalid:1"])
    assert is_local("127.0.0.1") and is_local("localhost") and is_local(socket.gethostname())
    assert not is_local("192.0.2.1") and not is_local("nowhere.invalid")
