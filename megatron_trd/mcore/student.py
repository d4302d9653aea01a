"""The model that learns: forward, loss, backward, step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from megatron_trd.config.schema import Config
from megatron_trd.data.packing import MicroBatch
from megatron_trd.log import get_logger
from megatron_trd.mcore import hf_weights
from megatron_trd.mcore.acceleration import Machine, describe
from megatron_trd.mcore.gpt import build_gpt, forward_stream
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.head_gradient import announce_in_main_grad
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.initial_weights import load_initial_weights
from megatron_trd.mcore.optimizer import build_optimizer
from megatron_trd.mcore.response import gather_response_values, response_rows, response_values
from megatron_trd.mcore.router import begin_step, load_imbalance
from megatron_trd.mcore.schedule import rows_without_gradients, run_schedule
from megatron_trd.mcore.teacher import Teacher
from megatron_trd.objectives.diagnostics import Sums, diagnostic_sums
from megatron_trd.objectives.loss import distillation_loss
from trd_kernels import linear_kl_div

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step reports."""

    sums: list[Sums]
    """Diagnostics of this rank's part of its micro-batches, on the last stage; elsewhere none."""
    grad_norm: float
    """Global gradient norm before clipping; identical on all ranks."""
    lr: float
    """Learning rate this step used."""


