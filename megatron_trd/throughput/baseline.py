"""The plain way to distil, to compare with: transformers' models, padded micro-batches, all logits, torch's AdamW.

The student holds fp32 weights and computes under autocast in bf16, or in fp32 with `--no-bf16`; the teacher's weights
are in the precision that it computes in. It takes the same samples and minimises the same loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_trd.config.schema import Config
from megatron_trd.data.packing import lay_out, stream_lengths
from megatron_trd.records import Sample
from megatron_trd.throughput.stopwatch import Stopwatch


def require_supported(config: Config) -> None:
    """Check that the baseline can do what the flags say.

    Raises:
        ValueError: it cannot.
    """
    for flag, value, wanted in (
        ("lora-rank", config.lora.lora_rank, 0),
        ("divergence", config.objective.divergence, "forward-kl"),
        ("teacher-top-k", config.objective.teacher_top_k, 0),
        ("token-clip", config.objective.token_clip, None),
        ("entry-clip", config.objective.entry_clip, None),
    ):
        if value != wanted:
            raise ValueError(f"--{flag} {value}: the baseline has only the default; leave it, or --baseline, out")


class Baseline:
    """One process, one device."""

    def __init__(self, config: Config, device: torch.device, batch_size: int | None) -> None:
        """Load student and teacher.

        Args:
            batch_size: sequences of a micro-batch; None = as many of the step's longest as
                `--max-tokens-per-micro-batch` holds.
        """
        self._config, self._batch_size = config, batch_size
        self.device, self.watch = device, Stopwatch(device)
        model, optimizer = config.model, config.optimizer
        self._student = _load(model.hf_checkpoint, torch.float32, device).train()
        if model.recompute_granularity == "full":
            self._student.gradient_checkpointing_enable()
        if config.method.mode == "opsd" and config.method.opsd_teacher == "current":
            self._teacher = self._student
        else:
            dtype = torch.bfloat16 if model.bf16 else torch.float32
            self._teacher = _load(model.teacher_hf_checkpoint or model.hf_checkpoint, dtype, device).eval()
            self._teacher.requires_grad_(False)
        self.vocab_size = min(m.config.vocab_size for m in (self._student, self._teacher))
        self._optimizer = torch.optim.AdamW(
            self._student.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_eps,
            weight_decay=optimizer.weight_decay,
        )

    def step(self, samples: Sequence[Sample]) -> tuple[float, int, int]:
        """Train on samples; return the step's loss, micro-batches, and tokens with their padding, of both streams."""
        longest = max(length for sample in samples for length in stream_lengths(sample))
        size = self._batch_size or max(1, self._config.data.max_tokens_per_micro_batch // longest)
        batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        num_tokens = sum(len(sample.response_ids) for sample in samples)
        by_sequence = self._config.objective.loss_normalization == "sequence"
        self._optimizer.zero_grad(set_to_none=True)
        total, processed = 0.0, 0
        for batch in batches:
            with self.watch("teacher forward"), torch.no_grad():
                target, padded = self._log_probs(self._teacher, batch, [s.teacher_prompt_ids for s in batch])
            processed += padded
            rows, padded = self._log_probs(self._student, batch, [s.student_prompt_ids for s in batch])
            processed += padded
            divergence = F.kl_div(rows, target, reduction="none", log_target=True).sum(-1)
            lengths = [len(s.response_ids) for s in batch]
            weights = [1 / (len(samples) * n) if by_sequence else 1 / num_tokens for n in lengths]
            counts = torch.tensor(lengths, device=self.device)
            loss = (torch.tensor(weights, device=self.device).repeat_interleave(counts) * divergence).sum()
            loss.backward()
            total += loss.item()
            del target, rows, divergence, loss
        with self.watch("optimizer"):
            if self._config.optimizer.clip_grad:
                torch.nn.utils.clip_grad_norm_(self._student.parameters(), self._config.optimizer.clip_grad)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return total, len(batches), processed

    def _log_probs(self, model: Any, batch: Sequence[Sample], prompts: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """Return fp32 log-probabilities [R, vocabulary] that predict the response tokens, and tokens with padding."""
        laid = [lay_out(prompt, s.response_ids) for prompt, s in zip(prompts, batch, strict=True)]
        width = max(len(ids) for ids, _ in laid)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in laid], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in laid], device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._config.model.bf16):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        sequence = torch.tensor([i for i, (_, places) in enumerate(laid) for _ in places], device=self.device)
        place = torch.tensor([p for _, places in laid for p in places], device=self.device)
        rows = logits[sequence, place, : self.vocab_size].float() / self._config.objective.distill_temperature
        return rows.log_softmax(-1), ids.numel()


def write_random_model(config_directory: str, target: str, seed: int) -> None:
    """Write a random model of the shape that a `config.json` describes, for both sides to load."""
    torch.manual_seed(seed)
    disable_progress_bar()
    config = AutoConfig.from_pretrained(config_directory)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target)


def _load(path: str, dtype: torch.dtype, device: torch.device) -> Any:
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device)
