"""The planner's numbers against models, operators and closed forms; its tool from flags to verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM

from launch import ROOT
from megatron_trd.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
)
from megatron_trd.mcore.layouts import FAMILIES
from megatron_trd.mcore.stages import Stages
from megatron_trd.planning import flops, loss
from megatron_trd.planning.activations import Precision
from megatron_trd.planning.devices import DEVICES, Assumptions, this_device
from megatron_trd.planning.grid import Grid
from megatron_trd.planning.model_shape import SUPPORTED, ModelShape, num_parameters, read_model_shape
from megatron_trd.planning.plan import Resources, RunPlan, make_plan
from megatron_trd.planning.servers import ServerGroup
from megatron_trd.planning.sweep import remedies, sweep
from megatron_trd.planning.workload import Lengths
from trd_kernels import DEFAULT_WORKSPACE_MB, linear_kl_div
from trd_kernels.heads import Heads
from trd_kernels.torch_rows import TorchRows
from trd_kernels.workspace import ChunkSizes

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
SMALL = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "vocab_size": 500}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "mlp_only_layers": [1]}


def write(path: Path, config: dict[str, object]) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def qwen3_8b(tmp_path: Path) -> str:
    return write(tmp_path / "qwen3-8b", QWEN3_8B)


def run_config(path: str, **sections: object) -> Config:
    return Config(
        **{
            "model": ModelConfig(hf_checkpoint=path),
            "rollout": RolloutConfig(student_urls=("http://a",), teacher_urls=("http://b",)),
            **sections,
        }
    )


def plan_of(config: Config, gpus: int = 8, gpu: str = "h100-80gb") -> RunPlan:
    return make_plan(config, Resources.of(config, gpus, gpu))


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
        ("qwen3_moe", {"head_dim": 32, "tie_word_embeddings": False, **EXPERTS}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": False}),
    ],
)
def test_parameters_are_those_of_transformers(tmp_path: Path, family: str, extra: dict[str, object]) -> None:
    config = AutoConfig.for_model(family, **SMALL, **HEADS, **extra)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert num_parameters(read_model_shape(tmp_path, "hf-checkpoint")) == model.num_parameters()


def test_every_family_of_the_trainer_can_be_planned(qwen3_8b: str) -> None:
    assert set(SUPPORTED) == set(FAMILIES)
    assert num_parameters(read_model_shape(qwen3_8b, "hf-checkpoint")) == 8_190_735_360  # what its card says


@pytest.mark.parametrize("rank", [0, 8])
def test_flops_are_what_a_counter_sees(tmp_path: Path, rank: int) -> None:
    """Transformers with attention written out: its backward pass has no flash attention's fifth product."""
    config = AutoConfig.for_model("qwen3", **SMALL, **HEADS, head_dim=32, attn_implementation="eager")
    config.save_pretrained(tmp_path)
    model, tokens = AutoModelForCausalLM.from_config(config), 96
    shape = read_model_shape(tmp_path, "hf-checkpoint")
    for parameter in model.parameters():
        parameter.requires_grad_(not rank)
    hidden = torch.randn(1, tokens, 128, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.model(inputs_embeds=hidden).last_hidden_state.sum().backward()
    layers = [
        flops.layer_training(shape, layer, tokens=tokens, mean_length=tokens, lora_rank=rank, causal=False)
        for layer in range(4)
    ]
    adapters = sum(6 * tokens * flops.adapter_products(shape, layer, rank) for layer in range(4))
    attention = sum(layer.attention for layer in layers) * 3 / (1 + flops.FLASH_BACKWARD)
    planned = sum(layer.linear for layer in layers) - adapters + attention
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.01)
    q = (1, 8, tokens, 32)
    assert sdpa_backward_flop_count(q, q, q, q) == flops.FLASH_BACKWARD * sdpa_flop_count(q, q, q)


@pytest.mark.parametrize("learns", [False, True])
def test_flops_of_the_loss(qwen3_8b: str, learns: bool) -> None:
    big = read_model_shape(qwen3_8b, "hf-checkpoint")
    student, teacher = (replace(big, hidden_size=width, vocab_size=384) for width in (32, 48))
    rows, heads = [torch.randn(64, w, requires_grad=w == 32) for w in (32, 48)], [torch.randn(384, w) for w in (32, 48)]
    count_in_place = {torch.ops.aten.addmm_: lambda self, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=count_in_place) as counter:
        linear_kl_div(rows[0], heads[0].requires_grad_(learns), rows[1], heads[1], vocab_size=384).loss.backward()
    assert counter.get_total_flops() == flops.loss_heads(student, teacher, response_tokens=64, head_learns=learns)


