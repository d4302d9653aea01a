"""Seconds of an iteration, stage by stage: a roofline with named efficiencies, and what limits each stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.config.schema import Config
from megatron_trd.planning import flops
from megatron_trd.planning.collectives import Traffic, step_traffic
from megatron_trd.planning.devices import Assumptions, Device
from megatron_trd.planning.flops import Flops
from megatron_trd.planning.grid import Grid
from megatron_trd.planning.memory import Models, stage_parameters
from megatron_trd.planning.model_shape import adapter_parameters, num_parameters
from megatron_trd.planning.servers import ServerGroup
from megatron_trd.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """One stage of an iteration."""

    name: str
    seconds: float
    limit: str
    """What it waits for most."""
    flops: float = 0.0
    """Of all ranks together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationTime:
    """All stages, and how they follow each other."""

    generation: tuple[StageTime, ...]
    training: tuple[StageTime, ...]
    traffic: tuple[Traffic, ...]
    """Of one optimizer step."""
    bubble_share: float
    seconds: float
    """Of an iteration: with `--rollout-staleness` rollouts run beside training."""
    tokens: float
    """Generated and trained on, in an iteration."""

    @property
    def stages(self) -> tuple[StageTime, ...]:
        """In the order of an iteration."""
        return *self.generation, *self.training


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Who generates: None where that is nobody's."""

    student: ServerGroup | None
    teacher: ServerGroup | None
    """None: the student's servers refine as well, or nobody."""


def iteration_time(
    config: Config,
    models: Models,
    grid: Grid,
    work: Workload,
    device: Device,
    assumptions: Assumptions,
    servers: Servers,
) -> IterationTime:
    """Add up one iteration."""
    generation = _generation(config, work, servers)
    traffic = step_traffic(config, models, grid, work)
    training = [*_training(config, models, grid, work, device, assumptions, traffic)]
    if servers.student is not None:
        training.append(_publication(config, models, grid, device, assumptions))
    apart = servers.teacher is not None and not config.rollout.colocate
    seconds = [stage.seconds for stage in generation]
    # A refinement starts when its own y_o ends: on servers of its own it runs beside the other rollouts.
    rollout = max(sum(seconds[:2]), sum(seconds[2:])) if apart else sum(seconds)
    trained = sum(stage.seconds for stage in training)
    beside = config.rollout.rollout_staleness > 0
    generated = work.problems * (work.lengths.y_o + (work.lengths.y_r if work.refines else 0)) if generation else 0
    return IterationTime(
        generation=tuple(generation),
        training=tuple(training),
        traffic=tuple(traffic),
        bubble_share=grid.bubble_share(work.micro_batches),
        seconds=max(rollout, trained) if beside else rollout + trained,
        tokens=generated + work.problems * work.student_length,
    )


def _generation(config: Config, work: Workload, servers: Servers) -> list[StageTime]:
    if servers.student is None:
        return []
    jobs = [("y_o", servers.student, work.lengths.prompt, work.lengths.y_o)]
    if work.refines:
        jobs.append(("y_r", servers.teacher or servers.student, work.refine_prompt, work.lengths.y_r))
    stages = []
    for what, group, prompt, mean in jobs:
        number, longest = work.problems, float(work.longest_response)
        seconds = group.decode_seconds(
            number, prompt=prompt, mean=mean, longest=longest, at_most=config.rollout.max_concurrent_requests
        )
        batch = min(number / group.replicas, group.cached_tokens / (prompt + mean))
        _, limit = group.step_seconds(max(batch, 1.0), prompt + mean / 2)
        prefill = flops.generation(group.shape, tokens=number * prompt, mean_context=prompt / 2).total
        decode = flops.generation(group.shape, tokens=number * mean, mean_context=prompt + mean / 2).total
        stages.append(
            StageTime(
                name=f"{what}: read prompts",
                seconds=group.prefill_seconds(number, prompt),
                limit="compute",
                flops=prefill,
            )
        )
        stages.append(StageTime(name=f"{what}: decode", seconds=seconds, limit=limit, flops=decode))
    return stages


