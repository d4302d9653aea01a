"""The loop over token chunks: two head products, row sums, divergence and gradient, two gradient products.

Per chunk the ranks exchange one all-gather of a few numbers per row (two for JSD and the entry clip, two for a
renormalised top-K, three for its tail bucket), the rows themselves under sequence parallelism, and one sum of
hidden-state gradients. A row kernel for a device has three places to enter: `softmax_sums`, `row_extra` and
`row_divergence`, which see plain `[rows, V_local]` blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trd_kernels.divergence import Divergence, RowNorms, first_pass_value, row_divergence, row_extra
from trd_kernels.output import LinearKLDivOutput
from trd_kernels.softmax_sums import FLOOR, merge_softmax_sums, over_tiles, softmax_sums
from trd_kernels.statistics_request import StatisticsRequest
from trd_kernels.support import Support, largest, select_support
from trd_kernels.token_chunks import TokenChunk, TokenChunks
from trd_kernels.vocab_parallel import VocabShard

Sums = dict[str, Tensor]

# Row math runs on this fraction of a chunk at a time; its temporaries then add about one more logits block.
_TILES_PER_CHUNK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Both heads without padding rows, as the matrix products want them."""

    student_input: Tensor
    student_weight: Tensor
    teacher_input: Tensor
    teacher_weight: Tensor
    num_padding: int
    compute_dtype: torch.dtype
    """Logits, sums and gradient accumulators: fp64 for fp64 inputs, else fp32."""
    operand_dtype: torch.dtype
    """Operands of matrix products: the inputs' own, but fp32 for bf16 on a CPU, which cannot widen its output."""

    @classmethod
    def of(
        cls, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, valid: int
    ) -> Heads:
        """Take the first `valid` rows of the weights."""
        dtype = student_input.dtype
        compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        operand_dtype = dtype if student_input.is_cuda else compute_dtype
        return cls(
            student_input=student_input,
            student_weight=student_weight[:valid].to(operand_dtype),
            teacher_input=teacher_input,
            teacher_weight=teacher_weight[:valid].to(operand_dtype),
            num_padding=student_weight.shape[0] - valid,
            compute_dtype=compute_dtype,
            operand_dtype=operand_dtype,
        )

    def rows_in(self, num_bytes: float, columns: int) -> int:
        """Return how many rows of logits with all their companions fit, counting `columns` on every rank alike."""
        item = torch.finfo(self.compute_dtype).bits // 8
        # Student logits, teacher logits, temporaries of a tile; the rounded gradient where operands are narrower.
        per_entry = 4 * item + (0 if self.operand_dtype == self.compute_dtype else self.operand_dtype.itemsize)
        return max(1, int(num_bytes // (per_entry * max(columns, 1))))

    def matmul(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """Return `a @ b` in the compute dtype."""
        if self.operand_dtype == self.compute_dtype:
            return torch.mm(a, b, out=out)
        if out is None:
            return torch.mm(a, b, out_dtype=self.compute_dtype)
        return torch.mm(a, b, out_dtype=self.compute_dtype, out=out)

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """Add `a @ b` to `total`, which has the compute dtype."""
        if self.operand_dtype == self.compute_dtype:
            total.addmm_(a, b)
        else:
            torch.addmm(total, a, b, out_dtype=self.compute_dtype, out=total)


@dataclass(kw_only=True)
class ChunkPass:
    """One call's work. `run` fills `input_grad` and `weight_grad` if wanted and returns the outputs."""

    spec: Divergence
    heads: Heads
    shard: VocabShard
    request: StatisticsRequest
    chunks: TokenChunks
    token_weight: Tensor | None
    num_tokens: int
    sequence_parallel: bool
    grad_reduce_dtype: torch.dtype
    want_input_grad: bool
    want_weight_grad: bool
    input_grad: Tensor | None = field(default=None, init=False)
    """`[N, Hs]` or this rank's `[N / tp, Hs]`, summed over ranks."""
    weight_grad: Tensor | None = field(default=None, init=False)
    """`[V_l, Hs]`, padding rows 0."""
    # Per token, `[N + 1]`: entry N takes the filler rows.
    weight: Tensor = field(init=False)
    value: Tensor = field(init=False)
    """This rank's part of the divergence."""
    is_open: Tensor = field(init=False)
    """False where the token clip closes."""
    stats: Sums = field(init=False)

    def __post_init__(self) -> None:
        x, dtype = self.heads.student_input, self.heads.compute_dtype
        if self.want_input_grad:
            self.input_grad = x.new_zeros(x.shape, dtype=dtype)
        if self.want_weight_grad:
            self.weight_grad = x.new_zeros(self.shard.num_valid + self.heads.num_padding, x.shape[1], dtype=dtype)
        entries = self.num_tokens + 1
        self.weight = x.new_ones(entries, dtype=dtype)
        if self.token_weight is not None:
            self.weight[:-1] = self.token_weight
        self.weight[-1] = 0.0
        self.value = x.new_zeros(entries, dtype=dtype)
        self.is_open = x.new_ones(entries, dtype=torch.bool)
        self.stats = {name: x.new_zeros(entries, dtype=dtype) for name in self.request.names}

    def run(self) -> LinearKLDivOutput:
        """Go through all chunks."""
        blocks = self.value.new_empty(2, self.chunks.max_rows, self.shard.num_valid)
        for chunk in self.chunks:
            rows = chunk.tokens.shape[0]
            self._run_chunk(chunk, blocks[0, :rows], blocks[1, :rows])
        token_loss = self.shard.sum(self.value)[:-1]
        clip = self.spec.token_clip
        if clip is not None:
            token_loss = torch.where(self.is_open[:-1], token_loss.clamp(max=clip), clip)
        token_loss = token_loss * self.spec.loss_scale
        loss = (self.weight[:-1] * token_loss).sum()
        return LinearKLDivOutput(loss, token_loss, {name: x[:-1] for name, x in self.stats.items()})

    def _run_chunk(self, chunk: TokenChunk, z_student: Tensor, z_teacher: Tensor) -> None:
        heads, spec = self.heads, self.spec
        student_rows = self._rows(heads.student_input, chunk)
        heads.matmul(student_rows, heads.student_weight.t(), out=z_student)
        heads.matmul(self._rows(heads.teacher_input, chunk), heads.teacher_weight.t(), out=z_teacher)

        norms = self._row_norms(chunk, z_student, z_teacher)
        extra = None
        if spec.needs_extra:
            sums = over_tiles(
                lambda t: row_extra(spec, z_student[t], z_teacher[t], norms.rows(t)), **self._tiling(z_student)
            )
            merged = self.shard.all_gather_columns(sums)
            extra = merged["extra"].sum(0)[:, None]
        if spec.token_clip is not None:
            first = merged["value"].sum(0) if spec.needs_extra else first_pass_value(spec, norms)
            self.is_open[chunk.tokens] = first < spec.token_clip
        scale = None
        if self.want_input_grad or self.want_weight_grad:
            scale = (self.weight[chunk.tokens] * self.is_open[chunk.tokens])[:, None]
            scale *= spec.loss_scale / spec.temperature

        def tile_values(t: slice) -> Sums:
            part = row_divergence(
                spec,
                z_student[t],
                z_teacher[t],
                norms.rows(t),
                extra=None if extra is None else extra[t],
                gradient_scale=None if scale is None else scale[t],
            )
            return {"value": part}

        self.value[chunk.tokens] = over_tiles(tile_values, **self._tiling(z_student))["value"]
        if scale is not None:
            self._add_gradients(chunk, z_student.to(heads.operand_dtype), student_rows)

    def _row_norms(self, chunk: TokenChunk, z_student: Tensor, z_teacher: Tensor) -> RowNorms:
        """Write the chunk's statistics and return the softmaxes that the divergence compares.

        Leaves in the two blocks the logits that it compares: tempered, and cut to the support.
        """
        spec, request = self.spec, self.request
        tiling = self._tiling(z_student)
        as_observed = spec.temperature == 1.0 and spec.top_k == 0

        def first_sums(t: slice) -> Sums:
            sums: Sums = {}
            if as_observed or request.names:
                deltas = self._deltas(z_student[t], z_teacher[t]) if as_observed else (None, None)
                for side, z, delta in zip(("student", "teacher"), (z_student[t], z_teacher[t]), deltas, strict=True):
                    wanted = request.wanted_sums(side, chunk.tokens[t])
                    sums |= _named(side, softmax_sums(z, self.shard.start, delta=delta, **wanted))
            if spec.temperature != 1.0:
                z_student[t] /= spec.temperature
                z_teacher[t] /= spec.temperature
            if spec.top_k > 0:
                sums["largest"] = largest(z_teacher[t], spec.top_k)
            return sums

        sums = over_tiles(first_sums, **tiling)
        gathered = self.shard.all_gather_columns(sums) if sums else {}
        if as_observed or request.names:
            student, teacher = _merged("student", gathered), _merged("teacher", gathered)
            for name, column in request.read(student, teacher, chunk.tokens).items():
                self.stats[name][chunk.tokens] = column
        if as_observed:
            return RowNorms.of(student, teacher)

        if spec.top_k > 0:
            support = select_support(gathered["largest"], spec.top_k, self.shard.rank)
            self._cut_to_support(support, z_student, z_teacher)

        def compared_sums(t: slice) -> Sums:
            of_student, of_teacher = self._deltas(z_student[t], z_teacher[t])
            return _named("student", softmax_sums(z_student[t], 0, delta=of_student)) | _named(
                "teacher", softmax_sums(z_teacher[t], 0, delta=of_teacher)
            )

        gathered = self.shard.all_gather_columns(over_tiles(compared_sums, **tiling))
        return RowNorms.of(_merged("student", gathered), _merged("teacher", gathered))

    def _cut_to_support(self, support: Support, z_student: Tensor, z_teacher: Tensor) -> None:
        """Rewrite logits outside the support so that the full-vocabulary formulas give the restricted divergence.

        Renormalising removes them. For the tail bucket, the teacher's tail takes the shape of the student's: inside
        it log(q / p) is then the log-ratio of the two tail masses, at every column, in values and gradients alike.
        """
        tiling = self._tiling(z_student)
        spec = self.spec
        if spec.top_k_mode != "tail_bucket":

            def remove(t: slice) -> Sums:
                outside = ~support.mask(z_teacher[t], t)
                z_teacher[t].masked_fill_(outside, FLOOR)
                if spec.top_k_mode == "renorm_both":
                    z_student[t].masked_fill_(outside, FLOOR)
                return {}

            over_tiles(remove, **tiling)
            return

        def tail_sums(t: slice) -> Sums:
            inside = support.mask(z_teacher[t], t)
            return _named("student", softmax_sums(z_student[t].masked_fill(inside, FLOOR), 0)) | _named(
                "teacher", softmax_sums(z_teacher[t].masked_fill(inside, FLOOR), 0)
            )

        gathered = self.shard.all_gather_columns(over_tiles(tail_sums, **tiling))
        log_ratio = RowNorms.of(_merged("student", gathered), _merged("teacher", gathered)).log_ratio

        def reshape_tail(t: slice) -> Sums:
            inside = support.mask(z_teacher[t], t)
            z_teacher[t] = torch.where(inside, z_teacher[t], z_student[t] - log_ratio[t])
            return {}

        over_tiles(reshape_tail, **tiling)

    def _add_gradients(self, chunk: TokenChunk, logits_grad: Tensor, student_rows: Tensor) -> None:
        heads = self.heads
        if self.weight_grad is not None:
            heads.accumulate(self.weight_grad[: self.shard.num_valid], logits_grad.t(), student_rows)
        if self.input_grad is not None:
            partial = heads.matmul(logits_grad, heads.student_weight)
            dtype = torch.float64 if heads.compute_dtype == torch.float64 else self.grad_reduce_dtype
            summed = self.shard.reduce_rows(partial, dtype=dtype, scatter=self.sequence_parallel)
            self.input_grad[chunk.local[: chunk.num_own]] = summed[: chunk.num_own]

    def _rows(self, source: Tensor, chunk: TokenChunk) -> Tensor:
        """Return the chunk's rows of an input `[C, H]`; all-gathered under sequence parallelism."""
        rows = source[chunk.local]
        rows[chunk.num_own :] = 0.0  # fillers must be finite even where the dropped row they point at is not
        if self.sequence_parallel:
            rows = self.shard.gather_rows(rows)
        return rows.to(self.heads.operand_dtype)

    def _deltas(self, z_student: Tensor, z_teacher: Tensor) -> tuple[Tensor | None, Tensor | None]:
        spec = self.spec
        if not (spec.needs_student_delta or spec.needs_teacher_delta):
            return None, None
        delta = z_student - z_teacher
        return (delta if spec.needs_student_delta else None), (delta if spec.needs_teacher_delta else None)

    def _tiling(self, z: Tensor) -> dict[str, int]:
        return {"num_rows": z.shape[0], "tile_rows": max(1, -(-self.chunks.max_rows // _TILES_PER_CHUNK))}


def _named(side: str, sums: Sums) -> Sums:
    return {f"{side}.{name}": x for name, x in sums.items()}


def _merged(side: str, gathered: Sums) -> Sums:
    prefix = f"{side}."
    return merge_softmax_sums({n.removeprefix(prefix): x for n, x in gathered.items() if n.startswith(prefix)})
