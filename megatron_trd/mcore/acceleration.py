"""Which kernels and which precision a run computes with: decided from its flags and the machine, told in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_trd.config.schema import Config, ModelConfig, ParallelConfig
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.stages import cut_into_stages

Version = tuple[int, int]

# Oldest compute capability, Transformer Engine and CUDA of a recipe (Transformer Engine's own checks, Megatron-Core's).
_RECIPES: dict[str, tuple[Version, Version, Version]] = {
    "delayed": ((8, 9), (1, 0), (12, 1)),
    "tensorwise": ((8, 9), (2, 2), (12, 1)),
    "blockwise": ((9, 0), (2, 3), (12, 9)),
    "mxfp8": ((10, 0), (2, 1), (12, 8)),
}
_NO_MXFP8: Version = (12, 0)  # from this compute capability on, not all layouts of its products exist


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What kernels can be had here."""

    compute_capability: Version | None
    """Of this process's GPU; None without CUDA."""
    cuda: Version | None
    """The CUDA that torch was built for."""
    transformer_engine: Version | None
    adam: Literal["transformer_engine", "apex", "torch"]
    """Whose Adam Megatron-Core takes."""
    apex_wgrad: bool
    """Whether apex's fused weight-gradient kernel is there, which Megatron's own layers can use."""

    @classmethod
    def here(cls) -> Machine:
        """Look at this machine."""
        from megatron.core.optimizer import Adam
        from megatron.core.tensor_parallel import layers
        from megatron.core.utils import get_te_version

        te = get_te_version()
        cuda = torch.version.cuda
        package = Adam.__module__.partition(".")[0]
        return cls(
            compute_capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
            cuda=None if cuda is None else _version(cuda),
            transformer_engine=None if te is None else _version(str(te)),
            adam=package if package in ("transformer_engine", "apex") else "torch",
            apex_wgrad=layers._grad_accum_fusion_available,
        )


def _version(text: str) -> Version:
    major, minor = map(int, text.split(".")[:2])
    return major, minor


def _text(version: Version | None) -> str:
    return "none" if version is None else f"{version[0]}.{version[1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceleration:
    """The choices of a run."""

    layers: Literal["local", "transformer_engine"]
    reason: str
    """Why those layers."""
    fused_wgrad: bool
    """Whether the layers add weight gradients to the gradient buffer inside their matrix product."""


def choose(model: ModelConfig, machine: Machine, *, lora: bool) -> Acceleration:
    """Choose layers and fusions.

    Raises:
        ValueError: a flag asks for what this machine does not offer.
    """
    te, wanted = machine.transformer_engine, model.transformer_impl
    why_not = None
    if machine.compute_capability is None:
        why_not = "no CUDA"
    elif te is None:
        why_not = "no Transformer Engine"
    needs = {
        "transformer-impl transformer_engine": wanted == "transformer_engine",
        f"fp8-format {model.fp8_format}": model.fp8_format is not None,
        f"cpu-offloading-num-layers {model.cpu_offloading_num_layers}": model.cpu_offloading_num_layers > 0,
    }
    if model.recompute_granularity == "selective":
        needs |= {f"recompute-modules {name}": name in model.recompute_modules for name in ("layernorm", "moe_act")}
    for flag in (flag for flag, needed in needs.items() if needed and why_not is not None):
        raise ValueError(f"--{flag}: needs CUDA and Transformer Engine, but there is {why_not}; leave it out")
    if model.fp8_format is not None:
        _refuse_recipe(model.fp8_recipe, machine)
    local = wanted == "local" or why_not is not None
    available = machine.apex_wgrad if local else True
    return Acceleration(
        layers="local" if local else "transformer_engine",
        reason=why_not or ("--transformer-impl local" if local else f"version {_text(te)}"),
        # A frozen base has no weight gradients.
        fused_wgrad=model.gradient_accumulation_fusion and available and not lora,
    )


def _refuse_recipe(recipe: str, machine: Machine) -> None:
    capability, te, cuda = machine.compute_capability, machine.transformer_engine, machine.cuda
    assert capability is not None and te is not None and cuda is not None  # looked at before
    for what, found, needed in zip(
        ("compute capability", "Transformer Engine", "CUDA"), (capability, te, cuda), _RECIPES[recipe], strict=True
    ):
        if found < needed:
            able = [name for name, (c, t, k) in _RECIPES.items() if c <= capability and t <= te and k <= cuda]
            remedy = f"use --fp8-recipe {able[0]}" if able else "leave out --fp8-format"
            raise ValueError(
                f"--fp8-recipe {recipe}: needs {what} {_text(needed)} or newer, but this is {_text(found)}; {remedy}"
            )
    if recipe == "mxfp8" and capability >= _NO_MXFP8:
        raise ValueError(
            f"--fp8-recipe mxfp8: compute capability {_text(capability)} has not all of its products; use tensorwise"
        )