@pytest.mark.parametrize(("element", "dtype"), [(2, torch.bfloat16), (4, torch.float32)])
@pytest.mark.parametrize("implementation", ["cpu", "te"])
def test_chunks_of_the_loss_are_the_operators(element: int, dtype: torch.dtype, implementation: str) -> None:
    assert loss.DEFAULT_WORKSPACE_MB == DEFAULT_WORKSPACE_MB
    on_cpu, columns, weight = implementation == "cpu", 3000, torch.empty(1, 1, dtype=dtype)
    rows = TorchRows() if on_cpu else pytest.importorskip("trd_kernels.triton_rows").TritonRows()
    heads = Heads(
        student_input=weight,
        student_weight=weight,
        teacher_input=weight,
        teacher_weight=weight,
        num_padding=0,
        compute_dtype=torch.float32,
        operand_dtype=torch.float32 if on_cpu else dtype,
    )
    for budget in (3, 150, 1200):
        expected = ChunkSizes.within(budget, heads=heads, rows=rows, columns=columns, with_grad=True)
        planned = loss.chunk_tokens(budget, columns, Precision(element=element, implementation=implementation))
        assert planned == tuple(expected)


@pytest.mark.parametrize("virtual", [1, 3])
def test_layers_are_where_the_trainer_puts_them(qwen3_8b: str, virtual: int) -> None:
    shape = read_model_shape(qwen3_8b, "hf-checkpoint")
    parallel = ParallelConfig(pipeline_model_parallel_size=4, num_virtual_stages_per_pipeline_rank=virtual)
    grid, stages = Grid.of(parallel, 8), Stages(num_layers=36, pp_size=4, chunks_per_rank=virtual)
    for layer in range(36):
        stage = stages.home(f"decoder.layers.{layer}.x").pp_rank
        assert layer in grid.layers_of(shape, stage)
    assert sum(len(grid.layers_of(shape, stage)) for stage in range(4)) == 36


