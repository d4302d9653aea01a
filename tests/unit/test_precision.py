"""Which layers, precision and optimizer a run gets on which machine, and what is refused there. No GPU is asked."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from megatron_trd.config.cli import parse_config
from megatron_trd.config.schema import Config, DataConfig, LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_trd.data.packing import Multiples, pack_in_order
from megatron_trd.mcore.acceleration import Acceleration, Machine, choose, describe, require_shapes
from megatron_trd.mcore.hf_config import read_hf_model
from megatron_trd.mcore.packages import refuse_impostors
from tiny_models import make_model, make_samples

CPU = Machine(compute_capability=None, cuda=None, transformer_engine=None, adam="torch", apex_wgrad=False)
PLAIN_GPU = replace(CPU, compute_capability=(9, 0), cuda=(13, 0))
APEX = replace(PLAIN_GPU, adam="apex", apex_wgrad=True)
HOPPER = replace(PLAIN_GPU, transformer_engine=(2, 20), adam="transformer_engine")


def model(**settings: object) -> ModelConfig:
    return ModelConfig(hf_checkpoint="student", **settings)


def run(machine: Machine, *, lora: int = 0, sparse: bool = False, **sections: object) -> str:
    sections = {"model": model(), "data": DataConfig(trajectories="t"), **sections}
    return describe(Config(**sections, lora=LoraConfig(lora_rank=lora)), machine, sparse=sparse)


@pytest.mark.parametrize(
    ("machine", "settings", "lora", "expected"),
    [
        (CPU, {}, False, ("local", "no CUDA", False)),
        (PLAIN_GPU, {}, False, ("local", "no Transformer Engine", False)),
        (APEX, {}, False, ("local", "no Transformer Engine", True)),
        (APEX, {}, True, ("local", "no Transformer Engine", False)),
        (HOPPER, {}, False, ("transformer_engine", "version 2.20", True)),
        (HOPPER, {"gradient_accumulation_fusion": False}, False, ("transformer_engine", "version 2.20", False)),
        (HOPPER, {"transformer_impl": "local"}, False, ("local", "--transformer-impl local", False)),
        (HOPPER, {"fp8_format": "hybrid"}, True, ("transformer_engine", "version 2.20", False)),
    ],
)
def test_layers_and_fusion_follow_the_machine(machine: Machine, settings: dict, lora: bool, expected: tuple) -> None:
    layers, reason, fused = expected
    assert choose(model(**settings), machine, lora=lora) == Acceleration(
        layers=layers, reason=reason, fused_wgrad=fused
    )


def fp8(recipe: str) -> dict[str, str]:
    return {"fp8_format": "hybrid", "fp8_recipe": recipe}


OLD_CUDA = replace(HOPPER, cuda=(12, 4))
OLD_TE = replace(HOPPER, transformer_engine=(2, 0))
ADA, AMPERE = replace(HOPPER, compute_capability=(8, 9)), replace(HOPPER, compute_capability=(8, 0))
BLACKWELL, CONSUMER = replace(HOPPER, compute_capability=(10, 0)), replace(HOPPER, compute_capability=(12, 0))


@pytest.mark.parametrize(
    ("machine", "settings", "message"),
    [
        (
            CPU,
            fp8("delayed"),
            "--fp8-format hybrid: needs CUDA and Transformer Engine, but there is no CUDA; leave it out",
        ),
        (PLAIN_GPU, fp8("delayed"), "--fp8-format hybrid: needs .* but there is no Transformer Engine; leave it out"),
        (CPU, {"transformer_impl": "transformer_engine"}, "--transformer-impl transformer_engine: needs .* no CUDA"),
        (
            PLAIN_GPU,
            {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "layernorm")},
            "--recompute-modules layernorm: needs .* no Transformer Engine",
        ),
        (
            PLAIN_GPU,
            {"recompute_granularity": "selective", "recompute_modules": ("moe_act",)},
            "--recompute-modules moe_act: needs .* no Transformer Engine",
        ),
        (CPU, {"cpu_offloading_num_layers": 2}, "--cpu-offloading-num-layers 2: needs .* no CUDA"),
        (
            AMPERE,
            fp8("delayed"),
            "--fp8-recipe delayed: needs compute capability 8.9 or newer, but this is 8.0; leave out --fp8-format",
        ),
        (AMPERE, fp8("tensorwise"), "--fp8-recipe tensorwise: needs compute capability 8.9"),
        (
            ADA,
            fp8("blockwise"),
            "--fp8-recipe blockwise: needs compute capability 9.0 .* is 8.9; use --fp8-recipe delayed",
        ),
        (HOPPER, fp8("mxfp8"), "--fp8-recipe mxfp8: needs compute capability 10.0 .* is 9.0"),
        (CONSUMER, fp8("mxfp8"), "--fp8-recipe mxfp8: compute capability 12.0 has not all of its products"),
        (OLD_TE, fp8("tensorwise"), "--fp8-recipe tensorwise: needs Transformer Engine 2.2 or newer, but this is 2.0"),
        (OLD_TE, fp8("blockwise"), "--fp8-recipe blockwise: needs Transformer Engine 2.3"),
        (OLD_CUDA, fp8("blockwise"), "--fp8-recipe blockwise: needs CUDA 12.9 or newer, but this is 12.4"),
    ],
)
def test_what_a_machine_lacks_is_refused(machine: Machine, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(model(**settings), machine, lora=False)


@pytest.mark.parametrize(
    ("machine", "recipes"),
    [
        (ADA, ["delayed", "tensorwise"]),
        (HOPPER, ["delayed", "tensorwise", "blockwise"]),
        (BLACKWELL, ["delayed", "tensorwise", "blockwise", "mxfp8"]),
        (CONSUMER, ["delayed", "tensorwise", "blockwise"]),
        (OLD_TE, ["delayed"]),
        (OLD_CUDA, ["delayed", "tensorwise"]),
    ],
)
def test_recipes_of_a_machine(machine: Machine, recipes: list[str]) -> None:
    def works(recipe: str) -> bool:
        try:
            choose(model(**fp8(recipe)), machine, lora=False)
        except ValueError:
            return False
        return True

    assert [recipe for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8") if works(recipe)] == recipes


def test_one_line_says_what_was_chosen_and_why() -> None:
    assert run(CPU) == (
        "layers: local (no CUDA); attention: torch SDPA; grouped GEMM: none (no experts); precision: bf16, gradients "
        "fp32; optimizer: torch AdamW (neither Transformer Engine nor apex); gradient-accumulation fusion: head (no "
        "apex kernel for local layers)"
    )
    assert run(HOPPER, sparse=True, model=model(fp8_format="e4m3", fp8_recipe="tensorwise")) == (
        "layers: transformer_engine (version 2.20); attention: Transformer Engine; grouped GEMM: Transformer Engine; "
        "precision: fp8 e4m3 tensorwise in the layers, else bf16, gradients fp32; optimizer: Transformer Engine "
        "FusedAdam; gradient-accumulation fusion: layers and head"
    )
    line = run(APEX, lora=4, model=model(bf16=False))
    assert "attention: torch varlen" in line and "precision: fp32" in line and "apex FusedAdam" in line
    assert line.endswith("gradient-accumulation fusion: none (the base is frozen)")
    assert run(CPU, model=model(gradient_accumulation_fusion=False)).endswith("off (--no-gradient-accumulation-fusion)")


def test_a_fused_optimizer_without_a_gpu_is_refused_where_there_is_one_to_build() -> None:
    machine = replace(CPU, transformer_engine=(2, 20), adam="transformer_engine")
    assert choose(model(), machine, lora=False).layers == "local"
    with pytest.raises(ValueError, match="transformer_engine: is installed, .* needs CUDA; uninstall it"):
        run(machine)


def test_optimizer_state_goes_to_the_cpu_only_from_a_gpu_with_transformer_engine() -> None:
    sections = {
        "optimizer": OptimizerConfig(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5),
        "parallel": ParallelConfig(use_distributed_optimizer=True),
    }
    for machine, missing in ((CPU, "CUDA"), (APEX, "Transformer Engine")):
        with pytest.raises(ValueError, match=f"--optimizer-cpu-offload: needs .* but there is no {missing}; leave"):
            run(machine, **sections)
    assert "torch AdamW on the CPU for 50% of the weights, else Transformer Engine FusedAdam" in run(HOPPER, **sections)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8_format": "hybrid", "bf16": False}, "--fp8-format hybrid: .* leave out --no-bf16"),
        ({"fp8_format": "e4m3", "transformer_impl": "local"}, "--fp8-format e4m3: .* use --transformer-impl"),
        ({"fp8_format": "hybrid", "first_last_layers_bf16": True}, "--first-last-layers-bf16 True: .* use tensorwise"),
        ({"fp8_amax_history_len": 0}, "--fp8-amax-history-len 0: give 1 or more"),
        ({"recompute_modules": ("core_attn", "qkv")}, "--recompute-modules qkv: use any of core_attn"),
        ({"recompute_modules": ()}, "--recompute-modules .*: name one"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ("layernorm",), "fp8_format": "hybrid"},
            "--recompute-modules layernorm: does not go with --fp8-recipe delayed",
        ),
        ({"cpu_offloading_num_layers": 1, "transformer_impl": "local"}, "--cpu-offloading-num-layers 1: needs"),
        ({"cpu_offloading_num_layers": 1, "recompute_granularity": "full"}, "does not go with --recompute-granularity"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute_granularity": "full", "recompute_num_layers": 3}, "--recompute-num-layers 3: must divide the 2"),
        ({"recompute_granularity": "selective", "recompute_modules": ("moe",)}, "--recompute-modules moe: .* no such"),
        ({"cpu_offloading_num_layers": 2}, "--cpu-offloading-num-layers 2: must be less than the 2 layers"),
        # Queries, keys and values of 4 + 2 * 2 heads of 32 make 64 on each of 4 ranks; a feed-forward of 96 makes 24.
        ({"fp8_format": "hybrid"}, "--fp8-format hybrid: the feed-forward width of a rank must be a multiple of 16"),
    ],
)
def test_flags_that_do_not_fit_the_model_are_refused_without_a_gpu(
    tmp_path: Path, settings: dict, message: str
) -> None:
    hf = read_hf_model(make_model(tmp_path), "hf-checkpoint", 1)
    parallel = ParallelConfig(tensor_model_parallel_size=4 if "fp8_format" in settings else 1)
    config = Config(model=model(), parallel=parallel, data=DataConfig(trajectories="t"))
    require_shapes(config, hf)
    with pytest.raises(ValueError, match=message):
        require_shapes(replace(config, model=model(**settings)), hf)


@pytest.mark.parametrize(
    ("grid", "recipe", "stream"),
    [
        (ParallelConfig(), "delayed", 16),
        (ParallelConfig(), "mxfp8", 32),
        (ParallelConfig(tensor_model_parallel_size=4), "delayed", 16),
        (ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True), "delayed", 64),
        (ParallelConfig(context_parallel_size=3), "delayed", 48),
        (
            ParallelConfig(context_parallel_size=3, tensor_model_parallel_size=2, sequence_parallel=True),
            "blockwise",
            96,
        ),
    ],
)
def test_fp8_gives_every_rank_whole_blocks_of_tokens(grid: ParallelConfig, recipe: str, stream: int) -> None:
    multiples = Multiples.of(grid, model(**fp8(recipe)).tokens_multiple)
    assert multiples.stream == stream and multiples.stream % multiples.sequence == 0
    batch = pack_in_order(make_samples(3), multiples)
    ranks = grid.context_parallel_size * (grid.tensor_model_parallel_size if grid.sequence_parallel else 1)
    for packed in (batch.student, batch.teacher):
        assert packed.input_ids.numel() % (ranks * model(**fp8(recipe)).tokens_multiple) == 0
    assert Multiples.of(grid) == Multiples.of(grid, model().tokens_multiple)


def test_flags_arrive_as_megatron_spells_them() -> None:
    line = (
        "--hf-checkpoint student --trajectories t --fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16 "
        "--recompute-granularity none --recompute-modules mlp core_attn --no-gradient-accumulation-fusion"
    )
    expected = model(
        fp8_format="hybrid",
        fp8_recipe="tensorwise",
        first_last_layers_bf16=True,
        recompute_granularity="none",
        recompute_modules=("mlp", "core_attn"),
        gradient_accumulation_fusion=False,
    )
    assert parse_config(line.split()).model == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"transformer_engine/libs/x": ""}, "transformer_engine: left over from an uninstalled .* delete the folder"),
        (
            {"transformer_engine/__init__.py": "raise RuntimeError('Found empty meta package\\ninstalled.')"},
            "does not import .Found empty meta package.; install transformer-engine.pytorch",
        ),
        ({"transformer_engine/__init__.py": ""}, "does not import .No module named 'transformer_engine.pytorch'."),
        ({"apex/__init__.py": "raise SystemExit"}, "not NVIDIA's apex, but a project of the same name"),
        ({"apex/__init__.py": "", "apex/optimizers/__init__.py": ""}, "without its kernels .amp_C."),
        ({"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "amp_C.py": ""}, None),
        ({}, None),
    ],
)
def test_packages_that_only_bear_the_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], message: str | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with mock.patch.dict(sys.modules):  # what is imported here is forgotten behind it
        for name in [name for name in sys.modules if name.split(".")[0] in ("transformer_engine", "apex", "amp_C")]:
            del sys.modules[name]
        monkeypatch.syspath_prepend(tmp_path)
        with nullcontext() if message is None else pytest.raises(ImportError, match=message):
            refuse_impostors()
