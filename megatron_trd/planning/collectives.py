"""Bytes that one rank sends in one optimizer step, by purpose, and the link that carries them.

Ring algorithms: an all-gather to S bytes, or a reduce-scatter of them, sends (g - 1) / g S from each of g ranks; an
all-reduce twice that. Groups are laid out as Megatron's, from the inside out: tensor, context, data, pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.config.schema import Config
from megatron_trd.planning.devices import Assumptions, Device
from megatron_trd.planning.grid import Grid
from megatron_trd.planning.memory import Models, stage_parameters
from megatron_trd.planning.model_shape import ModelShape, adapter_parameters
from megatron_trd.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One kind of collective of the busiest rank."""

    name: str
    num_bytes: float
    span: int
    """Ranks from the first to the last member of a group."""
    hidden: bool = False
    """Whether it overlaps with computation."""

    def link(self, device: Device) -> tuple[str, float]:
        """Return the slowest link it needs, and that link's GB/s."""
        inside = self.span <= device.gpus_per_node
        return ("links in a machine", device.node_gb_s) if inside else ("network", device.network_gb_s)

    def seconds(self, device: Device, assumptions: Assumptions) -> float:
        """Return the time that it adds."""
        seconds = self.num_bytes / (self.link(device)[1] * 1e9 * assumptions.link_efficiency)
        return seconds * (1 - assumptions.overlap) if self.hidden else seconds


def step_traffic(config: Config, models: Models, grid: Grid, work: Workload) -> list[Traffic]:
    """List the collectives of one optimizer step."""
    a, sequences = models.precision.element, work.sequences_per_micro_batch * work.micro_batches
    student, teacher = (sequences * length / grid.cp for length in (work.student_length, work.teacher_length))
    rows, layers = sequences * work.response_length / grid.cp, 1 / grid.pp
    student_layers = models.student.num_layers * layers
    teacher_layers = models.teacher.num_layers * layers
    recomputed = config.model.recompute_granularity == "full"
    hidden, teacher_hidden = models.student.hidden_size * a * student, models.teacher.hidden_size * a * teacher
    # An all-reduce after attention and one after the feed-forward, or the two halves of each.
    passes = 2 + int(recomputed) + (0.5 if grid.sequence_parallel and not models.precision.lora_rank else 0)
    in_tp = 4 * _share(grid.tp) * (passes * student_layers * hidden + teacher_layers * teacher_hidden)
    loss = 2 * 4 * _share(grid.tp) * rows * models.student.hidden_size
    boundary = 2 * grid.virtual_stages * hidden + teacher_hidden
    kv = 2 * a * _share(grid.cp) * grid.cp / grid.tp
    cp_passes = 2 + int(recomputed)
    in_cp = kv * (
        cp_passes * models.student.kv_size * student * student_layers
        + models.teacher.kv_size * teacher * teacher_layers
    )
    found = [
        Traffic(name="tensor parallelism", num_bytes=in_tp, span=grid.tp),
        Traffic(name="gradient of the response rows", num_bytes=loss if grid.tp > 1 else 0, span=grid.tp),
        Traffic(name="context parallelism", num_bytes=in_cp, span=grid.tp * grid.cp),
        Traffic(
            name="pipeline",
            num_bytes=boundary / (grid.tp if grid.sequence_parallel else 1) if grid.pp > 1 else 0,
            span=grid.world_size,
        ),
        *_gradient_traffic(config, models, grid),
    ]
    if grid.ep > 1:
        passes = 6 + 2 * int(recomputed)  # there and back, forward and twice backward's half of it
        found.append(
            Traffic(
                name="experts (all-to-all)",
                num_bytes=_share(grid.ep)
                * (passes * _routed(models.student, hidden) + 2 * _routed(models.teacher, teacher_hidden))
                / (grid.pp * grid.tp),
                span=grid.etp * grid.ep,  # Megatron numbers them first among the ranks of a stage
            )
        )
    return [traffic for traffic in found if traffic.num_bytes > 0]


def _gradient_traffic(config: Config, models: Models, grid: Grid) -> list[Traffic]:
    rank, ranks, parallel = models.precision.lora_rank, grid.gradient_ranks, config.parallel
    layers = grid.layers_of(models.student, 0)
    if rank:
        trainable = sum(adapter_parameters(models.student, layer, rank, tp=grid.tp) for layer in layers)
    else:
        trainable = stage_parameters(models.student, grid, 0).total
    span = grid.tp * ranks
    sharded = parallel.use_distributed_optimizer
    gradients = (1 if sharded else 2) * 4 * _share(ranks) * trainable
    found = [Traffic(name="gradients", num_bytes=gradients, span=span, hidden=parallel.overlap_grad_reduce)]
    if sharded:
        weights = models.precision.element * _share(ranks) * trainable
        found.append(Traffic(name="weights", num_bytes=weights, span=span, hidden=parallel.overlap_param_gather))
    return found


def _routed(shape: ModelShape, hidden_bytes: float) -> float:
    if shape.experts is None:
        return 0.0
    return sum(shape.experts.sparse_layers) * shape.experts.top_k * hidden_bytes


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks
