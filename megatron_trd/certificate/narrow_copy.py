"""A run's model made small: same family, same cut into ranks, same vocabulary; few layers, narrow, random weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_trd.config.schema import Config, LoraConfig, ModelConfig
from megatron_trd.mcore.layouts import FAMILIES
from megatron_trd.records import Sample

HIDDEN, TEACHER_HIDDEN, HEAD_DIM = 64, 96, 32
_GAIN = 1.6
"""Matrices are N(0, gain / sqrt(inputs)): attention and output distributions have peaks, at any width."""
_LR = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowRun:
    """What is run in place of the user's run."""

    config: Config
    samples: tuple[Sample, ...]
    max_tokens: int
    """Of a micro-batch: each rank has several."""
    common_vocab: int
    notes: tuple[str, ...]
    """What is not as in the user's run, in words."""


def narrow_run(config: Config, directory: Path, *, data_parallel: int, num_layers: int | None = None) -> NarrowRun:
    """Write the narrow models into `directory` and return the run that takes one step with them.

    Args:
        config: the user's; of its models only `config.json` is read.
        num_layers: of the student; None: as few as its pipeline chunks take.

    Raises:
        ValueError: the layers do not fit the layout.
    """
    parallel, model = config.parallel, config.model
    chunks = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    layers = num_layers or chunks * (2 if chunks <= 2 else 1)
    if layers % chunks:
        raise ValueError(f"--num-layers {layers}: must be a multiple of the layout's {chunks} pipeline chunks")
    vocabularies = [_vocab_size(path) for path in (model.hf_checkpoint, model.teacher_hf_checkpoint) if path]
    notes = _Notes()
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    student = _write(
        Path(model.hf_checkpoint), directory / "student", config, layers, HIDDEN, dtype, min(vocabularies), notes
    )
    teacher = None
    if model.teacher_hf_checkpoint is not None:
        depth = parallel.pipeline_model_parallel_size * (2 if chunks == 1 else 1)
        source = Path(model.teacher_hf_checkpoint)
        teacher = _write(
            source, directory / "teacher", config, depth, TEACHER_HIDDEN, dtype, min(vocabularies), notes, seed=2
        )
    samples = make_samples(3 * data_parallel + 2, min(vocabularies))
    return NarrowRun(
        config=replace(
            config,
            model=_narrow_flags(model, student, teacher, layers // chunks, notes),
            lora=_without_dropout(config.lora, notes),
            optimizer=replace(config.optimizer, lr=_LR, min_lr=None, lr_warmup_fraction=0.0, lr_decay_style="constant"),
        ),
        samples=samples,
        max_tokens=2 * max(len(s.teacher_prompt_ids) + len(s.response_ids) for s in samples),
        common_vocab=min(vocabularies),
        notes=(*notes, f"the learning rate is {_LR:g}, so that the update can be seen in any precision"),
    )


class _Notes(list[str]):
    def tell(self, happened: bool, text: str) -> None:
        if happened and text not in self:
            self.append(text)


def _narrow_flags(
    model: ModelConfig, student: Path, teacher: Path | None, layers_per_chunk: int, notes: _Notes
) -> ModelConfig:
    grouped = model.recompute_granularity == "full" and model.recompute_num_layers > layers_per_chunk
    notes.tell(grouped, f"--recompute-num-layers is {layers_per_chunk}, all layers of a chunk")
    notes.tell(model.moe_aux_loss_coeff > 0, "--moe-aux-loss-coeff is 0: the load-balancing loss is not certified")
    notes.tell(model.fp8_format is not None, "--fp8-format is off: the layout is certified in bf16")
    notes.tell(bool(model.megatron_checkpoint or model.teacher_megatron_checkpoint), "no checkpoint is read")
    notes.tell(model.cpu_offloading_num_layers >= layers_per_chunk, "--cpu-offloading-num-layers is 1")
    return replace(
        model,
        hf_checkpoint=str(student),
        teacher_hf_checkpoint=None if teacher is None else str(teacher),
        megatron_checkpoint=None,
        teacher_megatron_checkpoint=None,
        moe_aux_loss_coeff=0.0,
        fp8_format=None,
        recompute_num_layers=min(model.recompute_num_layers, layers_per_chunk),
        cpu_offloading_num_layers=min(model.cpu_offloading_num_layers, 1),
    )


def _without_dropout(lora: LoraConfig, notes: _Notes) -> LoraConfig:
    notes.tell(lora.lora_dropout > 0, "--lora-dropout is 0: its masks have no reference")
    return replace(lora, lora_dropout=0.0)


def _vocab_size(path: str) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path).vocab_size


def _write(
    source: Path,
    target: Path,
    config: Config,
    layers: int,
    hidden: int,
    dtype: torch.dtype,
    common_vocab: int,
    notes: _Notes,
    seed: int = 1,
) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    hf = AutoConfig.from_pretrained(source)
    assert hf.model_type in FAMILIES  # read before
    for name, value in _narrow_sizes(hf, config, layers, hidden, notes).items():
        setattr(hf, name, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
            else:
                parameter.normal_(0.0, _GAIN / math.sqrt(parameter.size(-1)))
        # Tokens that only one of the models has would win any softmax they entered.
        model.get_output_embeddings().weight[common_vocab:] = 50.0
    model.to(dtype).save_pretrained(target)
    return target


def _narrow_sizes(hf: Any, config: Config, layers: int, hidden: int, notes: _Notes) -> dict[str, Any]:
    tp = config.parallel.tensor_model_parallel_size
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "head_dim": min(HEAD_DIM, getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads),
        "intermediate_size": 32 * math.lcm(tp, 2),
    }
    if getattr(hf, "layer_types", None):
        sizes["layer_types"] = (hf.layer_types * layers)[:layers]
    if getattr(hf, "num_experts", 0):
        etp = config.parallel.expert_tensor_parallel_size or tp
        wanted = max(2 * hf.num_experts_per_tok, 2 * config.parallel.expert_model_parallel_size, 4)
        ep = config.parallel.expert_model_parallel_size
        experts = min(hf.num_experts, -(-wanted // ep) * ep)
        notes.tell(experts < hf.num_experts, f"{experts} experts a layer in place of {hf.num_experts}")
        sizes |= {
            "num_experts": experts,
            "moe_intermediate_size": 32 * etp,
            "mlp_only_layers": [i for i in hf.mlp_only_layers if i < layers],
        }
    return sizes


def make_samples(num: int, vocab_size: int, seed: int = 5) -> tuple[Sample, ...]:
    """Make samples of uneven lengths, whose teacher's prompts are longer than the student's."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocab_size, (length,), generator=generator).tolist())

    def sample(i: int) -> Sample:
        return Sample(
            problem_id=str(i),
            student_prompt_ids=ids(4 + i % 5),
            teacher_prompt_ids=ids(7 + 2 * ((3 * i) % 5)),
            response_ids=ids(3 + 2 * (i % 6)),
            y_o_correct=None,
        )

    return tuple(map(sample, range(num)))
