"""Bytes on a rank of each pipeline stage, by purpose, at the moment of its step when they are most."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.config.schema import Config, ModelConfig
from megatron_trd.planning import activations
from megatron_trd.planning.activations import Precision, Stream
from megatron_trd.planning.grid import Grid
from megatron_trd.planning.loss import MIB, LossMemory, loss_memory
from megatron_trd.planning.model_shape import Count, ModelShape, adapter_parameters, layer_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The largest micro-batch of a step, and how many a rank has; sizes are of all ranks that share a stream."""

    student: Stream
    teacher: Stream
    response_tokens: int
    num_micro_batches: int
    step_response_tokens: int
    """Of all micro-batches of a rank: with pipeline stages the teacher's rows of a whole step wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Who learns, who teaches, in which form; vocabularies are padded to the same rows."""

    student: ModelShape
    teacher: ModelShape
    teacher_is_own: bool
    """Whether the teacher has weights beside the student's."""
    precision: Precision

    @property
    def teacher_precision(self) -> Precision:
        """The teacher's: without adapters."""
        return Precision(element=self.precision.element, implementation=self.precision.implementation)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one rank of one stage."""

    stage: int
    layers: int
    state: dict[str, int]
    """What lives from step to step."""
    moments: dict[str, dict[str, int]]
    """Moment of a step -> what is held then beside the state."""
    trainable_parameters: int

    @property
    def peak_moment(self) -> str:
        """When most is held."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def at_peak(self) -> dict[str, int]:
        """Everything that is held then, by purpose."""
        return self.state | self.moments[self.peak_moment]

    @property
    def total(self) -> int:
        """Bytes of tensors at the peak."""
        return sum(self.at_peak.values())


def stage_memory(config: Config, models: Models, grid: Grid, step: StepShape, stage: int) -> StageMemory:
    """Add up one stage.

    Raises:
        ValueError: the layers cannot be cut into the stages.
    """
    layers = grid.layers_of(models.student, stage)
    state = _state(config, models, grid, stage)
    trainable = _trainable(models, grid, stage)
    kept = _kept_bytes(config, models, grid, step, stage)
    loss = None
    if stage == grid.pp - 1:
        loss = loss_memory(
            models.student,
            models.teacher,
            grid,
            models.precision,
            response_tokens=step.response_tokens,
            workspace_mb=config.objective.kl_workspace_mb,
            fused_head_gradient=config.model.gradient_accumulation_fusion,
        )
    return StageMemory(
        stage=stage,
        layers=len(layers),
        state=state,
        moments=_moments(config, models, grid, step, stage, kept, loss, trainable),
        trainable_parameters=trainable.total,
    )


def stage_parameters(shape: ModelShape, grid: Grid, stage: int, chunks_per_rank: int | None = None) -> Count:
    """Count the parameters of a stage on one rank, adapters apart."""
    layers = grid.layers_of(shape, stage, chunks_per_rank)
    total = sum((layer_parameters(shape, i, tp=grid.tp, ep=grid.ep, etp=grid.etp) for i in layers), Count())
    vocabulary = shape.vocab_size // grid.tp * shape.hidden_size
    first, last = stage == 0, stage == grid.pp - 1
    copies = int(first) + int(last and not (shape.tied and first))  # a tied head is the embedding, or a copy of it
    return total + Count(dense=copies * vocabulary + (shape.hidden_size if last else 0))


def _trainable(models: Models, grid: Grid, stage: int) -> Count:
    rank = models.precision.lora_rank
    if not rank:
        return stage_parameters(models.student, grid, stage)
    layers = grid.layers_of(models.student, stage)
    return Count(dense=sum(adapter_parameters(models.student, layer, rank, tp=grid.tp) for layer in layers))


