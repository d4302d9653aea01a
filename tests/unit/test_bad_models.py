"""Wrong model directories are refused with the flag, the value and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_trd.mcore.hf_config import read_hf_model
from megatron_trd.mcore.hf_weights import SafetensorsDirectory
from megatron_trd.rollout.vocabulary import epistemic_token_ids, load_tokenizer, require_same_vocabulary
from tiny_models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def changed(model: Path, tmp_path: Path, **changes) -> Path:
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    return tmp_path


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--hf-checkpoint .*nowhere: no config.json there"):
        read_hf_model(tmp_path / "nowhere", "hf-checkpoint", 1)


def test_wrong_model_type(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model type 'gpt2' is not supported; use one of qwen3"):
        read_hf_model(changed(model, tmp_path, model_type="gpt2"), "hf-checkpoint", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope scaling 'yarn'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"attention_bias": True}, "biases in attention"),
    ],
)
def test_features_we_lack(model: Path, tmp_path: Path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_hf_model(changed(model, tmp_path, **changes), "hf-checkpoint", 1)


def test_tensor_parallel_size_must_divide(model: Path) -> None:
    with pytest.raises(ValueError, match="--tensor-model-parallel-size 3: must divide the 4 attention heads"):
        read_hf_model(model, "hf-checkpoint", 3)


def test_missing_weights(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model.safetensors"):
        SafetensorsDirectory(tmp_path)
    with pytest.raises(ValueError, match="tensor model.nothing is missing"):
        SafetensorsDirectory(model)["model.nothing"]


def tokenizer(words: list[str], eos: str = "<eos>") -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", "<unk>", *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, unk_token="<unk>")


def test_tokenizers_are_compared_token_by_token() -> None:
    require_same_vocabulary(tokenizer(["a", "b"]), tokenizer(["a", "b"]), "T")
    with pytest.raises(ValueError, match=r"(?s)--teacher-hf-checkpoint T.*3 places.*'b': student 3, teacher 4.*'c'"):
        require_same_vocabulary(tokenizer(["a", "b"]), tokenizer(["a", "c", "b", "d"]), "T")
    with pytest.raises(ValueError, match="end of sequence: student '<eos>', teacher 'a'"):
        require_same_vocabulary(tokenizer(["a", "b"]), tokenizer(["a", "b"], eos="a"), "T")


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer there"):
        load_tokenizer(tmp_path, "hf-checkpoint")


def test_epistemic_ids_skip_unknown_words() -> None:
    assert epistemic_token_ids(tokenizer(["W", "a"]), ("W", "Wait")) == [2]
