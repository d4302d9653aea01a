"""Tiny Hugging Face models and samples with peaked distributions, for tests of real parts."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_trd.records import Sample

VOCAB = 91


def make_model(
    path: Path,
    *,
    family: str = "qwen3",
    hidden: int = 64,
    layers: int = 2,
    tied: bool = True,
    seed: int = 0,
    **settings: object,
):
    """Write a model whose weights are large enough that attention and output distributions are peaked."""
    torch.manual_seed(seed)
    extra = {"head_dim": 32} if family.startswith("qwen3") else {}
    if family == "qwen3_moe":
        extra |= {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True}
    common = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
    }
    config = AutoConfig.for_model(family, **(common | extra | settings))
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(path)
    return path


def make_samples(num: int, *, same_context: bool = False, seed: int = 5) -> list[Sample]:
    """Samples of unequal lengths; teacher and student prompts differ unless `same_context`."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())

    samples = []
    for i in range(num):
        prompt = ids(4 + i)
        samples.append(
            Sample(
                problem_id=str(i),
                student_prompt_ids=prompt,
                teacher_prompt_ids=prompt if same_context else ids(7 + 2 * (num - i)),
                response_ids=ids(3 + 2 * i),
                y_o_correct=[True, False, None][i % 3],
            )
        )
    return samples
