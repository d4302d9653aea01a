"""The loop over token chunks: two head products, row sums, divergence and gradient, two gradient products.

Per piece of C_l tokens the ranks exchange a few numbers per row, with one all-gather or a few, and the rows
themselves under sequence parallelism; per chunk of C_g tokens one sum of hidden-state gradients. What is reported of
the tokens is put together once, at the end, so that a piece launches little beside its products and row kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from trd_kernels.divergence import Divergence, RowNorms, first_pass_value
from trd_kernels.gradients import Gradients
from trd_kernels.heads import Heads
from trd_kernels.output import LinearKLDivOutput
from trd_kernels.row_kernels import RowKernels, WantedSums
from trd_kernels.softmax_sums import FLOOR, MergedSums
from trd_kernels.statistics_request import StatisticsRequest
from trd_kernels.support import Outcomes, largest, support_mask
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
        heads, spec = self.heads, self.spec
        alpha = 1.0 / spec.temperature
        heads.matmul(student_rows, heads.student_weight.t(), alpha=alpha, out=z_student)
        heads.matmul(self._rows(heads.teacher_input, piece), heads.teacher_weight.t(), alpha=alpha, out=z_teacher)

        as_observed = spec.temperature == 1.0 and spec.top_k == 0
        observed = None
        if as_observed or self.request.observes:
            observed = self._observe(piece.tokens, z_student, z_teacher, for_norms=as_observed)
        if spec.top_k > 0:
            self._compare_on_support(piece.tokens, z_student, z_teacher, logits_grad)
            return
        norms = self._norms(z_student, z_teacher, observed if as_observed else None)
        self._compare(piece.tokens, z_student, z_teacher, norms, logits_grad)

    def _norms(self, z_student: Tensor, z_teacher: Tensor, gathered: Tensor | None = None) -> RowNorms:
        """Return the norms of two blocks of logits, from the sums of all ranks if they are there already."""
        if gathered is None:
            sums = self.rows.softmax_sums(z_student, z_teacher, WantedSums(**self._deltas))
            gathered = self.shard.all_gather(sums.flatten(1))
        return RowNorms.of(MergedSums.of(gathered), **self._deltas)

    @property
    def _deltas(self) -> dict[str, bool]:
        return {"student_delta": self.spec.needs_student_delta, "teacher_delta": self.spec.needs_teacher_delta}

    def _observe(self, tokens: Tensor, z_student: Tensor, z_teacher: Tensor, *, for_norms: bool) -> Tensor:
        """Record what the statistics need; return the sums of all ranks, with what the norms need of them too."""
        request = self.request
        wanted = request.wanted_sums(**{name: on and for_norms for name, on in self._deltas.items()})
        scale = self.spec.temperature  # the blocks hold tempered logits
        columns = request.columns(self.rows, z_student, z_teacher, wanted, scale=scale, tokens=tokens)
        gathered = self.shard.all_gather_columns(columns)
        if request.observes:
            self.record.observed.append({name: x for name, x in gathered.items() if name in ("sums", "token_set")})
        if request.top_k > 0:
            self.record.top_k.append(request.read_top_k(gathered, MergedSums.of(gathered["sums"])))
        return gathered["sums"]

    def _compare_on_support(
        self, tokens: Tensor, z_student: Tensor, z_teacher: Tensor, logits_grad: Tensor | None
    ) -> None:
        """Compare the few outcomes that the support leaves, and give their gradient back to the logits."""
        spec, shard = self.spec, self.shard
        values, columns = largest(z_teacher, spec.top_k)
        padded = pad(values, (0, spec.top_k - values.shape[1]), value=FLOOR)
        inside = support_mask(values, shard.all_gather(padded), spec.top_k, shard.rank)
        outcomes = Outcomes.of(z_student, z_teacher, columns, inside, mode=spec.top_k_mode, rows=self.rows, shard=shard)
        norms = self._norms(outcomes.student, outcomes.teacher)
        gradient = None if logits_grad is None else torch.empty_like(outcomes.student)
        self._compare(tokens, outcomes.student, outcomes.teacher, norms, gradient)
        if gradient is not None and logits_grad is not None:
            outcomes.spread(gradient, z_student, self.rows, out=logits_grad)

    def _compare(
        self, tokens: Tensor, z_student: Tensor, z_teacher: Tensor, norms: RowNorms, gradient: Tensor | None
    ) -> None:
        """Record the piece's values; write the gradient of its logits, weighted, where one is wanted."""
        spec, rows, record = self.spec, self.rows, self.record
        extra = value = is_open = scale = None
        if spec.needs_extra:
            parts = rows.extra(spec, z_student, z_teacher, norms)
            value, summed = parts[:, 0], self.shard.sum(parts)
            extra = summed[:, 1:]
        if spec.token_clip is not None:
            first = summed[:, 0] if spec.needs_extra else first_pass_value(spec, norms)
            is_open = first < spec.token_clip
            record.is_open.append(is_open)
        if gradient is not None:
            scale = self.weight[tokens] * (spec.loss_scale / spec.temperature)
            scale = (scale if is_open is None else scale * is_open)[:, None]
        if value is None or gradient is not None:
            part = rows.divergence(
                spec, z_student, z_teacher, norms, extra=extra, gradient_scale=scale, gradient=gradient
            )
            value = part if value is None else value
        assert value is not None
        record.tokens.append(tokens)
        record.values.append(value)

    def _rows(self, source: Tensor, piece: TokenChunk) -> Tensor:
        """Return the piece's rows of an input `[C, H]`; all-gathered under sequence parallelism."""
        rows = source[piece.local]
        if piece.num_own < rows.shape[0]:
            rows[piece.num_own :] = 0.0  # fillers must be finite even where the dropped row they point at is not
        if self.sequence_parallel:
            rows = self.shard.gather_rows(rows)
        return rows.to(self.heads.operand_dtype)
