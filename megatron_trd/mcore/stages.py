"""Which layers of a model live where: pipeline stages and their chunks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.mcore.hf_config import HFModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where a parameter lives, and its name there."""

    pp_rank: int
    chunk: int
    """Index among the chunks of that rank."""
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The cut of a model's layers. Chunk c of the model lives on pipeline rank c % pp_size."""

    num_layers: int
    pp_size: int
    chunks_per_rank: int

    @property
    def layers_per_chunk(self) -> int:
        """Equal for all chunks."""
        return self.num_layers // (self.pp_size * self.chunks_per_rank)

    def home(self, parameter: str) -> Home:
        """Find a parameter by its name in the whole model. A tied head lives with the embedding."""
        if parameter.startswith("embedding."):
            return Home(pp_rank=0, chunk=0, name=parameter)
        prefix, _, rest = parameter.partition("decoder.layers.")
        if prefix or not rest:  # final norm, head
            return Home(pp_rank=self.pp_size - 1, chunk=self.chunks_per_rank - 1, name=parameter)
        number, _, inside = rest.partition(".")
        chunk, layer = divmod(int(number), self.layers_per_chunk)
        index, pp_rank = divmod(chunk, self.pp_size)
        return Home(pp_rank=pp_rank, chunk=index, name=f"decoder.layers.{layer}.{inside}")


def cut_into_stages(model: HFModel, pp_size: int, chunks_per_rank: int = 1) -> Stages:
    """Cut the layers into equal chunks.

    Raises:
        ValueError: they cannot be cut so.
    """
    layers = model.geometry.num_layers
    if layers % pp_size:
        fitting = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise ValueError(
            f"--pipeline-model-parallel-size {pp_size}: must divide the {layers} layers of {model.path}; use one of "
            f"{fitting}"
        )
    if layers // pp_size % chunks_per_rank:
        raise ValueError(
            f"--num-virtual-stages-per-pipeline-rank {chunks_per_rank}: must divide the {layers // pp_size} layers "
            f"that a stage has of {model.path}; use 1 or another divisor"
        )
    return Stages(num_layers=layers, pp_size=pp_size, chunks_per_rank=chunks_per_rank)
