"""The loop over token chunks: two head products, row sums, divergence and gradient, two gradient products.

Per piece of C_l tokens the ranks exchange one all-gather of a few numbers per row (two for JSD and the entry clip,
two for a renormalised top-K, three for its tail bucket), and the rows themselves under sequence parallelism; per
chunk of C_g tokens one sum of hidden-state gradients. What is reported of the tokens is put together once, at the
end, so that a piece launches little beside its products and row kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trd_kernels.divergence import Divergence, RowNorms, first_pass_value
from trd_kernels.gradients import Gradients
from trd_kernels.heads import Heads
from trd_kernels.output import LinearKLDivOutput
from trd_kernels.row_kernels import RowKernels, WantedSums
from trd_kernels.softmax_sums import MergedSums
from trd_kernels.statistics_request import StatisticsRequest
from trd_kernels.support import select_support
from trd_kernels.token_chunks import TokenChunk
from trd_kernels.token_record import TokenRecord
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
    record: TokenRecord = field(default_factory=TokenRecord, init=False)

    def run(self) -> LinearKLDivOutput:
        """Go through all chunks."""
        workspace = Workspace.allocate(self.sizes, self.heads, with_grad=self.gradients.wanted)
        for chunk in self.kept.split(self.sizes.gradient):
            self._run_chunk(chunk, workspace)
        self.gradients.finish()
        return self.record.outputs(spec=self.spec, request=self.request, shard=self.shard, weight=self.weight)

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
        heads, spec, rows, record = self.heads, self.spec, self.rows, self.record
        alpha = 1.0 / spec.temperature
        heads.matmul(student_rows, heads.student_weight.t(), alpha=alpha, out=z_student)
        heads.matmul(self._rows(heads.teacher_input, piece), heads.teacher_weight.t(), alpha=alpha, out=z_teacher)

        norms = self._row_norms(piece.tokens, z_student, z_teacher)
        extra = value = is_open = None
        if spec.needs_extra:
            parts = rows.extra(spec, z_student, z_teacher, norms)
            value, summed = parts[:, 0], self.shard.sum(parts)
            extra = summed[:, 1:]
        if spec.token_clip is not None:
            first = summed[:, 0] if spec.needs_extra else first_pass_value(spec, norms)
            is_open = first < spec.token_clip
            record.is_open.append(is_open)
        if value is None or logits_grad is not None:
            scale = None
            if logits_grad is not None:
                scale = self.weight[piece.tokens] * (spec.loss_scale / spec.temperature)
                scale = (scale if is_open is None else scale * is_open)[:, None]
            part = rows.divergence(
                spec, z_student, z_teacher, norms, extra=extra, gradient_scale=scale, gradient=logits_grad
            )
            value = part if value is None else value
        assert value is not None
        record.tokens.append(piece.tokens)
        record.values.append(value)

    def _row_norms(self, tokens: Tensor, z_student: Tensor, z_teacher: Tensor) -> RowNorms:
        """Record what the statistics need of the piece and return the softmaxes that the divergence compares.

        Leaves in the two blocks the logits that it compares: cut to the support.
        """
        spec, request, rows = self.spec, self.request, self.rows
        deltas = {"student_delta": spec.needs_student_delta, "teacher_delta": spec.needs_teacher_delta}
        as_observed = spec.temperature == 1.0 and spec.top_k == 0
        columns: dict[str, Tensor] = {}
        if as_observed or request.observes:
            # The blocks hold tempered logits; statistics are those of temperature 1.
            wanted = request.wanted_sums(**{name: on and as_observed for name, on in deltas.items()})
            columns = request.columns(rows, z_student, z_teacher, wanted, scale=spec.temperature, tokens=tokens)
        if spec.top_k > 0:
            columns["largest"] = rows.largest(z_teacher, spec.top_k)
        gathered = self.shard.all_gather_columns(columns) if columns else {}
        merged = MergedSums.of(gathered["sums"]) if as_observed or request.top_k > 0 else None
        if request.observes:
            self.record.observed.append({name: x for name, x in gathered.items() if name in ("sums", "token_set")})
        if merged is not None and request.top_k > 0:
            self.record.top_k.append(request.read_top_k(gathered, merged))
        if as_observed and merged is not None:
            return RowNorms.of(merged, **deltas)
        if spec.top_k > 0:
            self._cut_to_support(gathered["largest"], z_student, z_teacher)
        sums = rows.softmax_sums(z_student, z_teacher, WantedSums(**deltas))
        return RowNorms.of(MergedSums.of(self.shard.all_gather(sums.flatten(1))), **deltas)

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
        sums = self.shard.all_gather(self.rows.outside_sums(support, z_student, z_teacher).flatten(1))
        self.rows.reshape_outside(support, z_student, z_teacher, RowNorms.of(MergedSums.of(sums)).log_ratio)

    def _rows(self, source: Tensor, piece: TokenChunk) -> Tensor:
        """Return the piece's rows of an input `[C, H]`; all-gathered under sequence parallelism."""
        rows = source[piece.local]
        if piece.num_own < rows.shape[0]:
            rows[piece.num_own :] = 0.0  # fillers must be finite even where the dropped row they point at is not
        if self.sequence_parallel:
            rows = self.shard.gather_rows(rows)
        return rows.to(self.heads.operand_dtype)
