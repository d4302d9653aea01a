"""The published Qwen3 tokenizer: the same files, the same ids, nothing lost on the way through them."""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_trd.config.schema import RolloutConfig
from megatron_trd.rollout.refine import sampling_params
from megatron_trd.rollout.vocabulary import load_tokenizer, stop_token_ids
from shared_data import qwen_tokenizer, shared

TEXTS = (
    "Every morning Aya goes for a $9$-kilometer-long walk: $\\frac{9}{s} + t = 2.4$.\n\n\\boxed{204}",
    "```python\ndef f(x: int) -> int:\n\treturn x ** 2  # größer\n```",
    "数学题：求 1+1 的值。 🧮👩‍🔬 e\u0301 \u0000 \ufeff  \r\n end ",
    "<think>\nHmm.\n</think>\n\n<|im_start|>user <|im_end|><tool_call>",
)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_files_are_the_published_ones(tmp_path: Path) -> None:
    folder = shared("qwen_tokenizer")
    config = folder / "tokenizer_config.json"
    assert _sha256(config) == "d5d09f07b48c3086c508b30d1c9114bd1189145b74e982a265350c923acd8101"
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.save(str(tmp_path / "tokenizer.json"), pretty=True)
    inner.model.save(str(tmp_path))
    assert {name: _sha256(tmp_path / name) for name in ("tokenizer.json", "vocab.json", "merges.txt")} == {
        "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
        "vocab.json": "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910",
        "merges.txt": "8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5",
    }
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert json.loads(config.read_text(encoding="utf-8"))["chat_template"] == template


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back_in_nfc(text: str) -> None:
    tokenizer = qwen_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert tokenizer(text)["input_ids"] == ids, "no token is put in front of a text"


def test_real_problems_survive() -> None:
    tokenizer = qwen_tokenizer()
    for name in ("math/aime24.jsonl", "math/hmmt25_feb.jsonl", "code/apps_5.jsonl"):
        for line in shared(name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for text in (str(row.get("problem") or row["question"]), str(row.get("solution", ""))):
                assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_special_tokens_and_those_that_only_look_like_them() -> None:
    tokenizer = qwen_tokenizer()
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (151669, 151645, 151643)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    assert tokenizer.convert_tokens_to_ids(list(names)) == [151643, 151644, 151645, 151667, 151668]
    assert tokenizer("<think>\n\n</think>\n\n")["input_ids"] == [151667, 271, 151668, 271]
    assert [len(tokenizer(digit)["input_ids"]) for digit in ("7", "2024")] == [1, 4]
    response = tokenizer("<think>\nHm\n</think>\n\nIt is 2.<|im_end|>")["input_ids"]
    assert tokenizer.decode(response, skip_special_tokens=True) == "<think>\nHm\n</think>\n\nIt is 2."


def test_generation_stops_on_every_end_token_of_the_model(tmp_path: Path) -> None:
    assert stop_token_ids(qwen_tokenizer()) == (151645, 151643)
    assert sampling_params(RolloutConfig(), qwen_tokenizer()).stop_token_ids == (151645, 151643)
    folder = Path(shutil.copytree(Path(__file__).parents[2] / "examples/quickstart_cpu/models/student", tmp_path / "m"))
    path = folder / "generation_config.json"
    for named, stops in (("1", (1,)), ("[5, 1]", (1, 5)), ("null", (1,))):
        path.write_text(f'{{"eos_token_id": {named}}}')
        assert stop_token_ids(load_tokenizer(folder, "hf-checkpoint")) == stops
    for content, message in (('{"eos_token_id": 4096}', "eos_token_id 4096 is no token"), ("[", "not a JSON object")):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"generation_config.json: .*{message}"):
            stop_token_ids(load_tokenizer(folder, "hf-checkpoint"))
    path.unlink()
    assert stop_token_ids(load_tokenizer(folder, "hf-checkpoint")) == (1,)
