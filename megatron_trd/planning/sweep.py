"""Other configurations than the one given: remedies where it does not fit, and the fastest layout that does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_trd.config.schema import Config
from megatron_trd.planning.model_shape import read_model_shape
from megatron_trd.planning.plan import RunPlan, changed, make_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One or two changes of flags and what becomes of the plan."""

    flags: str
    plan: RunPlan

    @property
    def needed_gib(self) -> float:
        """Of the worst stage."""
        return self.plan.needed_gib(self.plan.worst)


def remedies(plan: RunPlan) -> list[Remedy]:
    """Return every change that makes the worst stage smaller, and where no single one makes it fit also pairs: first
    those that make it fit, the fastest of them first, then the others by what is left to hold."""
    found = _single(Remedy(flags="", plan=plan))
    if not any(remedy.plan.training_fits for remedy in found):
        found += [pair for first in found for pair in _single(first)]
    return sorted(found, key=lambda r: (0, r.plan.time.seconds) if r.plan.training_fits else (1, r.needed_gib))


def _single(start: Remedy) -> list[Remedy]:
    found, plan = [], start.plan
    for flags, section, changes in _changes(plan.config):
        try:
            other = _again(plan, changed(plan.config, section, **changes))
        except ValueError:  # none for this model, these GPUs or this method
            continue
        if other.worst.total < plan.worst.total:
            found.append(Remedy(flags=f"{start.flags} {flags}".strip(), plan=other))
    return found


def _again(plan: RunPlan, config: Config) -> RunPlan:
    return make_plan(config, plan.resources, lengths=plan.work.lengths, assumptions=plan.assumptions)


def _changes(config: Config) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yield (how to write it, section of the configuration, values)."""
    parallel, model, tokens = config.parallel, config.model, config.data.max_tokens_per_micro_batch
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    if model.recompute_granularity != "full":
        recompute: dict[str, object] = {"recompute_granularity": "full", "cpu_offloading_num_layers": 0}
        yield "--recompute-granularity full", "model", recompute
    if not parallel.use_distributed_optimizer:
        yield "--use-distributed-optimizer", "parallel", {"use_distributed_optimizer": True}
    if not model.offload_teacher:
        yield "--offload-teacher", "model", {"offload_teacher": True}
    if tp > 1 and not parallel.sequence_parallel:
        yield "--sequence-parallel", "parallel", {"sequence_parallel": True}
    wider: dict[str, object] = {"tensor_model_parallel_size": 2 * tp, "sequence_parallel": True}
    yield f"--tensor-model-parallel-size {2 * tp} --sequence-parallel", "parallel", wider
    yield f"--pipeline-model-parallel-size {2 * pp}", "parallel", {"pipeline_model_parallel_size": 2 * pp}
    yield f"--context-parallel-size {2 * cp}", "parallel", {"context_parallel_size": 2 * cp}
    half = tokens // 2
    yield f"--max-tokens-per-micro-batch {half}", "data", {"max_tokens_per_micro_batch": half}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Layouts for the same GPUs."""

    fitting: tuple[RunPlan, ...]
    """The fastest first."""
    refused: dict[str, int]
    """Why the others are not among them -> how many."""


def sweep(plan: RunPlan) -> Sweep:
    """Try every layout on the plan's GPUs: tensor parallelism inside a machine, stages of equal layers."""
    fitting, refused = [], dict[str, int]()

    def refuse(reason: str) -> None:
        refused[reason] = refused.get(reason, 0) + 1

    for config in _layouts(plan):
        try:
            other = _again(plan, config)
        except ValueError as error:
            refuse(_without_values(str(error)))
            continue
        if config.data.global_batch_size < other.grid.dp:
            refuse("fewer sequences in a step (--global-batch-size) than data-parallel ranks")
        elif not other.training_fits:
            most = max(other.worst.at_peak, key=other.worst.at_peak.__getitem__)
            refuse(f"does not fit: {_place(other)} stage needs more than the GPU has, most of it {most}")
        else:
            fitting.append(other)
    fitting.sort(key=lambda p: (p.time.seconds, p.needed_gib(p.worst)))
    return Sweep(fitting=tuple(fitting), refused=refused)


def _place(plan: RunPlan) -> str:
    last = plan.grid.pp - 1
    return "the only" if last == 0 else {0: "the first", last: "the last"}.get(plan.worst.stage, "a middle")


def _without_values(message: str) -> str:
    flag, _, rest = message.partition(" ")
    return f"{flag}: {rest.partition(': ')[2]}"


def _layouts(plan: RunPlan) -> Iterator[Config]:
    gpus, node = plan.resources.num_gpus, plan.resources.device.gpus_per_node
    shape = read_model_shape(plan.config.model.hf_checkpoint, "hf-checkpoint")
    tps, cps = (list(_powers_of_two(min(node, gpus))) for _ in range(2))
    pps = [n for n in range(1, min(shape.num_layers, gpus) + 1) if shape.num_layers % n == 0 and gpus % n == 0]
    eps = [1] if shape.experts is None else [n for n in _powers_of_two(gpus) if shape.experts.num_experts % n == 0]
    for tp, pp, cp, ep, virtual, recompute in product(tps, pps, cps, eps, (1, 2), ("none", "full")):
        if gpus % (tp * pp * cp) or (virtual > 1 and (pp == 1 or shape.num_layers // pp % virtual)):
            continue
        config = changed(
            plan.config,
            "parallel",
            tensor_model_parallel_size=tp,
            sequence_parallel=tp > 1,
            pipeline_model_parallel_size=pp,
            num_virtual_stages_per_pipeline_rank=virtual,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=1 if shape.experts is not None else None,
            use_distributed_optimizer=True,
        )
        yield changed(config, "model", recompute_granularity=recompute, cpu_offloading_num_layers=0)


def _powers_of_two(limit: int) -> Iterator[int]:
    number = 1
    while number <= limit:
        yield number
        number *= 2