def _state(config: Config, models: Models, grid: Grid, stage: int) -> dict[str, int]:
    a, bf16 = models.precision.element, models.precision.element == 2
    sharded = config.parallel.use_distributed_optimizer
    trainable = _trainable(models, grid, stage)
    dense_ranks, expert_ranks = (grid.gradient_ranks, grid.expert_gradient_ranks) if sharded else (1, 1)
    shard = -(-trainable.dense // dense_ranks) + -(-trainable.expert // expert_ranks)
    teacher = 0
    if models.teacher_is_own and not config.model.offload_teacher:
        teacher = stage_parameters(models.teacher, grid, stage, chunks_per_rank=1).total * a
    elif models.teacher_is_own and stage == grid.pp - 1:  # its output layer stays
        teacher = models.teacher.vocab_size // grid.tp * models.teacher.hidden_size * a
    return {
        "student weights": stage_parameters(models.student, grid, stage).total * a,
        "adapters": trainable.total * a if models.precision.lora_rank else 0,
        "gradients (fp32)": trainable.total * 4,
        "main weights (fp32)": shard * 4 if bf16 else 0,
        "AdamW moments": shard * 8,
        "teacher weights": teacher,
    }


def _recomputed(model: ModelConfig, layers: int) -> tuple[int, int]:
    """Return a chunk's blocks whose input alone is kept, and how many of its first layers they hold."""
    if model.recompute_granularity != "full":
        return 0, 0
    if model.recompute_method == "block":
        number = min(model.recompute_num_layers, layers)
        return number, number
    return -(-layers // model.recompute_num_layers), layers


def _kept_bytes(config: Config, models: Models, grid: Grid, step: StepShape, stage: int) -> int:
    """What autograd keeps of all micro-batches in flight when the first backward pass begins."""
    student, stream, precision = models.student, step.student, models.precision
    layers = grid.layers_of(student, stage)
    hidden = activations.hidden_bytes(student, grid, stream, precision)
    per_chunk = len(layers) // grid.virtual_stages
    blocks, whole = _recomputed(config.model, per_chunk)
    of_layers = blocks * grid.virtual_stages * hidden
    kept_layers = [i for chunk in range(grid.virtual_stages) for i in layers[chunk * per_chunk :][whole:per_chunk]]
    of_layers += sum(activations.layer_bytes(student, i, grid, stream, precision) for i in kept_layers)
    if not whole:
        if precision.lora_rank and stage == 0:  # nothing before the first adapters wants a gradient
            of_layers -= activations.norm_bytes(student, grid, stream, precision)
        if grid.pp > 1 and precision.element == 2 and precision.implementation != "te":
            of_layers += hidden * grid.virtual_stages  # received; the norm keeps an fp32 copy of its own
    offloaded = kept_layers[: config.model.cpu_offloading_num_layers]
    of_layers -= sum(activations.layer_bytes(student, i, grid, stream, precision) for i in offloaded)
    kept = grid.chunks_in_flight(stage, step.num_micro_batches) * of_layers // grid.virtual_stages
    if stage == grid.pp - 1:
        kept += activations.norm_bytes(student, grid, stream, precision)
    return kept


def _moments(
    config: Config,
    models: Models,
    grid: Grid,
    step: StepShape,
    stage: int,
    kept: int,
    loss: LossMemory | None,
    trainable: Count,
) -> dict[str, dict[str, int]]:
    student, precision = models.student, models.precision
    layers = grid.layers_of(student, stage)
    widest = max(layers, key=lambda i: activations.layer_bytes(student, i, grid, step.student, precision))
    transient = activations.layer_transient_bytes(student, widest, grid, step.student, precision)
    if config.model.recompute_granularity == "full":
        one = activations.layer_bytes(student, widest, grid, step.student, precision)
        uniform = config.model.recompute_method == "uniform"
        transient += one * (min(config.model.recompute_num_layers, len(layers)) if uniform else 1)
    always = _waiting_rows(config, models, grid, step, stage) | _buffers(models, grid, step)
    moments = {
        "teacher forward": always | _teacher_pass(config, models, grid, step, stage),
        "backward pass of a layer": always | {"activations": kept, "working set": transient},
        "optimizer step": {"working set": _optimizer_working_set(config, models, grid, trainable)},
    }
    if loss is not None:
        held = {"activations": kept, "response rows": loss.rows}
        head = {"head gradient (fp32)": loss.head_gradient, "fp32 copies of the heads (CPU)": loss.upcast_heads}
        moments["loss"] = always | held | head | {"KL workspace": loss.workspace}
        moments["backward pass of the head"] = always | {
            "activations": kept,
            "head gradient and its copies": loss.backward(precision.element),
        }
    return moments


def _waiting_rows(config: Config, models: Models, grid: Grid, step: StepShape, stage: int) -> dict[str, int]:
    """The teacher's rows of a whole step, where they are made before the student's passes."""
    if stage != grid.pp - 1 or (grid.pp == 1 and not config.model.offload_teacher):
        return {}
    rows = step.step_response_tokens / grid.sequence_ranks * models.teacher.hidden_size * models.precision.element
    return {"teacher hidden states of the step": round(min(rows, config.model.teacher_hidden_mb * MIB))}


def _buffers(models: Models, grid: Grid, step: StepShape) -> dict[str, int]:
    """The gathered input of a linear under sequence parallelism: one buffer for the run."""
    if not grid.sequence_parallel:
        return {}
    widths = (models.student.hidden_size * step.student.tokens, models.teacher.hidden_size * step.teacher.tokens)
    return {"sequence-parallel buffer": max(widths) // grid.cp * models.precision.element}


def _teacher_pass(config: Config, models: Models, grid: Grid, step: StepShape, stage: int) -> dict[str, int]:
    shape, precision = models.teacher, models.teacher_precision
    layers = grid.layers_of(shape, stage, chunks_per_rank=1)
    held = {"working set": max(activations.forward_only_bytes(shape, i, grid, step.teacher, precision) for i in layers)}
    if config.model.offload_teacher:
        whole = stage_parameters(shape, grid, stage, chunks_per_rank=1).total * precision.element
        held["offloaded teacher, for its passes"] = whole
    return held


def _optimizer_working_set(config: Config, models: Models, grid: Grid, trainable: Count) -> int:
    """torch's AdamW takes two temporaries of a parameter on a CPU, and on a GPU the roots of all second moments at a
    time; Transformer Engine's none."""
    sharded = config.parallel.use_distributed_optimizer
    shard = trainable.total // (grid.gradient_ranks if sharded else 1)
    match models.precision.implementation:
        case "cpu":
            largest = models.student.hidden_size * max(models.student.vocab_size, models.student.ffn_hidden_size * 2)
            return 8 * min(largest // grid.tp, shard)
        case "local":
            return 4 * shard
    return 0
