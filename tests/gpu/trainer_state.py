"""Optimizer steps against AdamW by hand, state on the host, and checkpoints that go on as if never stopped."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from gpu.harness import Check, Context, Rows, Skipped
from gpu.trainer_runs import DISTRIBUTED, Run, begin, need_transformer_engine, runs
from megatron_trd.config.schema import OptimizerConfig, ParallelConfig

STEPS = 4
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.5, lr_warmup_fraction=0.0)
OFFLOADED = replace(OPTIMIZER, optimizer_cpu_offload=True)


def group(context: Context) -> Rows:
    """Check that the process group of one rank is NCCL's, and adds."""
    context.need_cuda()
    begin(context)
    rows, value = Rows(), torch.full((4,), 3.0, device=context.device)
    dist.all_reduce(value)
    rows.at_most("not NCCL", dist.get_backend() != "nccl", 0)
    rows.equal("sum over one rank", value, torch.full_like(value, 3.0))
    return rows


def adam(context: Context, parallel: ParallelConfig) -> Rows:
    """Check steps in fp32 against AdamW in fp64 on the same gradients: clipping, schedule, decay of matrices alone."""
    rows, config = Rows(), OPTIMIZER
    with runs(context) as made:
        run = made.open(parallel=parallel, optimizer=config, bf16=False, transformer_impl="local")
        parameters = dict(run.student.gpt.named_parameters())
        start = {name: p.detach().double().clone() for name, p in parameters.items()}
        want = {name: p.clone() for name, p in start.items()}
        first, second = ({name: torch.zeros_like(p) for name, p in start.items()} for _ in range(2))
        for step in range(1, STEPS + 1):
            run.student.accumulate_gradients(run.batch(), run.teacher)
            gradients = {name: p.main_grad.double() for name, p in parameters.items()}
            norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
            lr = run.student.optimizer.param_groups[0]["lr"]
            _, reported, _ = run.student.optimizer.step()
            run.student.scheduler.step(1)
            rows.at_most(f"step {step}: gradient norm", abs(float(reported) / norm - 1), 1e-5)
            for name, g in gradients.items():
                g = g * min(1.0, config.clip_grad / (norm + 1e-6))
                first[name].mul_(config.adam_beta1).add_(g, alpha=1 - config.adam_beta1)
                second[name].mul_(config.adam_beta2).addcmul_(g, g, value=1 - config.adam_beta2)
                if g.dim() > 1:
                    want[name].mul_(1 - lr * config.weight_decay)
                root = (second[name] / (1 - config.adam_beta2**step)).sqrt()
                want[name] -= lr * first[name] / (1 - config.adam_beta1**step) / (root + config.adam_eps)
        got = {name: p.detach().double() for name, p in parameters.items()}
    off = {name: ((got[name] - p).norm() / (p - start[name]).norm()).item() for name, p in want.items()}
    worst = max(off, key=off.__getitem__)
    rows.at_most(f"weights after {STEPS} steps, over their change", off[worst], 2e-3, note=worst)
    return rows


def trained(run: Run, first: int, last: int) -> list[float]:
    """Train on the steps `first` to `last - 1`; return their losses."""
    return [run.step(number) for number in range(first, last)]


def offload(context: Context) -> Rows:
    """Check that `--optimizer-cpu-offload` takes the same steps as without, and frees its bytes on the device."""
    need_transformer_engine(context)
    rows = Rows()
    changes, losses, held = [], [], []
    with runs(context) as made:
        for optimizer in (OPTIMIZER, OFFLOADED):
            torch.cuda.empty_cache()
            run = made.open(parallel=DISTRIBUTED, optimizer=optimizer)
            before = run.weights()
            losses.append(trained(run, 0, STEPS))
            held.append(torch.cuda.memory_allocated())
            changes.append({name: w.float() - before[name].float() for name, w in run.weights().items()})
            number = sum(p.numel() for p in run.student.gpt.parameters())
            del run
    plain, offloaded = (torch.cat([change.flatten() for change in c.values()]) for c in changes)
    rows.at_most("change of the weights", (offloaded - plain).norm() / plain.norm(), 0.05)
    rows.at_most("losses", max(abs(b / a - 1) for a, b in zip(*losses, strict=True)), 1e-2)
    rows.at_most("bytes of a parameter that left", 11.0, (held[0] - held[1]) / number, note="12 are main and moments")
    return rows


def resume(context: Context, optimizer: OptimizerConfig) -> Rows:
    """Check that a resumed run repeats the steps of the one that was saved, bit by bit."""
    if optimizer.optimizer_cpu_offload:
        need_transformer_engine(context)
    if importlib.util.find_spec("psutil") is None:
        raise Skipped("needs psutil")
    rows, bf16 = Rows(), context.device.type == "cuda"
    with runs(context) as made, tempfile.TemporaryDirectory() as folder:
        run = made.open(parallel=DISTRIBUTED, optimizer=optimizer, bf16=bf16)
        trained(run, 0, 2)
        run.checkpoints(Path(folder)).save(run.student, {"iteration": 2})
        straight = trained(run, 2, STEPS), run.weights()
        again = made.open(parallel=DISTRIBUTED, optimizer=optimizer, bf16=bf16)
        fresh = trained(again, 2, 3)
        progress = again.checkpoints(Path(folder)).resume(again.student)
        resumed = trained(again, 2, STEPS), again.weights()
    rows.at_most("iteration", abs(progress["iteration"] - 2), 0)
    rows.at_most("an untrained student's loss is the same", fresh[0] == straight[0][0], 0)
    rows.equal("losses", torch.tensor(resumed[0]), torch.tensor(straight[0]))
    for name, weight in straight[1].items():
        rows.equal(name, resumed[1][name], weight)
    return rows


CHECKS: dict[str, Check] = {
    "nccl": group,
    "adam": lambda context: adam(context, ParallelConfig()),
    "adam-distributed": lambda context: adam(context, DISTRIBUTED),
    "resume": lambda context: resume(context, OPTIMIZER),
    "offload": offload,
    "resume-offloaded": lambda context: resume(context, OFFLOADED),
}
