"""Student and teacher must speak the same token ids: checked once, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(path: str | Path, flag: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face model directory.

    Raises:
        ValueError: there is none, or it has no end-of-sequence token.
    """
    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"--{flag} {path}: no tokenizer there; copy tokenizer.json and tokenizer_config.json into it")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--{flag} {path}: its tokenizer has no end-of-sequence token; set eos_token in its config")
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a response: the tokenizer's, then those of `generation_config.json` beside it.

    Chat models stop on more than one, Qwen3 on the end of the turn and the end of the text.

    Raises:
        ValueError: the file cannot be read, or names an id that the tokenizer does not have.
    """
    ids = [tokenizer.eos_token_id]
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: is not a JSON object; copy it anew from the model") from error
        ids += named if isinstance(named, list) else [] if named is None else [named]
    for stop in ids:
        if type(stop) is not int or not 0 <= stop < len(tokenizer):
            raise ValueError(f"{path}: eos_token_id {stop} is no token of the tokenizer beside it; copy both anew")
    return tuple(dict.fromkeys(ids))


def require_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, teacher_path: str | Path
) -> None:
    """Compare every token and every special role.

    Raises:
        ValueError: they differ; the message shows the first differences side by side.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    lines = []
    for token in sorted(
        ours.keys() | theirs.keys(), key=lambda t: (min(ours.get(t, 1 << 40), theirs.get(t, 1 << 40)), t)
    ):
        if ours.get(token) != theirs.get(token):
            lines.append(f"  {token!r}: student {ours.get(token, 'absent')}, teacher {theirs.get(token, 'absent')}")
    if student.eos_token_id != teacher.eos_token_id:
        lines.insert(0, f"  end of sequence: student {student.eos_token!r}, teacher {teacher.eos_token!r}")
    if lines:
        shown = "\n".join(lines[:10]) + (f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else "")
        raise ValueError(
            f"--teacher-hf-checkpoint {teacher_path}: its tokenizer differs from the student's in {len(lines)} places, "
            f"and the loss compares token ids; use a teacher of the same family:\n{shown}"
        )


def epistemic_token_ids(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> list[int]:
    """Return the first sub-word id of each word, bare and with a leading space (arXiv 2606.08432, appendix C.5)."""
    ids = set()
    for text in (form for word in words for form in (word, f" {word}")):
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        if encoded and encoded[0] != tokenizer.unk_token_id:
            ids.add(encoded[0])
    return sorted(ids)
