"""What Megatron needs to know of a Hugging Face model directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from megatron_trd.mcore.layouts import FAMILIES, Family, Geometry, MoEShape


@dataclass(frozen=True, slots=True, kw_only=True)
class HFModel:
    """Shape of a model, read from its `config.json`."""

    path: Path
    family: Family
    geometry: Geometry
    hidden_size: int
    ffn_hidden_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rope_theta: float
    tied: bool
    moe: MoEShape | None
    """None: a dense model."""

    def padded_to(self, rows: int) -> HFModel:
        """The same model with its vocabulary padded to `rows`."""
        return replace(self, geometry=replace(self.geometry, padded_vocab_size=rows))


def padded_vocab_size(vocab_size: int, divisible_by: int, tp_size: int) -> int:
    """Smallest multiple of `divisible_by * tp_size` that holds the vocabulary (Megatron's rule)."""
    multiple = divisible_by * tp_size
    return -(-vocab_size // multiple) * multiple


def common_padding(student: HFModel, teacher: HFModel, divisible_by: int, tp_size: int) -> tuple[HFModel, HFModel]:
    """Pad both vocabularies to the same rows, so that a rank owns the same range of student and teacher."""
    rows = padded_vocab_size(max(m.geometry.vocab_size for m in (student, teacher)), divisible_by, tp_size)
    return student.padded_to(rows), teacher.padded_to(rows)


def read_hf_model(path: str | Path, flag: str, tp_size: int) -> HFModel:
    """Read and check `config.json`; the vocabulary is not padded yet.

    Args:
        flag: flag that gave the path, for error messages.
        tp_size: must divide heads and feed-forward width.

    Raises:
        ValueError: no such directory, an unknown model type, or a feature we do not have.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"--{flag} {path}: no config.json there; give a Hugging Face model directory")
    config = AutoConfig.from_pretrained(path)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"--{flag} {path}: model type {config.model_type!r} is not supported; use one of {', '.join(FAMILIES)}"
        )
    _refuse_what_we_lack(config, flag, path)
    moe = _moe_shape(config, flag, path)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    widths = [("attention heads", heads)]
    if moe is None or not all(moe.sparse_layers):
        widths.append(("feed-forward width", config.intermediate_size))
    for what, size in widths:
        if size % tp_size:
            raise ValueError(f"--tensor-model-parallel-size {tp_size}: must divide the {size} {what} of {path}")
    if groups % tp_size and tp_size % groups:
        raise ValueError(
            f"--tensor-model-parallel-size {tp_size}: must divide, or be a multiple of, the {groups} key-value heads "
            f"of {path}"
        )
    return HFModel(
        path=path,
        family=family,
        geometry=Geometry(
            num_layers=config.num_hidden_layers,
            num_query_groups=groups,
            heads_per_group=heads // groups,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
        ),
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        tied=config.tie_word_embeddings,
        moe=moe,
    )


def _moe_shape(config: PretrainedConfig, flag: str, path: Path) -> MoEShape | None:
    if config.model_type != "qwen3_moe" or not config.num_experts:
        return None
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        raise ValueError(
            f"--{flag} {path}: num_experts_per_tok 1 with norm_topk_prob weighs each expert with 1, so its router "
            "cannot learn, and is not supported; use a model without it"
        )
    sparse_layers = tuple(
        i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
        for i in range(config.num_hidden_layers)
    )
    if not any(sparse_layers):
        return None
    return MoEShape(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        expert_ffn_hidden_size=config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        sparse_layers=sparse_layers,
    )


def _refuse_what_we_lack(config: PretrainedConfig, flag: str, path: Path) -> None:
    rope = config.rope_parameters.get("rope_type", "default")
    window = getattr(config, "use_sliding_window", False)
    for wrong, what in (
        (rope != "default", f"rope scaling {rope!r}"),
        (bool(window), "sliding-window attention"),
        (config.hidden_act != "silu", f"activation {config.hidden_act!r}"),
        (getattr(config, "mlp_bias", False), "biases in the feed-forward layers"),
        (config.model_type != "qwen2" and getattr(config, "attention_bias", False), "biases in attention"),
    ):
        if wrong:
            raise ValueError(f"--{flag} {path}: {what} is not supported; use a model without it")
