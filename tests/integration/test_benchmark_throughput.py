"""The throughput benchmark: what it reports is what happened, and the baseline it compares with computes the same."""

from __future__ import annotations

import json
import math
import runpy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from launch import ROOT, run, spawn
from megatron_trd.config.schema import Config, DataConfig, LoraConfig, MethodConfig, ModelConfig, ParallelConfig
from megatron_trd.planning.grid import Grid
from megatron_trd.planning.plan import Resources, make_plan, read_models
from megatron_trd.planning.workload import Lengths
from megatron_trd.throughput.lengths import LengthMix, draw_samples
from megatron_trd.throughput.measure import Step, live_bytes, look_into, spread, time_step
from megatron_trd.throughput.result import Result, summarize, table
from megatron_trd.throughput.stopwatch import Stopwatch
from megatron_trd.throughput.turns import Turn, compare, read_layout, take_turns
from megatron_trd.throughput.work import step_flops
from tiny_models import make_model

TOOL = ROOT / "tools" / "benchmark_throughput.py"
MODELS = ROOT / "examples" / "quickstart_cpu" / "models"
PROMPT, Y_O, Y_R, SEQUENCES = 20, 30, 40, 6
LENGTHS = (f"prompt=fixed:{PROMPT}", f"y_o=fixed:{Y_O}", f"y_r=fixed:{Y_R}")
MIXED = ("prompt=uniform:5:20", "y_o=uniform:10:40", "y_r=lognormal:20:0.6")
ARGUMENTS = (
    *("--hf-checkpoint", str(MODELS / "student"), "--teacher-hf-checkpoint", str(MODELS / "teacher"), "--mode", "opd"),
    *("--random-weights", "--global-batch-size", str(SEQUENCES), "--rollout-batch-size", str(SEQUENCES)),
    *("--max-tokens-per-micro-batch", "300", "--num-steps", "2", "--warmup-steps", "1", "--lengths", *MIXED),
)
LAYOUT = "TP=2,SP"
STUDENT, TEACHER = PROMPT + Y_R - 1, PROMPT + Y_O + Y_R - 1  # the last token is no input


