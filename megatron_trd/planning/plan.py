"""The plan of a run: memory of every stage, time of an iteration, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_trd.config.schema import Config
from megatron_trd.planning.activations import Precision
from megatron_trd.planning.devices import Assumptions, Device, find_device, implementation_of
from megatron_trd.planning.grid import Grid
from megatron_trd.planning.memory import Models, StageMemory, stage_memory
from megatron_trd.planning.model_shape import ModelShape, adapter_parameters, num_parameters, read_model_shape
from megatron_trd.planning.servers import GIB, ServerGroup
from megatron_trd.planning.timing import IterationTime, Servers, iteration_time
from megatron_trd.planning.workload import Lengths, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What the plan is made for."""

    num_gpus: int
    """Of the trainer."""
    device_name: str
    student_server_gpus: int
    teacher_server_gpus: int
    """0: the student's servers refine, or nobody does."""
    server_tp: int

    @property
    def device(self) -> Device:
        """The GPU's entry in the table."""
        return find_device(self.device_name)

    @classmethod
    def of(
        cls,
        config: Config,
        num_gpus: int,
        device_name: str,
        *,
        student_server_gpus: int | None = None,
        teacher_server_gpus: int | None = None,
        server_tp: int = 1,
    ) -> Resources:
        """Give each group of servers that the method needs as many GPUs as the trainer, unless said otherwise.

        Raises:
            ValueError: a GPU that is not in the table, or servers that do not fit their GPUs.
        """
        find_device(device_name)
        online = config.data.trajectories is None
        teachers = online and config.method.trajectory == "y_r" and _needs_teacher_servers(config)
        numbers = []
        for flag, given, needed in (
            ("student-server-gpus", student_server_gpus, online),
            ("teacher-server-gpus", teacher_server_gpus, teachers),
        ):
            number = (num_gpus if given is None else given) if needed else 0
            if needed and (number < server_tp or number % server_tp):
                raise ValueError(f"--{flag} {number}: must be a positive multiple of --server-tp {server_tp}")
            numbers.append(number)
        return cls(
            num_gpus=num_gpus,
            device_name=device_name,
            student_server_gpus=numbers[0],
            teacher_server_gpus=numbers[1],
            server_tp=server_tp,
        )

    def total_gpus(self, config: Config) -> int:
        """Return all GPUs; co-located servers need none of their own."""
        servers = self.student_server_gpus + self.teacher_server_gpus
        return max(self.num_gpus, servers) if config.rollout.colocate else self.num_gpus + servers


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Everything that is known of a run before it starts."""

    config: Config
    resources: Resources
    assumptions: Assumptions
    models: Models
    grid: Grid
    work: Workload
    stages: tuple[StageMemory, ...]
    servers: Servers
    time: IterationTime

    @property
    def worst(self) -> StageMemory:
        """The stage that holds most."""
        return max(self.stages, key=lambda stage: stage.total)

    def needed_gib(self, stage: StageMemory) -> float:
        """Return what a GPU of a stage must have: its tensors, what the allocator wastes, contexts."""
        contexts = self.assumptions.context_gib * (2 if self.config.rollout.colocate else 1)
        return stage.total * (1 + self.assumptions.fragmentation) / GIB + contexts

    @property
    def training_fits(self) -> bool:
        """Whether every training rank has enough memory."""
        return self.needed_gib(self.worst) <= self.resources.device.memory_gib

    @property
    def servers_fit(self) -> bool:
        """Whether every server can hold the longest sequence."""
        rollout = self.config.rollout
        longest = max(rollout.max_prompt_tokens, rollout.max_refine_prompt_tokens if self.work.refines else 0)
        groups = filter(None, (self.servers.student, self.servers.teacher))
        return all(group.cached_tokens >= longest + rollout.max_response_tokens for group in groups)

    @property
    def fits(self) -> bool:
        """Whether trainer and servers do."""
        return self.training_fits and self.servers_fit

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.time.seconds * self.config.data.num_iterations / 3600

    @property
    def trainable_parameters(self) -> int:
        """Of the whole model."""
        rank, shape = self.models.precision.lora_rank, self.models.student
        if rank:
            return sum(adapter_parameters(shape, layer, rank) for layer in range(shape.num_layers))
        return num_parameters(shape)


def make_plan(
    config: Config, resources: Resources, *, lengths: Lengths | None = None, assumptions: Assumptions | None = None
) -> RunPlan:
    """Plan a run from its configuration and the models' `config.json`.

    Raises:
        ValueError: a model or a layout that cannot be.
    """
    assumed = assumptions or Assumptions()
    grid = Grid.of(config.parallel, resources.num_gpus)
    models = read_models(config, grid, resources.device_name)
    _require_shapes(models, grid)
    work = Workload.of(config, grid, lengths or Lengths.assumed(config))
    servers = _servers(models, resources, assumed)
    return RunPlan(
        config=config,
        resources=resources,
        assumptions=assumed,
        models=models,
        grid=grid,
        work=work,
        stages=tuple(stage_memory(config, models, grid, work.largest, stage) for stage in range(grid.pp)),
        servers=servers,
        time=iteration_time(config, models, grid, work, resources.device, assumed, servers),
    )


def read_models(config: Config, grid: Grid, device_name: str) -> Models:
    """Read both shapes and pad their vocabularies to the same rows.

    Raises:
        ValueError: a directory without a usable `config.json`.
    """
    model, lora = config.model, config.lora
    student = teacher = read_model_shape(model.hf_checkpoint, "hf-checkpoint")
    if model.teacher_hf_checkpoint is not None:
        teacher = read_model_shape(model.teacher_hf_checkpoint, "teacher-hf-checkpoint")
    multiple = model.make_vocab_size_divisible_by * grid.tp
    rows = -(-max(student.vocab_size, teacher.vocab_size) // multiple) * multiple
    return Models(
        student=student.padded_to(rows),
        teacher=teacher.padded_to(rows),
        teacher_is_own=config.method.mode == "opd" or (config.method.opsd_teacher == "initial" and lora.lora_rank == 0),
        precision=Precision(
            element=2 if model.bf16 else 4,
            implementation=implementation_of(device_name, model.transformer_impl),
            lora_rank=lora.lora_rank,
            lora_dropout=lora.lora_dropout > 0,
            fp8=model.fp8_format is not None,
            recomputed=model.recompute_modules if model.recompute_granularity == "selective" else (),
        ),
    )


def _require_shapes(models: Models, grid: Grid) -> None:
    for shape, chunks in ((models.student, grid.virtual_stages), (models.teacher, 1)):
        grid.layers_of(shape, 0, chunks)
        for what, size in (("attention heads", shape.num_heads), ("feed-forward width", shape.ffn_hidden_size)):
            if size % grid.tp:
                raise ValueError(f"--tensor-model-parallel-size {grid.tp}: must divide the {size} {what}")
        if shape.num_kv_heads % grid.tp and grid.tp % shape.num_kv_heads:
            raise ValueError(
                f"--tensor-model-parallel-size {grid.tp}: must divide, or be a multiple of, the {shape.num_kv_heads} "
                "key-value heads"
            )
        if shape.experts is not None and shape.experts.num_experts % grid.ep:
            raise ValueError(
                f"--expert-model-parallel-size {grid.ep}: must divide the {shape.experts.num_experts} experts"
            )


def _needs_teacher_servers(config: Config) -> bool:
    return config.method.mode == "opd" or config.method.opsd_teacher == "initial"


def _servers(models: Models, resources: Resources, assumptions: Assumptions) -> Servers:
    def group(shape: ModelShape, gpus: int) -> ServerGroup | None:
        if not gpus:
            return None
        return ServerGroup(
            shape=shape, gpus=gpus, tp=resources.server_tp, device=resources.device, assumptions=assumptions
        )

    return Servers(
        student=group(models.student, resources.student_server_gpus),
        teacher=group(models.teacher, resources.teacher_server_gpus),
    )


def changed(config: Config, section: str, **values: object) -> Config:
    """Return the configuration with other values in one of its sections.

    Raises:
        ValueError: they contradict others.
    """
    return replace(config, **{section: replace(getattr(config, section), **values)})
