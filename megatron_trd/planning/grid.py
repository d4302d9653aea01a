"""The grid of ranks, and which layers a pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.config.schema import ParallelConfig
from megatron_trd.planning.model_shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes of the groups that one training rank belongs to."""

    world_size: int
    tp: int
    pp: int
    cp: int
    dp: int
    """Replicas that get different micro-batches."""
    ep: int
    etp: int
    virtual_stages: int
    sequence_parallel: bool

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Grid:
        """Lay the ranks out.

        Raises:
            ValueError: the model-parallel size does not divide them.
        """
        tp, pp, cp = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        size = parallel.model_parallel_size
        ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size or tp
        if world_size < 1 or world_size % size:
            raise ValueError(
                f"--num-gpus {world_size}: must be a multiple of the {size} ranks of --tensor-model-parallel-size {tp} "
                f"x --pipeline-model-parallel-size {pp} x --context-parallel-size {cp}"
            )
        if world_size // pp % (ep * etp):
            raise ValueError(
                f"--expert-model-parallel-size {ep}: times the expert tensor-parallel size {etp} must divide the "
                f"{world_size // pp} ranks of a pipeline stage; use a smaller one"
            )
        return cls(
            world_size=world_size,
            tp=tp,
            pp=pp,
            cp=cp,
            dp=world_size // size,
            ep=ep,
            etp=etp,
            virtual_stages=parallel.num_virtual_stages_per_pipeline_rank,
            sequence_parallel=parallel.sequence_parallel,
        )

    @property
    def gradient_ranks(self) -> int:
        """Ranks with the same dense parameters: gradients are summed over them, optimizer state is sharded."""
        return self.dp * self.cp

    @property
    def expert_gradient_ranks(self) -> int:
        """The same for experts."""
        return self.world_size // (self.pp * self.ep * self.etp)

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share the stream between matrix products."""
        return self.cp * (self.tp if self.sequence_parallel else 1)

    def layers_of(self, shape: ModelShape, stage: int, chunks_per_rank: int | None = None) -> tuple[int, ...]:
        """Return the layers that a stage holds: equal chunks, dealt to the stages in turn.

        Raises:
            ValueError: they cannot be cut so.
        """
        virtual = self.virtual_stages if chunks_per_rank is None else chunks_per_rank
        chunks = self.pp * virtual
        if shape.num_layers % chunks:
            raise ValueError(
                f"--pipeline-model-parallel-size {self.pp}: times {virtual} chunks a stage must divide the "
                f"{shape.num_layers} layers of {shape.path}; use divisors"
            )
        size = shape.num_layers // chunks
        starts = ((index * self.pp + stage) * size for index in range(virtual))
        return tuple(layer for start in starts for layer in range(start, start + size))

    def chunks_in_flight(self, stage: int, num_micro_batches: int) -> int:
        """Forward passes of a chunk whose backward pass is still to come, at most (1F1B, interleaved or not)."""
        if self.pp == 1:
            return 1
        total = num_micro_batches * self.virtual_stages
        if self.virtual_stages == 1:
            warmup = self.pp - stage - 1
        else:
            warmup = 2 * (self.pp - stage - 1) + (self.virtual_stages - 1) * self.pp
        return min(warmup + 1, total)

    def bubble_share(self, num_micro_batches: int) -> float:
        """Share of a pipelined pass that a stage waits: (p - 1) / (p - 1 + v m) (Narayanan et al., 2104.04473)."""
        waiting = self.pp - 1
        return waiting / (waiting + self.virtual_stages * num_micro_batches)
