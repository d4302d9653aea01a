"""What is asked of Transformer Engine, as far as it imports: layers, FP8 recipe and where FP8 is off. Needs no GPU."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from launch import spawn
from megatron_trd.config.schema import LoraConfig, ModelConfig, ParallelConfig
from tiny_models import make_model

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("Transformer Engine is not installed", allow_module_level=True)


def inspect(rank: int, world: int, path: str) -> None:
    from megatron_trd.mcore.groups import initialize_groups
    from megatron_trd.mcore.hf_config import read_hf_model

    groups = initialize_groups(ParallelConfig(), 1, 0)
    for name in ("dense", "sparse"):
        hf = read_hf_model(Path(path) / name, "hf-checkpoint", 1)
        check_layers(hf, groups)
    check_fp8(hf, groups)
    check_adam()


def config(hf, groups, **model):
    from megatron_trd.mcore.model_config import transformer_config

    model = ModelConfig(hf_checkpoint="x", **model)
    return transformer_config(hf, model, groups, sequence_parallel=False, virtual_stages=1, grouped_experts=True)


def check_layers(hf, groups) -> None:
    from megatron.core.extensions import transformer_engine as te

    from megatron_trd.mcore.acceleration import Acceleration
    from megatron_trd.mcore.layers import FusedGradientsLayer, block_spec, layer_classes
    from megatron_trd.mcore.lora import LoRALinear

    chosen = Acceleration(layers="transformer_engine", reason="", fused_wgrad=True)
    sparse = hf.moe is not None
    spec = block_spec(config(hf, groups), layer_classes(chosen), None, (sparse, sparse))
    assert spec.layer_norm is te.TENorm
    for layer in spec.layer_specs:
        assert layer.module is FusedGradientsLayer
        attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
        assert attention.linear_qkv is te.TEColumnParallelLinear and attention.linear_proj is te.TERowParallelLinear
        assert attention.core_attention is te.TEDotProductAttention
        assert layer.submodules.input_layernorm is layer.submodules.pre_mlp_layernorm is te.TENorm
        linears = mlp.experts.submodules if sparse else mlp
        grouped = "Grouped" if sparse else ""
        assert linears.linear_fc1 is getattr(te, f"TEColumnParallel{grouped}Linear")
        assert linears.linear_fc2 is getattr(te, f"TERowParallel{grouped}Linear")
    with_lora = block_spec(
        config(hf, groups), layer_classes(replace(chosen, fused_wgrad=False)), LoraConfig(lora_rank=4), (sparse,)
    ).layer_specs[0]
    linear = with_lora.submodules.self_attention.submodules.linear_qkv
    assert issubclass(linear, LoRALinear) and issubclass(linear, te.TEColumnParallelLinear)
    assert with_lora.module is not FusedGradientsLayer


def check_fp8(hf, groups) -> None:
    from contextlib import nullcontext

    from megatron.core.fp8_utils import get_fp8_align_size, get_fp8_context, get_fp8_recipe
    from transformer_engine.common import recipe

    assert not config(hf, groups).fp8
    classes = {
        "delayed": recipe.DelayedScaling,
        "tensorwise": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }
    for name, cls in classes.items():
        for scheme in ("hybrid", "e4m3"):
            fp8 = {"fp8_format": scheme, "fp8_recipe": name}
            built = config(hf, groups, **fp8)
            made = get_fp8_recipe(built)
            assert type(made).__mro__.index(cls) <= 1 and made.fp8_format == recipe.Format[scheme.upper()]
            assert built.disable_parameter_transpose_cache and not built.fp8_param
            assert ModelConfig(hf_checkpoint="x", **fp8).tokens_multiple == get_fp8_align_size(built.fp8_recipe)
    delayed = config(
        hf, groups, fp8_format="hybrid", fp8_margin=2, fp8_amax_history_len=16, fp8_amax_compute_algo="max"
    )
    made = get_fp8_recipe(delayed)
    assert (made.margin, made.amax_history_len, made.amax_compute_algo) == (2, 16, "max")
    ends = config(
        hf,
        groups,
        fp8_format="hybrid",
        fp8_recipe="tensorwise",
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=2,
        num_layers_at_end_in_bf16=1,
    )
    exact = [isinstance(get_fp8_context(ends, layer), nullcontext) for layer in (0, 1, ends.num_layers - 1)]
    assert exact == [True, True, True] and ends.num_layers == 4
    # The third of the four layers is in FP8, whose context asks for a GPU.
    with pytest.raises((RuntimeError, AssertionError), match="(?i)cuda|gpu|driver|device"):
        get_fp8_context(ends, 2).__enter__()


def check_adam() -> None:
    from megatron_trd.mcore.acceleration import Machine

    machine = Machine.here()
    assert machine.adam == "transformer_engine" and machine.transformer_engine is not None
    assert machine.transformer_engine >= (2, 3)


def test_layers_and_recipes_are_those_that_were_asked_for(tmp_path: Path) -> None:
    make_model(tmp_path / "dense")
    make_model(tmp_path / "sparse", family="qwen3_moe", layers=4)
    spawn(inspect, 1, str(tmp_path))
