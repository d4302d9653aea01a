"""The loop over token chunks: two head products, row sums, divergence and gradient, two gradient products.

Per piece of C_l tokens the ranks exchange one all-gather of a few numbers per row (two for JSD and the entry clip,
two for a renormalised top-K, three for its tail bucket), and the rows themselves under sequence parallelism; per
chunk of C_g tokens one sum of hidden-state gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trd_kernels.divergence import Divergence, RowNorms, first_pass_value
from trd_kernels.gradients import Gradients
from trd_kernels.heads import Heads
from trd_kernels.output import LinearKLDivOutput
from trd_kernels.row_kernels import RowKernels, Sums, WantedSums
from trd_kernels.statistics_request import StatisticsRequest
from trd_kernels.support import select_support
from trd_kernels.token_chunks import TokenChunk
from trd_kernels.vocab_parallel import VocabShard
from trd_kernels.workspace import ChunkSizes, Workspace


@dataclass(kw_only=True)
class ChunkPass:
    """One call's work: `run` adds to `gradients` and returns the outputs."""

    spec: Divergence
    heads: Heads
    rows: RowKernels
    shard: VocabShard
    request: StatisticsRequest
    kept: TokenChunk
    sizes: ChunkSizes
    gradients: Gradients
    weight: Tensor
    """`[N + 1]` token weights; entry N, of the filler rows, is 0."""
    sequence_parallel: bool
    # Per token, `[N + 1]`: entry N takes the filler rows.
    value: Tensor = field(init=False)
    """This rank's part of the divergence."""
    is_open: Tensor = field(init=False)
    """0 where the token clip closes."""
    stats: Sums = field(init=False)

    def __post_init__(self) -> None:
        self.value = self.weight.new_zeros(self.weight.shape[0])
        self.is_open = self.weight.new_ones(self.weight.shape[0])
        self.stats = self.request.empty(self.weight.shape[0], like=self.weight)

    def run(self) -> LinearKLDivOutput:
        """Go through all chunks."""
        workspace = Workspace.allocate(self.sizes, self.heads, with_grad=self.gradients.wanted)
        for chunk in self.kept.split(self.sizes.gradient):
            self._run_chunk(chunk, workspace)
        self.gradients.finish()
        value = self.shard.sum(self.value)[:-1]
        if "divergence" in self.stats:
            self.stats["divergence"][:-1] = value
        clip = self.spec.token_clip
        token_loss = value if clip is None else value.clamp(max=clip).where(self.is_open[:-1] > 0, clip)
        token_loss = token_loss * self.spec.loss_scale
        loss = (self.weight[:-1] * token_loss).sum()
        return LinearKLDivOutput(loss, token_loss, {name: x[:-1] for name, x in self.stats.items()})

    def _run_chunk(self, chunk: TokenChunk, workspace: Workspace) -> None:
        """Fill the chunk's block of logits gradients piece by piece, then multiply it out."""
        student_rows, piece_rows, done = [], [], 0
        for piece in chunk.split(self.sizes.logits):
            n = piece.num_rows
            logits_grad = None if workspace.logits_grad is None else workspace.logits_grad[done : done + n]
            rows = self._rows(self.heads.student_input, piece)
            self._run_piece(piece, rows, workspace.student_logits[:n], workspace.teacher_logits[:n], logits_grad)
            if self.gradients.weight_grad is not None:
                student_rows.append(rows)
            piece_rows.append(n)
            done += n
        if workspace.logits_grad is not None:
            self.gradients.add(chunk, workspace.logits_grad[:done], student_rows, piece_rows)

    def _run_piece(
        self, piece: TokenChunk, student_rows: Tensor, z_student: Tensor, z_teacher: Tensor, logits_grad: Tensor | None
    ) -> None:
        heads, spec, rows, tokens = self.heads, self.spec, self.rows, piece.tokens
        alpha = 1.0 / spec.temperature
        heads.matmul(student_rows, heads.student_weight.t(), alpha=alpha, out=z_student)
        heads.matmul(self._rows(heads.teacher_input, piece), heads.teacher_weight.t(), alpha=alpha, out=z_teacher)

        norms = self._row_norms(tokens, z_student, z_teacher)
        extra = None
        if spec.needs_extra:
            sums = rows.extra(spec, z_student, z_teacher, norms)
            self.value[tokens] = sums["value"]
            gathered = self.shard.all_gather_columns(sums)
            extra = gathered["extra"].sum(0)[:, None]
        if spec.token_clip is not None:
            first = gathered["value"].sum(0) if spec.needs_extra else first_pass_value(spec, norms)
            self.is_open[tokens] = (first < spec.token_clip).to(first.dtype)
        scale = None
        if logits_grad is not None:
            scale = (self.weight[tokens] * self.is_open[tokens])[:, None]
            scale *= spec.loss_scale / spec.temperature
        elif spec.needs_extra:
            return
        value = rows.divergence(
            spec, z_student, z_teacher, norms, extra=extra, gradient_scale=scale, gradient=logits_grad
        )
        if value is not None:
            self.value[tokens] = value

    def _row_norms(self, tokens: Tensor, z_student: Tensor, z_teacher: Tensor) -> RowNorms:
        """Write the piece's statistics and return the softmaxes that the divergence compares.

        Leaves in the two blocks the logits that it compares: cut to the support.
        """
        spec, request, rows = self.spec, self.request, self.rows
        deltas = {"student_delta": spec.needs_student_delta, "teacher_delta": spec.needs_teacher_delta}
        as_observed = spec.temperature == 1.0 and spec.top_k == 0
        sums: Sums = {}
        if as_observed or request.observes:
            # The blocks hold tempered logits; statistics are those of temperature 1.
            wanted = WantedSums(**request.wanted(), **(deltas if as_observed else {}))
            sums = rows.softmax_sums(z_student, z_teacher, wanted, spec.temperature)
            sums = request.local_sums(z_student, z_teacher, spec.temperature, sums, tokens)
        if spec.top_k > 0:
            sums["largest"] = rows.largest(z_teacher, spec.top_k)
        gathered = self.shard.all_gather_columns(sums) if sums else {}
        if request.observes:
            for name, column in request.read(gathered, tokens).items():
                self.stats[name][tokens] = column.to(self.stats[name].dtype)
        if as_observed:
            return RowNorms.of(gathered)
        if spec.top_k > 0:
            self._cut_to_support(gathered["largest"], z_student, z_teacher)
        return RowNorms.of(self.shard.all_gather_columns(rows.softmax_sums(z_student, z_teacher, WantedSums(**deltas))))

    def _cut_to_support(self, largest: Tensor, z_student: Tensor, z_teacher: Tensor) -> None:
        """Rewrite logits outside the support so that the full-vocabulary formulas give the restricted divergence.

        Renormalising removes them. For the tail bucket, the teacher's tail takes the shape of the student's: inside
        it log(q / p) is then the log-ratio of the two tail masses, at every column, in values and gradients alike.
        """
        support = select_support(largest, self.spec.top_k, self.shard.rank)
        if self.spec.top_k_mode != "tail_bucket":
            both = self.spec.top_k_mode == "renorm_both"
            self.rows.remove_outside(support, z_student, z_teacher, both=both)
            return
        sums = self.shard.all_gather_columns(self.rows.outside_sums(support, z_student, z_teacher))
        self.rows.reshape_outside(support, z_student, z_teacher, RowNorms.of(sums).log_ratio)

    def _rows(self, source: Tensor, piece: TokenChunk) -> Tensor:
        """Return the piece's rows of an input `[C, H]`; all-gathered under sequence parallelism."""
        rows = source[piece.local]
        rows[piece.num_own :] = 0.0  # fillers must be finite even where the dropped row they point at is not
        if self.sequence_parallel:
            rows = self.shard.gather_rows(rows)
        return rows.to(self.heads.operand_dtype)