def configured(**model: Any) -> Config:
    return Config(
        method=MethodConfig(mode="opd"),
        model=ModelConfig(
            hf_checkpoint=str(MODELS / "student"), teacher_hf_checkpoint=str(MODELS / "teacher"), **model
        ),
        data=DataConfig(trajectories="unused", global_batch_size=SEQUENCES, rollout_batch_size=SEQUENCES),
        parallel=ParallelConfig(),
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """A layout of two ranks and the baseline, in fp32."""
    directory = tmp_path_factory.mktemp("compared")
    done = run(
        [
            *(sys.executable, str(TOOL), *ARGUMENTS, "--no-bf16", "--baseline", "--repeats", "1"),
            *("--sweep", LAYOUT, "--json", f"{directory}/all.json", "--profile", f"{directory}/traces"),
        ],
        timeout_s=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "over baseline: " in done.stdout
    return json.loads((directory / "all.json").read_text()), directory


def test_tokens_are_those_of_the_samples(compared: tuple[dict[str, Any], Path]) -> None:
    config, mix = configured(), LengthMix.parse(MIXED)
    steps = [draw_samples(config, mix, SEQUENCES, 92, f"{config.data.seed}:{step}") for step in (1, 2)]  # 0 warms up
    prompts = [sum(len(s.student_prompt_ids) + len(s.teacher_prompt_ids) for s in step) for step in steps]
    responses = [sum(len(s.response_ids) for s in step) for step in steps]
    tokens = [p + 2 * (r - SEQUENCES) for p, r in zip(prompts, responses, strict=True)]  # the last one is no input
    for (result,) in compared[0]["runs"].values():
        assert (result["tokens"], result["response_tokens"]) == (tokens, responses)
        for name, counts in (("tokens", tokens), ("response_tokens", responses)):
            rate, seconds = result[f"{name}_per_s_per_gpu"], result["step_seconds"]
            assert rate["max"] * seconds["min"] <= max(counts) / result["world_size"] * (1 + 1e-9)
            assert rate["min"] * seconds["max"] >= min(counts) / result["world_size"] * (1 - 1e-9)
    assert compared[0]["runs"]["baseline"][0]["padding_share"]["min"] > 0.05
    assert compared[0]["runs"][LAYOUT][0]["padding_share"]["max"] < 0.01  # to a multiple of the two ranks


def test_parts_fill_the_step(compared: tuple[dict[str, Any], Path]) -> None:
    for name, (result,) in compared[0]["runs"].items():
        parts = {part: seconds["min"] for part, seconds in result["part_seconds"].items()}
        assert all(parts[part] > 0 for part in ("teacher forward", "student forward and backward", "optimizer")), name
        assert sum(parts.values()) <= result["step_seconds"]["max"], name
        assert (parts["pack"] > 0) == (name != "baseline")


def test_the_baseline_computes_the_same_loss(compared: tuple[dict[str, Any], Path]) -> None:
    found = compared[0]
    (baseline,), (ours,) = found["runs"]["baseline"], found["runs"][LAYOUT]
    assert ours["first_loss"] == pytest.approx(baseline["first_loss"], rel=1e-5)
    assert ours["losses"][0] != ours["losses"][1]  # other samples
    ratio = ours["tokens_per_s_per_gpu"]["median"] / baseline["tokens_per_s_per_gpu"]["median"]
    assert found["over_baseline"][LAYOUT]["tokens_per_s_per_gpu"]["median"] == pytest.approx(ratio)
    tokens_per_cpu_second = baseline["step_cpu_seconds"]["median"] / ours["step_cpu_seconds"]["median"]
    assert found["over_baseline"][LAYOUT]["tokens_per_cpu_second"]["median"] == pytest.approx(tokens_per_cpu_second)
    broken = {**baseline, "first_loss": 1.001 * baseline["first_loss"]}
    with pytest.raises(ValueError, match="do not compute the same"):
        compare([ours], [broken])


def test_communication_and_traces_are_of_every_rank(compared: tuple[dict[str, Any], Path]) -> None:
    found, directory = compared
    assert "communication_share" not in found["runs"]["baseline"][0]
    assert 0 < found["runs"][LAYOUT][0]["communication_share"] < 1
    for rank in range(2):
        trace = json.loads((directory / "traces" / LAYOUT / f"rank{rank}.json").read_text())
        assert any("gloo:" in str(event.get("name")) for event in trace["traceEvents"])


def test_a_layout_that_fails_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys\nsys.exit('error: --no-such 3: use another')\n")
    (result,) = take_turns([Turn(name="A", arguments=(), num_ranks=1)], 1, str(script), tmp_path)["A"]
    assert result == {"error": "error: --no-such 3: use another"}
    assert "A  failed: error: --no-such 3: use another" in table({"A": result})
    assert "--no-such" in capfd.readouterr().err


def two_steps(rank: int, world: int, config: Config) -> tuple[Step, dict[str, float], float, Result]:
    """Measure a job on random weights; return besides the sum of a tied vocabulary matrix."""
    from megatron_trd.throughput.ours import Ours

    ours = Ours(config, 0, num_steps=2, random_weights=True)
    chunk = ours.student.gpt.chunks[-1]
    tied = chunk.shared_embedding_or_output_weight().double().sum().item()
    batch = draw_samples(config, LengthMix.parse(LENGTHS), SEQUENCES, ours.vocab_size, "0")
    step, seen = time_step(ours, batch), look_into(ours, batch, None)
    result = summarize(config, [(batch, step)], seen, kind="ours", world_size=world, first_loss=step.loss, peak=0.05)
    return step, seen, tied, result


@pytest.mark.parametrize("grid", ["pipeline", "data"])
def test_any_layout_from_config_json_alone(grid: str, tmp_path: Path) -> None:
    whole = make_model(tmp_path / "whole", layers=2)
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text((whole / "config.json").read_text())
    pipeline = grid == "pipeline"
    config = Config(
        method=MethodConfig(opsd_teacher="initial" if pipeline else "current"),
        model=ModelConfig(hf_checkpoint=str(tmp_path / "shape"), recompute_granularity="full" if pipeline else "none"),
        parallel=ParallelConfig(
            pipeline_model_parallel_size=2 if pipeline else 1, use_distributed_optimizer=not pipeline
        ),
        lora=LoraConfig(lora_rank=0 if pipeline else 4),
        data=DataConfig(trajectories="unused", max_tokens_per_micro_batch=300),
    )
    ranks = spawn(two_steps, 2, config, timeout_s=120)
    assert ranks[0][2] == ranks[1][2] != 0
    for step, seen, _, result in ranks:
        assert step.loss == ranks[0][0].loss and math.isfinite(step.loss)
        assert (step.seconds, seen) == (ranks[0][0].seconds, ranks[0][1])  # the same on all ranks
        assert step.parts["teacher forward"] > 0 and step.parts["optimizer"] > 0
        assert 0 < seen["communication_share"] < 1 and seen["peak_gib"] > 0
        assert result["mfu"]["median"] == pytest.approx(result["model_flops"][0] / step.seconds / 2 / 0.05e12)
        assert result["grid"]["dp"] == (1 if pipeline else 2)
        assert (result["hardware_flops"][0] > result["model_flops"][0]) == pipeline


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flops_are_the_planners(recompute: str) -> None:
    config = configured(recompute_granularity=recompute)
    samples = draw_samples(config, LengthMix.parse(LENGTHS), SEQUENCES, 92, "0")
    resources = Resources.of(config, 1, "cpu")
    lengths = Lengths(prompt=PROMPT - 1, y_o=Y_O, y_r=Y_R, reference=1)  # the planner counts the last token
    plan = make_plan(config, resources, lengths=lengths)
    planned = sum(stage.flops for stage in plan.time.training)
    model, hardware = step_flops(config, read_models(config, Grid.of(config.parallel, 1), "cpu"), samples)
    assert hardware == pytest.approx(planned, rel=1e-12)
    assert (hardware > model) == (recompute == "full")


def test_selective_recompute_counts_what_it_repeats() -> None:
    config = configured(recompute_granularity="selective", recompute_modules=("core_attn", "mlp"))
    (sample,) = draw_samples(config, LengthMix.parse(LENGTHS), 1, 92, "0")
    shape = json.loads((MODELS / "student" / "config.json").read_text())
    attention = 2 * STUDENT**2 * shape["num_attention_heads"] * shape["head_dim"]
    mlp = 2 * STUDENT * 3 * shape["hidden_size"] * shape["intermediate_size"]
    model, hardware = step_flops(config, read_models(config, Grid.of(config.parallel, 1), "cpu"), [sample])
    assert hardware - model == pytest.approx(shape["num_hidden_layers"] * (attention + mlp))


class Allocates:
    """Holds 3 MiB, and 64 MiB more for a while."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.watch = Stopwatch(self.device)
        self.held = torch.zeros(3 * 2**20, dtype=torch.uint8)

    def step(self, samples: object) -> tuple[float, int, int]:
        for size in (16, 64, 32):
            torch.empty(size * 2**20, dtype=torch.uint8)
        return 0.0, 1, 1


def test_peak_is_what_was_held_and_the_most_beside_it() -> None:
    before = live_bytes()
    contender = Allocates()
    with FakeTensorMode():  # what a compiler leaves in its caches has no memory
        fake = torch.empty(2**20)
    assert live_bytes() - before == 3 * 2**20 and fake.numel() == 2**20
    peak = look_into(contender, [], None)["peak_gib"] * 2**30
    assert peak == pytest.approx(before + 67 * 2**20, abs=2**16)


def test_lengths_follow_their_distributions() -> None:
    config = configured()
    mix = LengthMix.parse(["prompt=uniform:5:9", "y_r=lognormal:100:0.5", "y_o=fixed:7"])
    samples = draw_samples(config, mix, 400, 92, "0")
    prompts = {len(sample.student_prompt_ids) for sample in samples}
    responses = spread(len(sample.response_ids) for sample in samples)
    assert prompts == {5, 6, 7, 8, 9}
    assert responses["median"] == pytest.approx(100, rel=0.15)
    logs = torch.tensor([len(sample.response_ids) for sample in samples]).log()
    assert statistics.stdev(logs.tolist()) == pytest.approx(0.5, rel=0.15)
    assert all(len(s.teacher_prompt_ids) == len(s.student_prompt_ids) + 7 for s in samples)
    assert draw_samples(config, mix, 400, 92, "0") == samples != draw_samples(config, mix, 400, 92, "1")


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    return runpy.run_path(str(TOOL), run_name="megatron_trd.benchmark_throughput")["main"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--lengths", "prompt=gamma:3"], "--lengths prompt gamma:3: give fixed:N"),
        (["--lengths", "y_o=uniform:9:3"], "--lengths y_o uniform:9:3: give"),
        (["--lengths", "answer=fixed:3"], "--lengths answer=fixed:3: give NAME=DISTRIBUTION"),
        (["--num-steps", "0"], "--num-steps 0: give 1 or more"),
        (["--sweep", "TP=2;XP=3"], "--sweep XP=3: give TP"),
        (["--sweep", "TP=2", "--num-gpus", "3"], "--num-gpus 3: must be a multiple of the 2 ranks"),
        (["--baseline", "--divergence", "reverse-kl"], "--divergence reverse-kl: the baseline has only"),
        (["--baseline", "--lora-rank", "4"], "--lora-rank 4: the baseline has only"),
    ],
)
def test_wrong_flags_are_named(
    main: Callable[[list[str]], None], wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*ARGUMENTS, *wrong])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_layouts_may_name_any_flag() -> None:
    assert read_layout("TP=2, SP,recompute-granularity=full") == [
        *("--tensor-model-parallel-size", "2", "--sequence-parallel", "--recompute-granularity", "full")
    ]