class Student:
    """Owns the trained model, its gradient buffers, optimizer and schedule."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        hf: HFModel,
        *,
        total_steps: int,
        vocab_size: int,
        epistemic_ids: Sequence[int],
        random_weights: bool = False,
    ) -> None:
        """Build the model on its first weights. Collective over all ranks.

        Args:
            total_steps: optimizer steps of the whole run, for the schedule.
            vocab_size: tokens that student and teacher both have; columns beyond it are padding.
            epistemic_ids: token ids of the epistemic mass.
            random_weights: read no weights; for measurements.
        """
        self.config, self.groups = config, groups
        self._vocab_size = vocab_size
        self._sequence_parallel = config.parallel.sequence_parallel
        self._epistemic_ids = torch.tensor(sorted(epistemic_ids), dtype=torch.int64, device=groups.device)
        parallel = config.parallel
        logger.info("%s", describe(config, Machine.here(), sparse=hf.moe is not None))
        self.gpt = build_gpt(
            hf,
            config.model,
            groups,
            sequence_parallel=parallel.sequence_parallel,
            virtual_stages=parallel.num_virtual_stages_per_pipeline_rank,
            lora=config.lora if config.lora.lora_rank > 0 else None,
        )
        if hf.moe is not None and config.lora.lora_rank > 0 and groups.rank == 0:
            logger.info("adapters are on attention alone: router, experts and feed-forwards stay as they are")
        if not random_weights:
            load_initial_weights(self.gpt, groups, config.model.megatron_checkpoint, "megatron-checkpoint")
        self.ddp = [
            DistributedDataParallel(
                config=self.gpt.config,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    overlap_grad_reduce=parallel.overlap_grad_reduce,
                    overlap_param_gather=parallel.overlap_param_gather,
                    use_distributed_optimizer=parallel.use_distributed_optimizer,
                    check_for_nan_in_grad=True,
                ),
                module=chunk,
                disable_bucketing=index > 0,  # the first chunk's backward pass hides the others' communication
            )
            for index, chunk in enumerate(self.gpt.chunks)
        ]
        self.optimizer, self.scheduler = build_optimizer(self.ddp, config.optimizer, parallel, total_steps)
        self.scheduler.step(1)  # step t of 1..total uses the schedule's value at t, so the first one learns too
        self._connect_to_schedule()

    def _connect_to_schedule(self) -> None:
        model_config = self.gpt.config
        model_config.grad_scale_func = self.optimizer.scale_loss
        # The tokens' weights carry the normaliser, so gradients are plain sums: no division by a token count.
        model_config.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: finalize_model_grads(
            model, None, **kwargs
        )
        if self.config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.ddp]
            model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def train_step(self, micro_batches: Sequence[MicroBatch], teacher: Teacher) -> StepResult:
        """Accumulate the gradients of one step's micro-batches and update. Collective over all ranks."""
        sums = self.accumulate_gradients(micro_batches, teacher)
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return StepResult(sums=sums, grad_norm=float(grad_norm), lr=lr)

    def accumulate_gradients(self, micro_batches: Sequence[MicroBatch], teacher: Teacher) -> list[Sums]:
        """Fill every trainable parameter's `main_grad` with the gradient of the step's loss, summed over all ranks."""
        self.gpt.train()
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        moe = self.gpt.hf.moe
        if moe is None:
            return self._run(micro_batches, teacher, forward_only=False)
        begin_step(self.gpt, micro_batches, self.groups)
        sums = self._run(micro_batches, teacher, forward_only=False)
        imbalance = load_imbalance(self.gpt, len(moe.sparse_layers), moe.num_experts, self.groups)
        if sums:
            sums[0]["expert_imbalance"] = imbalance, torch.ones_like(imbalance)
        return sums

    def audit(self, micro_batches: Sequence[MicroBatch], teacher: Teacher) -> list[Sums]:
        """Measure the same sums without training. Collective over all ranks."""
        self.gpt.eval()
        with torch.no_grad():
            return self._run(micro_batches, teacher, forward_only=True)

    @torch.no_grad()
    def response_logprobs(self, batch: MicroBatch, temperature: float) -> Tensor:
        """Return the student's log-probability of every response token: [R] fp32, on every rank."""
        self.gpt.eval()
        batch = batch.to(self.groups.device)
        streams = [batch.student] * (self.groups.pp_size if len(self.gpt) > 1 else 1)  # what interleaving asks for
        rows = rows_without_gradients(self.gpt, streams, self.groups)
        num_tokens = batch.response_ids.numel()
        logprobs = torch.empty(num_tokens, dtype=torch.float32, device=self.groups.device)
        if self.groups.is_last_stage:
            weight, scaled = self.gpt.output_weight.detach(), rows[0] / temperature  # the head is linear
            output = linear_kl_div(
                scaled,
                weight,
                scaled,
                weight,
                vocab_size=self._vocab_size,
                token_weight=self._dealt(batch.token_weight),
                labels=self._dealt(batch.response_ids),
                stats=("student_logprob",),
                tp_group=self.groups.tp,
                sequence_parallel=self._sequence_parallel,
            )
            logprobs = gather_response_values(output.stats["student_logprob"], num_tokens, self.groups)
        dist.broadcast(logprobs, group=self.groups.pp, group_src=self.groups.pp_size - 1)
        return logprobs

    def _run(self, micro_batches: Sequence[MicroBatch], teacher: Teacher, *, forward_only: bool) -> list[Sums]:
        teacher_rows = teacher.rows([batch.teacher for batch in micro_batches])

        def forward(chunk: torch.nn.Module, batch: MicroBatch) -> tuple[Tensor, Callable]:
            batch = batch.to(self.groups.device)
            rows = next(teacher_rows) if self.groups.is_last_stage and chunk is self.ddp[-1] else None
            hidden = forward_stream(chunk, batch.student, self.groups)

            def loss(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
                assert rows is not None  # asked for where the last chunk is
                return self._loss(hidden, rows, teacher.output_weight, batch)

            return hidden, loss

        reports: list[dict[str, Sums]] = run_schedule(
            self.ddp, micro_batches, forward, self.groups, forward_only=forward_only
        )
        return [report["sums"] for report in reports]

    def _loss(
        self, hidden: Tensor, teacher_rows: Tensor, teacher_weight: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        weight, head = self._dealt(batch.token_weight), self.gpt.output_weight
        learns = torch.is_grad_enabled() and head.requires_grad
        into_buffer = learns and self.config.model.gradient_accumulation_fusion
        output = distillation_loss(
            self.config.objective,
            student_rows=response_rows(
                hidden.squeeze(1), batch.student, self.groups, sequence_parallel=self._sequence_parallel
            ),
            student_weight=head,
            teacher_rows=teacher_rows,
            teacher_weight=teacher_weight,
            vocab_size=self._vocab_size,
            token_weight_R=weight,
            response_ids_R=self._dealt(batch.response_ids),
            epistemic_ids=self._epistemic_ids,
            tp_group=self.groups.tp,
            sequence_parallel=self._sequence_parallel,
            student_weight_grad=head.main_grad if into_buffer else None,  # type: ignore[attr-defined]
        )
        sums = diagnostic_sums(output, weight, self._dealt(batch.y_o_correct), self.config.objective.token_clip)
        num_tokens = torch.ones((), dtype=torch.int, device=hidden.device)
        loss = output.loss
        if into_buffer and not self.gpt.head_is_embedding:
            loss = announce_in_main_grad(loss, head)
        return loss, num_tokens, {"sums": sums}

    def _dealt(self, values: Tensor) -> Tensor:
        return response_values(values, self.groups, sequence_parallel=self._sequence_parallel)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the student's weights under Hugging Face names, adapters merged. Every rank must exhaust it."""
        self.wait_for_parameters()
        return hf_weights.export(self.gpt, self.groups)

    def export_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the adapter under PEFT names. Every rank must exhaust it."""
        self.wait_for_parameters()
        return hf_weights.export_adapter(self.gpt, self.groups)

    def wait_for_parameters(self) -> None:
        """Make this rank's parameters those of the last step. Collective over the data-parallel group."""
        if self.config.parallel.overlap_param_gather:  # otherwise the gather would wait for the next forward pass
            for chunk in self.ddp:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()
