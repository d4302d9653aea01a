"""What `trd_kernels.linear_kl_div` holds: its own sizes, computed without torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.planning.activations import Precision
from megatron_trd.planning.grid import Grid
from megatron_trd.planning.model_shape import ModelShape

MIB = 2**20
DEFAULT_WORKSPACE_MB = 1200
"""That of `trd_kernels.DEFAULT_WORKSPACE_MB`; divided by the tensor-parallel ranks."""
_SCRATCH_MB = {"cpu": 8.0, "cuda": 0.0}
"""Temporaries of the row kernels: plain torch on a CPU, Triton on a GPU."""
_ALIGNMENT, _GRADIENT_RATIO = 32, 4
_VECTOR_BYTES = 128
"""Of a response token: weight, label, loss, statistics and their bookkeeping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMemory:
    """Bytes of one call on one rank of the last stage, by purpose."""

    workspace: int
    """Logits and their gradients, of a bounded number of tokens."""
    rows: int
    """Both sides' hidden states of the response tokens, and the gradient of the student's."""
    head_gradient: int
    """fp32 gradient of a trainable head, until the backward pass has taken it."""
    upcast_heads: int
    """fp32 copies of both heads: in bf16 on a CPU only."""

    @property
    def forward(self) -> int:
        """Held at once while the loss is computed."""
        return self.workspace + self.rows + self.head_gradient + self.upcast_heads

    def backward(self, element: int) -> int:
        """Held at once when the gradients leave: as they were, multiplied, and rounded to the parameter's dtype."""
        copies = (4 + 4 + (element if element == 2 else 0)) / 4
        return round(self.head_gradient * copies + self.rows)


def chunk_tokens(budget_mb: float, columns: int, precision: Precision) -> tuple[int, int]:
    """Return tokens whose logits, and whose rounded gradient, are held at a time: `ChunkSizes.within`."""
    on_cpu = precision.implementation == "cpu"
    budget_mb -= min(_SCRATCH_MB["cpu" if on_cpu else "cuda"], budget_mb / 3)
    ratio = 0 if on_cpu or precision.element == 4 else _GRADIENT_RATIO
    logits = int(budget_mb * MIB // ((8 + ratio * precision.element) * max(columns, 1)))
    if logits > _ALIGNMENT:
        logits -= logits % _ALIGNMENT
    logits = max(logits, 1)
    return logits, logits * max(ratio, 1)


def loss_memory(
    student: ModelShape,
    teacher: ModelShape,
    grid: Grid,
    precision: Precision,
    *,
    response_tokens: int,
    workspace_mb: int | None,
    fused_head_gradient: bool,
) -> LossMemory:
    """Size one call.

    Args:
        response_tokens: of one micro-batch, over all ranks that share it.
        workspace_mb: `--kl-workspace-mb`.
        fused_head_gradient: `--gradient-accumulation-fusion`: its gradient goes into the gradient buffer at once.
    """
    a, h, columns = precision.element, student.hidden_size, student.vocab_size // grid.tp
    on_cpu = precision.implementation == "cpu"
    budget = DEFAULT_WORKSPACE_MB / grid.tp if workspace_mb is None else workspace_mb
    local = response_tokens / grid.cp  # rows that meet the heads of a tensor-parallel rank
    logits, gradient = (min(size, local) for size in chunk_tokens(budget, columns, precision))
    width = -(-columns // _ALIGNMENT) * _ALIGNMENT
    blocks = 8 * logits * width + (0 if on_cpu or a == 4 else a * gradient * width)
    scratch = min(_SCRATCH_MB["cpu" if on_cpu else "cuda"], budget / 3) * MIB
    chunk_rows = gradient * (4 * h + a * h) + logits * a * teacher.hidden_size
    own = response_tokens / grid.sequence_ranks
    rows = own * (a * (h + teacher.hidden_size) + 4 * h) + local * _VECTOR_BYTES
    return LossMemory(
        workspace=round(blocks + scratch + chunk_rows),
        rows=round(rows),
        head_gradient=0 if precision.lora_rank or fused_head_gradient else columns * h * 4,
        upcast_heads=columns * (h + teacher.hidden_size) * 4 if on_cpu and a == 2 else 0,
    )