def require_shapes(config: Config, hf: HFModel) -> None:
    """Refuse recompute, offloading and FP8 that the student's shape does not allow. Needs no GPU.

    Raises:
        ValueError: a flag does not fit the model.
    """
    model, parallel = config.model, config.parallel
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    layers = cut_into_stages(hf, parallel.pipeline_model_parallel_size, virtual).layers_per_chunk
    number, offloaded = model.recompute_num_layers, model.cpu_offloading_num_layers
    if model.recompute_granularity == "full" and model.recompute_method == "uniform" and layers % number:
        raise ValueError(
            f"--recompute-num-layers {number}: must divide the {layers} layers of a pipeline chunk; use 1 or "
            "--recompute-method block"
        )
    if model.recompute_granularity == "selective":
        sparse = hf.moe.sparse_layers if hf.moe is not None else (False,)
        for module, exists in (("mlp", not all(sparse)), ("moe", any(sparse)), ("moe_act", any(sparse))):
            if module in model.recompute_modules and not exists:
                raise ValueError(f"--recompute-modules {module}: {hf.path} has no such layer; leave it out")
    if offloaded >= layers:
        raise ValueError(f"--cpu-offloading-num-layers {offloaded}: must be less than the {layers} layers of {hf.path}")
    for what, width in _widths_of_rank(hf, parallel).items() if model.fp8_format is not None else ():
        if width % model.tokens_multiple:
            raise ValueError(
                f"--fp8-format {model.fp8_format}: {what} of a rank must be a multiple of {model.tokens_multiple}, but "
                f"{hf.path} gives it {width}; share them among fewer ranks, or leave it out"
            )


def _widths_of_rank(hf: HFModel, parallel: ParallelConfig) -> dict[str, int]:
    """Inner sizes of the layers' matrices."""
    tp, geometry = parallel.tensor_model_parallel_size, hf.geometry
    heads = geometry.num_query_groups * geometry.heads_per_group * geometry.head_dim
    kv = geometry.num_query_groups * geometry.head_dim
    widths = {
        "the hidden size": hf.hidden_size,
        "the heads": heads // tp,
        "queries, keys and values": (heads + 2 * kv) // tp,
    }
    if hf.moe is None or not all(hf.moe.sparse_layers):
        widths["the feed-forward width"] = hf.ffn_hidden_size // tp
    if hf.moe is not None:
        widths["an expert's width"] = hf.moe.expert_ffn_hidden_size // (parallel.expert_tensor_parallel_size or tp)
    return widths


def describe(config: Config, machine: Machine, *, sparse: bool) -> str:
    """Say in one line what a run computes with, and why.

    Args:
        sparse: whether the student has experts.

    Raises:
        ValueError: a flag asks for what this machine does not offer.
    """
    model = config.model
    chosen = choose(model, machine, lora=config.lora.lora_rank > 0)
    te = chosen.layers == "transformer_engine"
    attention = "Transformer Engine" if te else "torch varlen" if machine.compute_capability else "torch SDPA"
    grouped = "Transformer Engine" if te else "none, one expert after the other"
    precision = "bf16, gradients fp32" if model.bf16 else "fp32"
    if model.fp8_format is not None:
        precision = f"fp8 {model.fp8_format} {model.fp8_recipe} in the layers, else {precision}"
    parts = {
        "layers": f"{chosen.layers} ({chosen.reason})",
        "attention": attention,
        "grouped GEMM": grouped if sparse else "none (no experts)",
        "precision": precision,
        "optimizer": _optimizer(config, machine),
        "gradient-accumulation fusion": _fusion(config, chosen),
    }
    return "; ".join(f"{what}: {value}" for what, value in parts.items())


def _optimizer(config: Config, machine: Machine) -> str:
    adam = {
        "transformer_engine": "Transformer Engine FusedAdam",
        "apex": "apex FusedAdam (no Transformer Engine)",
        "torch": "torch AdamW (neither Transformer Engine nor apex)",
    }[machine.adam]
    if machine.adam != "torch" and machine.compute_capability is None:
        raise ValueError(
            f"{machine.adam}: is installed, so Megatron-Core takes its optimizer, which needs CUDA; uninstall it"
        )
    if not config.optimizer.optimizer_cpu_offload:
        return adam
    if machine.compute_capability is None or machine.transformer_engine is None:
        missing = "CUDA" if machine.compute_capability is None else "Transformer Engine"
        raise ValueError(
            f"--optimizer-cpu-offload: needs CUDA and Transformer Engine, but there is no {missing}; leave it out"
        )
    return f"torch AdamW on the CPU for {config.optimizer.optimizer_offload_fraction:.0%} of the weights, else {adam}"


def _fusion(config: Config, chosen: Acceleration) -> str:
    if not config.model.gradient_accumulation_fusion:
        return "off (--no-gradient-accumulation-fusion)"
    if config.lora.lora_rank > 0:
        return "none (the base is frozen)"
    return "layers and head" if chosen.fused_wgrad else "head (no apex kernel for local layers)"