def _training(
    config: Config,
    models: Models,
    grid: Grid,
    work: Workload,
    device: Device,
    assumptions: Assumptions,
    traffic: list[Traffic],
) -> list[StageTime]:
    sequences = work.sequences_per_micro_batch * work.micro_batches * grid.dp * work.steps
    student, teacher = models.student, models.teacher
    recomputed = config.model.recompute_granularity == "full"
    learned, taught = Flops(), Flops()
    for layer in range(student.num_layers):
        learned += flops.layer_training(
            student,
            layer,
            tokens=sequences * work.student_length,
            mean_length=work.student_length,
            lora_rank=models.precision.lora_rank,
            recomputed=recomputed,
        )
    for layer in range(teacher.num_layers):
        tokens = sequences * work.teacher_length
        taught += flops.layer_forward(teacher, layer, tokens=tokens, mean_length=work.teacher_length)
    heads = flops.loss_heads(
        student,
        teacher,
        response_tokens=sequences * work.response_length,
        head_learns=not models.precision.lora_rank,
    )
    busy = 1 - grid.bubble_share(work.micro_batches)
    imbalance = assumptions.expert_imbalance if grid.ep > 1 else 1.0

    def seconds(work_done: Flops, fp8: bool) -> float:
        peak = (device.fp8_tflops if fp8 and device.fp8_tflops else device.bf16_tflops) * 1e12
        linear = work_done.linear / (peak * assumptions.train_efficiency) * imbalance
        attention = work_done.attention / (device.bf16_tflops * 1e12 * assumptions.attention_efficiency)
        return (linear + attention) / (grid.world_size * busy)

    fp8 = config.model.fp8_format is not None
    # Only the last stage has the heads; the others wait for it.
    head_ranks = grid.world_size / grid.pp
    head_seconds = heads / (device.bf16_tflops * 1e12 * assumptions.train_efficiency * head_ranks * busy)
    shard = _optimizer_shard(config, models, grid)
    update = work.steps * shard * 34 / (device.memory_tb_s * 1e12 * assumptions.decode_efficiency)
    stages = [
        StageTime(name="teacher forward", seconds=seconds(taught, False), limit="compute", flops=taught.total),
        StageTime(
            name="student forward and backward", seconds=seconds(learned, fp8), limit="compute", flops=learned.total
        ),
        StageTime(name="loss heads", seconds=head_seconds, limit="compute", flops=heads),
        StageTime(name="optimizer", seconds=update, limit="memory bandwidth"),
    ]
    for one in traffic:
        exposed = one.seconds(device, assumptions) * work.steps
        stages.append(StageTime(name=f"communication: {one.name}", seconds=exposed, limit=one.link(device)[0]))
    return stages


def _optimizer_shard(config: Config, models: Models, grid: Grid) -> float:
    """Parameters whose state a rank updates: 34 bytes read and written for each (gradient, weights, both moments)."""
    rank, layers = models.precision.lora_rank, grid.layers_of(models.student, 0)
    if rank:
        number = sum(adapter_parameters(models.student, layer, rank, tp=grid.tp) for layer in layers)
    else:
        number = stage_parameters(models.student, grid, 0).total
    return number / (grid.gradient_ranks if config.parallel.use_distributed_optimizer else 1)


def _publication(config: Config, models: Models, grid: Grid, device: Device, assumptions: Assumptions) -> StageTime:
    """All weights once from one rank, which gathers them first; servers take them at the same time."""
    transport, shape = config.weight_sync.weight_sync, models.student
    size = 2.0 * num_parameters(shape)
    if transport == "adapter":
        size = 2.0 * sum(adapter_parameters(shape, i, models.precision.lora_rank) for i in range(shape.num_layers))
    name, speed = {
        "disk": ("disk", assumptions.disk_gb_s / 2),  # written, then read
        "tensor": ("links in a machine", device.node_gb_s * assumptions.link_efficiency),
    }.get(transport, ("network", device.network_gb_s * assumptions.link_efficiency))
    gather = 0.0
    if grid.tp * grid.pp > 1:
        link = device.node_gb_s if grid.pp == 1 and grid.tp <= device.gpus_per_node else device.network_gb_s
        gather = size / (link * 1e9 * assumptions.link_efficiency)
    return StageTime(name=f"publish weights ({transport})", seconds=size / (speed * 1e9) + gather, limit=name)
