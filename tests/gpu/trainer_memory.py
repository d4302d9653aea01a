"""Bytes of real steps beside the planner's, what offloading and recomputing save, and that they change no gradient."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu.dense_model import Shape, write_model
from gpu.harness import Check, Context, Rows
from gpu.trainer_accuracy import error, flat
from gpu.trainer_runs import Run, begin, need_transformer_engine, runs
from megatron_trd.config.schema import Config, DataConfig, LoraConfig, MethodConfig, ModelConfig, ObjectiveConfig

CASES: dict[str, dict[str, Any]] = {
    "local": {"transformer_impl": "local"},
    "te": {"transformer_impl": "auto"},
    "full": {"recompute_granularity": "full"},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")},
    "lora": {},
}
PLAN_LIMIT = 0.10


def plan(case: str) -> Check:
    """Make the check of one setting: the allocator's peak beside the planner's, and the state's bytes exactly."""

    def check(context: Context) -> Rows:
        cuda = context.device.type == "cuda"
        if case == "te" or (cuda and case != "local"):
            need_transformer_engine(context)
        from megatron.core import parallel_state

        from plan_measure import VOCAB, measure, predict

        begin(context)
        rows = Rows()
        shape = Shape(
            hidden=context.pick(1024, 256),
            ffn=context.pick(3072, 768),
            layers=context.pick(8, 4),
            heads=8,
            kv_heads=4,
            head_dim=context.pick(128, 32),
            vocab=VOCAB,
        )
        number = context.pick(48, 4)
        with tempfile.TemporaryDirectory() as folder:
            config = Config(
                method=MethodConfig(opsd_teacher="current"),
                model=ModelConfig(hf_checkpoint=str(write_model(Path(folder, "model"), shape, 0)), **CASES[case]),
                objective=ObjectiveConfig(kl_workspace_mb=context.pick(64, 8)),
                lora=LoraConfig(lora_rank=16 if case == "lora" else 0),
                data=DataConfig(trajectories="unused", max_tokens_per_micro_batch=260 * number),
            )
            parallel_state.destroy_model_parallel()
            measured = measure(0, 1, config, number)
            layers = "cpu" if not cuda else "local" if case == "local" else "te"
            planned = predict(config, 1, measured, layers)
        state = planned.state
        main_and_moments = state["main weights (fp32)"] + state["AdamW moments"]
        for what, got, want in (
            ("parameters", measured.parameters, state["student weights"] + state["adapters"]),
            ("gradients", measured.gradients, state["gradients (fp32)"]),
            ("main weights and moments", measured.optimizer, main_and_moments),
        ):
            rows.at_most(
                f"{what}, planned over measured", abs(want / got - 1), 0.01, note=f"{want:,} and {got:,} bytes"
            )
        peak = planned.total - sum(state.values())
        note = f"{peak:,.0f} and {measured.peak:,} bytes"
        rows.at_most("rest of the peak, planned over measured", abs(peak / measured.peak - 1), PLAN_LIMIT, note=note)
        return rows

    return check


def peak_of(run: Run) -> tuple[torch.Tensor, int]:
    """Return a step's gradients, and what its second run held at its highest."""
    run.gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run.student.accumulate_gradients(run.batch(), run.teacher)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = run.gradients()[1]
    return flat(gradients, sorted(gradients)), peak


def cheaper(settings: dict[str, Any]) -> Check:
    """Make the check of a way to hold fewer activations: less memory, the same gradients."""

    def check(context: Context) -> Rows:
        need_transformer_engine(context)
        rows = Rows()
        with runs(context) as made:
            gradients, peak = peak_of(made.open())
            torch.cuda.empty_cache()
            less_gradients, less_peak = peak_of(made.open(**settings))
        rows.at_most("gradients", error(less_gradients, gradients), 2e-3, note="0 = the same bits")
        rows.at_most(
            "peak of a step, over that without", less_peak / peak, 0.95, note=f"{less_peak:,} of {peak:,} bytes"
        )
        return rows

    return check


def offload_teacher(context: Context) -> Rows:
    """Check that the teacher's weights leave the device between its forward passes, and teach the same."""
    rows, cuda = Rows(), context.device.type == "cuda"
    with runs(context) as made:
        plain = made.open(bf16=cuda)
        want = [row.clone() for row in plain.teacher.rows([m.to(plain.device).teacher for m in plain.batch()])]
        del plain
        run = made.open(bf16=cuda, offload_teacher=True)
        teacher = run.teacher
        held = torch.cuda.memory_allocated() if cuda else 0
        got = list(teacher.rows([m.to(run.device).teacher for m in run.batch()]))
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            rows.equal(f"hidden states of micro-batch {index}", a, b)
        kept = {p.data_ptr() for p in teacher._model.parameters() if p.device.type == "cuda"}
        head = {teacher.output_weight.data_ptr()} if cuda else set()
        rows.at_most("weights on the device that are not the head", len(kept - head), 0)
        del got
        if cuda:
            torch.cuda.synchronize()
            grown = torch.cuda.memory_allocated() - held
            rows.at_most("bytes left behind, over those offloaded", grown / teacher._offloaded.num_bytes, 0.05)
    return rows


CHECKS: dict[str, Check] = {
    **{f"plan-{case}": plan(case) for case in CASES},
    "recompute-full": cheaper({"recompute_granularity": "full"}),
    "recompute-selective": cheaper({"recompute_granularity": "selective", "recompute_modules": ("layernorm", "mlp")}),
    "cpu-offloading": cheaper({"cpu_offloading_num_layers": 2}),
    "offload-teacher": offload_teacher,
}