def test_bubble_and_micro_batches_in_flight() -> None:
    grid = Grid.of(ParallelConfig(pipeline_model_parallel_size=4), 4)
    assert [grid.chunks_in_flight(stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert grid.chunks_in_flight(0, 2) == 2
    assert grid.bubble_share(9) == 3 / 12


def test_a_server_holds_and_drains(qwen3_8b: str) -> None:
    shape = read_model_shape(qwen3_8b, "hf-checkpoint")
    slow = replace(DEVICES["h100-80gb"], memory_tb_s=1e9, bf16_tflops=1e9)  # nothing but the overhead takes time
    group = ServerGroup(shape=shape, gpus=4, tp=2, device=slow, assumptions=Assumptions(decode_overhead_ms=1000.0))
    assert group.kv_bytes_per_token == 2 * 4 * 128 * 36 * 2
    free = 79.6 * 2**30 * 0.88 - 8_190_735_360
    assert group.cached_tokens == int(free // group.kv_bytes_per_token)
    longest, mean, batch = 1000.0, 250.0, 64
    seconds = group.decode_seconds(2 * batch, prompt=10, mean=mean, longest=longest, at_most=1000)
    last = longest * (1 - (0.5 / batch) ** (1 / (longest / mean - 1)))  # where less than half a sequence is left
    assert seconds == pytest.approx(last, abs=longest / 64)
    waiting = group.decode_seconds(6 * batch, prompt=10, mean=mean, longest=longest, at_most=2 * batch)
    assert waiting == pytest.approx(seconds + 2 * mean)


def test_a_remedy_is_one(qwen3_8b: str) -> None:
    config = run_config(qwen3_8b, lora=LoraConfig(lora_rank=64))
    plan = plan_of(config)
    assert not plan.training_fits
    best = remedies(plan)[0]
    assert best.flags == "--context-parallel-size 2" and best.plan.training_fits
    followed = replace(config, parallel=replace(config.parallel, context_parallel_size=2))
    assert plan_of(followed).needed_gib(plan_of(followed).worst) == best.needed_gib < plan.needed_gib(plan.worst)


def test_a_sweep_sorts_what_fits_and_says_why_the_rest_does_not(qwen3_8b: str) -> None:
    found = sweep(plan_of(run_config(qwen3_8b), gpus=16, gpu="a100-80gb"))
    seconds = [plan.time.seconds for plan in found.fitting]
    assert seconds == sorted(seconds) and len(seconds) > 5
    assert all(plan.training_fits and plan.grid.tp <= 8 for plan in found.fitting)
    assert any("does not fit" in reason for reason in found.refused)


def test_published_hours_are_in_reach(qwen3_8b: str, tmp_path: Path) -> None:
    """One epoch of 40,245 problems on 8 H100 (arXiv 2606.08432): servers and training within a factor of five.

    The paper trains with FSDP2 and rolls out with vLLM: this is a test of magnitudes, and nothing is tuned to it.
    """
    smaller = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    small = write(tmp_path / "qwen3-1.7b", QWEN3_8B | smaller | {"tie_word_embeddings": True})
    lengths = Lengths(prompt=150, y_o=7700, y_r=880, reference=500)
    for student, teacher, y_o, y_r, train in ((qwen3_8b, None, 4.33, 2.83, 2.17), (small, qwen3_8b, 3.5, 4.0, 0.67)):
        config = Config(
            method=MethodConfig(mode="opd" if teacher else "opsd"),
            model=ModelConfig(hf_checkpoint=student, teacher_hf_checkpoint=teacher, recompute_granularity="full"),
            parallel=ParallelConfig(use_distributed_optimizer=True),
            lora=LoraConfig(lora_rank=64, lora_dropout=0.05),
            data=DataConfig(num_iterations=1, rollout_batch_size=40_192),
            rollout=RolloutConfig(
                student_urls=("http://a",),
                teacher_urls=("http://b",),
                max_concurrent_requests=2048,
                max_refine_prompt_tokens=22_528,
            ),
        )
        plan = make_plan(config, Resources.of(config, 8, "h100-80gb"), lengths=lengths)
        hours = [
            sum(s.seconds for s in plan.time.generation if s.name.startswith(what)) / 3600 for what in ("y_o", "y_r")
        ]
        hours.append(sum(s.seconds for s in plan.time.training) / 3600)
        for planned, published in zip(hours, (y_o, y_r, train), strict=True):
            assert 0.2 < planned / published < 5, (hours, (y_o, y_r, train))
        assert plan.training_fits  # as theirs did


def test_the_tool_needs_a_config_and_no_torch(qwen3_8b: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / "plan_run.py"), "--hf-checkpoint", qwen3_8b]
    command += ["--num-gpus", "64", "--gpu", "h200", "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert imported & {"megatron_trd.planning.plan"} and not imported & {"torch", "transformers", "megatron.core"}
    numbers = json.loads((tmp_path / "plan.json").read_text())
    (stage,) = numbers["memory"]
    assert stage["bytes"]["student weights"] == 2 * 8_190_735_360
    assert ("verdict: fits" in done.stdout) == numbers["fits"]
    assert "train_efficiency 0.4" in done.stdout


@pytest.mark.parametrize(
    ("gpus", "gpu", "server_tp", "message"),
    [
        (8, "v100", 1, "--gpu v100: is not in the table; use one of h100-80gb"),
        (6, "h200", 1, "--num-gpus 6: must be a multiple of the 4 ranks"),
        (8, "h200", 3, "--student-server-gpus 8: must be a positive multiple of --server-tp 3"),
    ],
)
def test_wrong_flags_name_the_remedy(qwen3_8b: str, gpus: int, gpu: str, server_tp: int, message: str) -> None:
    config = run_config(qwen3_8b, parallel=ParallelConfig(tensor_model_parallel_size=4))
    with pytest.raises(ValueError, match=message):
        make_plan(config, Resources.of(config, gpus, gpu, server_tp=server_tp))


def test_devices_are_found_by_the_drivers_name() -> None:
    assert this_device("NVIDIA H200") == "h200"
    assert this_device("NVIDIA GeForce RTX 4090") == "rtx4090"
    assert this_device(None) == "h100-80gb"
    assert isinstance(DEVICES[this_device("NVIDIA A100-SXM4-80GB")].memory_gib, float)


def test_a_config_that_lacks_a_size_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "broken", {k: v for k, v in QWEN3_8B.items() if k != "vocab_size"})
    with pytest.raises(ValueError, match=r"--hf-checkpoint .*: config.json has no 'vocab_size'"):
        read_model_shape(path, "hf-checkpoint")


def test_a_wider_grid_holds_less(qwen3_8b: str) -> None:
    """Each way to split a model shrinks what it splits: exactly, where it is a matter of counting."""
    one = plan_of(run_config(qwen3_8b), gpus=16).stages[0]
    sharded = run_config(qwen3_8b, parallel=ParallelConfig(use_distributed_optimizer=True))
    assert plan_of(sharded, gpus=16).stages[0].state["AdamW moments"] * 16 == one.state["AdamW moments"]
    context = run_config(qwen3_8b, parallel=ParallelConfig(context_parallel_size=4))
    half = plan_of(context, gpus=16).stages[0].moments["loss"]["activations"]
    assert half * 4 == pytest.approx(one.moments["loss"]["activations"], rel=1e-6)
    shape: ModelShape = read_model_shape(qwen3_8b, "hf-checkpoint")
    tensor = run_config(qwen3_8b, parallel=ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True))
    norms = (2 * shape.num_layers + 1) * shape.hidden_size + 2 * shape.num_layers * shape.head_dim
    planned = plan_of(tensor, gpus=16).stages[0].state["student weights"] // 2
    assert planned == (num_parameters(shape) - norms) // 8 + norms
