"""What an export must consist of, and whether a server has a place for all of it. Checked before the first byte leaves.

A tensor of a wrong shape kills a real server, and one of an unknown name is dropped without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from megatron_trd.weight_sync.base import ServerError

Shapes = Mapping[str, Sequence[int]]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FUSED = {  # a part -> what servers keep it in
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
EXPERTS = {"gate_proj": "w13_weight", "up_proj": "w13_weight", "down_proj": "w2_weight"}
"""A part of one expert -> where servers keep it for all experts of the layer."""
_PART = re.compile(rf"\.({'|'.join(FUSED)})\.")
_EXPERT_PART = re.compile(rf"\.experts\.\d+\.({'|'.join(EXPERTS)})\.weight$")
NUM_NAMED = 4
"""Names that an error message lists at most."""


def expected_shapes(checkpoint: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a Hugging Face directory, from the headers of its safetensors.

    A head that is tied to the embedding is left out, also where the files repeat it.

    Raises:
        ValueError: there are no safetensors.
    """
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    if not files:
        raise ValueError(f"--hf-checkpoint {checkpoint}: no *.safetensors there; give a directory with weights")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    if config.get("tie_word_embeddings"):
        shapes.pop(HEAD, None)
    return shapes


def checked(weights: Iterable[tuple[str, Tensor]], shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Pass on a stream that consists of exactly these names and shapes.

    Raises:
        ValueError: a tensor comes twice, is unknown or has another shape (it is not passed on), or, at the end, one
            is missing.
    """
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen:
            raise ValueError(f"exported weights: {name} comes twice")
        if name not in shapes:
            raise ValueError(f"exported weights: {name} is not in --hf-checkpoint; the export does not fit it")
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise ValueError(
                f"exported weights: {name} is {tuple(tensor.shape)}, not {tuple(shapes[name])} as in --hf-checkpoint"
            )
        seen.add(name)
        yield name, tensor
    if missing := [name for name in shapes if name not in seen]:
        raise ValueError(f"exported weights: missing {listed(missing)}")


def with_head(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Send a tied embedding a second time, as the head: for servers that keep a head of their own."""
    for name, tensor in weights:
        yield name, tensor
        if name == EMBEDDING:
            yield HEAD, tensor


def keeps_own_head(url: str, held: Iterable[str], names: Collection[str]) -> bool:
    """Check that a server has a place for every tensor of an export, and none that the export leaves empty.

    Args:
        held: the names of the server's parameters, fused or not; buffers among them are passed over.
        names: Hugging Face names of the export.

    Returns:
        Whether it keeps a head apart from the embedding, although the export has none.

    Raises:
        ServerError: names do not fit; the message lists them.
    """
    places = {name for name in held if name.endswith((".weight", ".bias", *EXPERTS.values()))}
    place_of = {name: name if name in places else _fused(name) for name in names}
    unknown = [name for name, place in place_of.items() if place not in places]
    missing = sorted(places - set(place_of.values()))
    own_head = HEAD in missing and EMBEDDING in place_of
    if own_head:
        missing.remove(HEAD)
    if unknown or missing:
        parts = [("it does not know", unknown), ("it has besides", missing)]
        told = "; ".join(f"{what} {listed(which)}" for what, which in parts if which)
        lora = any(".base_layer." in name for name in missing)
        remedy = "serve it without LoRA, or use --weight-sync adapter" if lora else "serve the student's architecture"
        raise ServerError(f"{url}: serves another model than the one that is trained: {told}; {remedy}")
    return own_head


def _fused(name: str) -> str:
    if _EXPERT_PART.search(name):
        return _EXPERT_PART.sub(lambda m: f".experts.{EXPERTS[m[1]]}", name)
    return _PART.sub(lambda m: f".{FUSED[m[1]]}.", name)


def listed(names: Sequence[str]) -> str:
    """Join the first few for an error message."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more
