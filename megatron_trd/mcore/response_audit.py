"""Two models along given responses, token by token, without training anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.config.schema import Config
from megatron_trd.data.packing import Multiples, pack_in_order
from megatron_trd.mcore.gpt import GPTChunks, build_gpt
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.initial_weights import load_initial_weights
from megatron_trd.mcore.response import gather_response_values, response_values
from megatron_trd.mcore.schedule import rows_without_gradients
from megatron_trd.objectives.token_audit import TokenAudit
from megatron_trd.records import Sample
from trd_kernels import linear_kl_div

STATISTICS = ("divergence", "teacher_logprob", "teacher_entropy", "teacher_mass", "student_logprob", "student_entropy")


class ResponseAudit:
    """Student and teacher on this rank. In OPSD they are one model in two contexts."""

    def __init__(
        self, config: Config, groups: Groups, student: HFModel, teacher: HFModel, epistemic_ids: Sequence[int]
    ) -> None:
        """Load the models. Collective over all ranks.

        Args:
            epistemic_ids: first tokens of the words that open a correction; not empty.
        """
        self._groups, self._sequence_parallel = groups, config.parallel.sequence_parallel
        self._multiples = Multiples.of(config.parallel, config.model.tokens_multiple)
        self._workspace_mb, self._backend = config.objective.kl_workspace_mb, config.objective.kl_backend
        self._vocab_size = min(student.geometry.vocab_size, teacher.geometry.vocab_size)
        self._epistemic_ids = torch.tensor(sorted(epistemic_ids), dtype=torch.int64, device=groups.device)
        model = config.model
        self._student = self._load(config, student, model.megatron_checkpoint, "megatron-checkpoint")
        self._teacher = self._student
        if config.method.mode == "opd":
            start = model.teacher_megatron_checkpoint
            self._teacher = self._load(config, teacher, start, "teacher-megatron-checkpoint")

    def _load(self, config: Config, hf: HFModel, start: str | None, flag: str) -> GPTChunks:
        model = build_gpt(hf, config.model, self._groups, sequence_parallel=self._sequence_parallel)
        load_initial_weights(model, self._groups, start, flag)
        return model.requires_grad_(False).eval()

    @torch.no_grad()
    def audit(self, sample: Sample) -> TokenAudit:
        """Return what both models say along one response. Collective over the ranks that share a model."""
        batch = pack_in_order([sample], self._multiples).to(self._groups.device)
        student_rows = rows_without_gradients(self._student, [batch.student], self._groups)
        teacher_rows = rows_without_gradients(self._teacher, [batch.teacher], self._groups)
        found: list[dict[str, list] | None] = [None]
        if self._groups.is_last_stage:
            found = [self._statistics(student_rows[0], teacher_rows[0], batch.response_ids)]
        dist.broadcast_object_list(found, group=self._groups.pp, group_src=self._groups.pp_size - 1)
        assert found[0] is not None
        return TokenAudit(**{name: tuple(values) for name, values in found[0].items()})

    def _statistics(self, student_rows: Tensor, teacher_rows: Tensor, response_ids: Tensor) -> dict[str, list]:
        def dealt(values: Tensor) -> Tensor:
            return response_values(values, self._groups, sequence_parallel=self._sequence_parallel)

        num_tokens = response_ids.numel()
        stats = linear_kl_div(
            student_rows,
            self._student.output_weight,
            teacher_rows,
            self._teacher.output_weight,
            vocab_size=self._vocab_size,
            token_weight=dealt(torch.ones(num_tokens, device=response_ids.device)),
            labels=dealt(response_ids),
            token_set=self._epistemic_ids,
            stats=STATISTICS,
            return_top_k=min(self._epistemic_ids.numel() + 1, self._vocab_size),  # one of them is no such word
            tp_group=self._groups.tp,
            sequence_parallel=self._sequence_parallel,
            workspace_mb=self._workspace_mb,
            backend=self._backend,
        ).stats
        is_epistemic = torch.isin(stats["teacher_top_ids"], self._epistemic_ids)
        best = stats["teacher_top_logprobs"].masked_fill(is_epistemic, -torch.inf).amax(1).exp()

        def whole(values: Tensor) -> list[float]:
            return gather_response_values(values, num_tokens, self._groups).tolist()

        return {
            "kl": whole(stats["divergence"]),
            "teacher_logprob": whole(stats["teacher_logprob"]),
            "teacher_entropy": whole(stats["teacher_entropy"]),
            "epistemic_mass": whole(stats["teacher_mass"]),
            "best_continuation": whole(best),
            "student_logprob": whole(stats["student_logprob"]),
            "student_entropy": whole(stats["student_entropy"]),
        }
