"""Loss and gradients of a trainer's step beside the dense model's in fp64, in every kind of layer and precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gpu.dense_model import Weights, reference
from gpu.harness import Check, Context, Rows, Skipped
from gpu.trainer_runs import Run, Runs, need_transformer_engine, runs
from megatron_trd.config.schema import LoraConfig

LORA = LoraConfig(lora_rank=16, lora_alpha=32.0)
FLOORS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
FP8_COSINE_DISTANCE = 0.1


def flat(gradients: Weights, names: list[str]) -> Tensor:
    """Return all gradients as one vector."""
    return torch.cat([gradients[name].double().flatten() for name in names])


def error(got: Tensor, want: Tensor) -> float:
    """Return the relative Frobenius error."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def references(made: Runs, run: Run, dtype: torch.dtype) -> tuple[tuple[float, Weights], tuple[float, Weights]]:
    """Return what is right, and what the dense model makes of it in the run's precision: the yardstick."""
    adapter = None
    if run.config.lora.lora_rank:
        lora = run.config.lora
        adapter = {n: t.detach().clone() for n, t in run.student.export_adapter()}, lora.lora_alpha / lora.lora_rank
    exact, yardstick = (
        reference(*made.paths, made.shapes, run.samples, kind, run.device, adapter) for kind in (torch.float64, dtype)
    )
    return exact, yardstick


def compare(made: Runs, run: Run, rows: Rows, what: str) -> Weights:
    """Add loss, all gradients together and the worst one, each with the yardstick's error as its limit."""
    dtype = torch.bfloat16 if run.config.model.bf16 else torch.float32
    (loss, want), (near_loss, near) = references(made, run, dtype)
    got_loss, got = run.gradients()
    names, floor = sorted(want), FLOORS[dtype]
    whole = flat(want, names)
    rows.at_most(f"{what}: loss", abs(got_loss / loss - 1), max(floor, 2 * abs(near_loss / loss - 1)))
    limit = max(floor, 1.5 * error(flat(near, names), whole))
    rows.at_most(f"{what}: all gradients", error(flat(got, names), whole), limit)
    scale = max(want[name].norm().item() for name in names)
    worst = {"got": (0.0, ""), "near": (0.0, "")}
    for kind, gradients in (("got", got), ("near", near)):
        for name in names:
            size = max(want[name].norm().item(), 1e-2 * scale)
            off = (gradients[name].double() - want[name].double()).norm().item() / size
            worst[kind] = max(worst[kind], (off, name))
    rows.at_most(f"{what}: worst gradient", worst["got"][0], max(floor, 2 * worst["near"][0]), note=worst["got"][1])
    return got


def layers(context: Context, **model: Any) -> Rows:
    """Check a dense student's step, of several packed micro-batches."""
    if model["transformer_impl"] == "transformer_engine":
        need_transformer_engine(context)
    rows = Rows()
    with runs(context) as made:
        run = made.open(**model)
        packed = [m.num_sequences for m in run.batch()]
        rows.at_most("micro-batches without packing", sum(n < 2 for n in packed), 0, note=f"sequences {packed}")
        compare(made, run, rows, "dense")
    return rows


def isolation(context: Context) -> Rows:
    """Check that the neighbours of a packed sequence do not change a bit of its log-probabilities."""
    rows = Rows()
    with runs(context) as made:
        run = made.open(bf16=context.device.type == "cuda")
        batch = run.batch()[0]
        stream = batch.student
        second = int(stream.cu_seqlens[1])
        ids = stream.input_ids.clone()
        ids[:second] = (ids[:second] + 1) % made.shapes[0].vocab
        before, after = (
            run.student.response_logprobs(replace(batch, student=replace(stream, input_ids=x)), 1.0)
            for x in (stream.input_ids, ids)
        )
        behind = (stream.response_positions >= second).to(run.device)
        rows.equal("log-probabilities behind the first sequence", after[behind], before[behind])
        stayed = (after[~behind] == before[~behind]).double().mean()
        rows.at_most("share of the first sequence's that stay", stayed, 0.1)
    return rows


def lora(context: Context) -> Rows:
    """Check adapters, over Transformer Engine's linears where it is."""
    rows = Rows()
    with runs(context) as made:
        compare(made, made.open(lora=LORA, bf16=context.device.type == "cuda"), rows, "adapters")
    return rows


def experts(context: Context) -> Rows:
    """Check experts, as Transformer Engine's grouped products where it is. Near ties in the router decide otherwise in
    bf16, so single gradients are only reported."""
    rows = Rows()
    with runs(context, sparse=True) as made:
        compare(made, made.open(bf16=context.device.type == "cuda"), rows, "experts")
    if context.device.type == "cuda":
        rows[:] = [replace(row, binding="worst" not in row.what) for row in rows]
    return rows


def fp8(recipe: str) -> Check:
    """Make the check of a recipe: its gradients' error beside bf16's."""

    def check(context: Context) -> Rows:
        need_transformer_engine(context)
        rows = Rows()
        with runs(context) as made:
            plain = made.open()
            (_, want), _ = references(made, plain, torch.bfloat16)
            names = sorted(want)
            whole = flat(want, names)
            bf16 = error(flat(plain.gradients()[1], names), whole)
            try:
                run = made.open(fp8_format="hybrid", fp8_recipe=recipe)
            except ValueError as reason:
                raise Skipped(str(reason)) from reason
            run.gradients()  # fills the history of --fp8-recipe delayed
            got = flat(run.gradients()[1], names)
        fp8_error = error(got, whole)
        distance = 1 - torch.nn.functional.cosine_similarity(got, whole, 0)
        rows.at_most("1 - cosine to fp64", distance, FP8_COSINE_DISTANCE)
        rows.at_most("error", fp8_error, 0.3, binding=False, note=f"bf16: {bf16:.3g}")
        rows.at_most("bf16's error over FP8's", bf16 / fp8_error, 0.8, note="1 would mean that nothing ran in FP8")
        return rows

    return check


def fusion(context: Context) -> Rows:
    """Check that weight gradients added inside their products are no worse than those added afterwards."""
    rows = Rows()
    with runs(context) as made:
        fused = made.open(bf16=context.device.type == "cuda")
        (_, want), _ = references(made, fused, torch.float64)
        names = sorted(want)
        whole = flat(want, names)
        errors = [error(flat(fused.gradients()[1], names), whole)]
        apart = made.open(bf16=context.device.type == "cuda", gradient_accumulation_fusion=False)
        errors.append(error(flat(apart.gradients()[1], names), whole))
        rows.at_most("error, fused", errors[0], 1.05 * errors[1] + 1e-6, note=f"added afterwards: {errors[1]:.3g}")
    return rows


CHECKS: dict[str, Check] = {
    "local-fp32": lambda context: layers(context, bf16=False, transformer_impl="local"),
    "local-bf16": lambda context: layers(context, transformer_impl="local"),
    "te-bf16": lambda context: layers(context, transformer_impl="transformer_engine"),
    "isolation": isolation,
    "lora": lora,
    "experts": experts,
    "fusion": fusion,
}
FP8 = {recipe: fp8(recipe) for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8")}
