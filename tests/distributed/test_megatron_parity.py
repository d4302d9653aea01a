"""Megatron's hidden states and weights against transformers: logits, round trip, packing, bf16, recompute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from launch import spawn
from megatron_trd.config.schema import LoraConfig, ModelConfig, ParallelConfig
from tiny_models import VOCAB, make_model, make_samples

MODELS = [("qwen3", True), ("qwen3", False), ("qwen2", True), ("llama", False)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family, tied in MODELS:
        make_model(root / f"{family}-{tied}", family=family, tied=tied)
    return root


def load_model(path: Path, groups, sp: bool, **model_options):
    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.gpt import build_gpt
    from megatron_trd.mcore.hf_config import padded_vocab_size, read_hf_model

    lora = model_options.pop("lora", None)
    hf = read_hf_model(path, "hf-checkpoint", groups.tp_size).padded_to(padded_vocab_size(VOCAB, 4, groups.tp_size))
    options = ModelConfig(hf_checkpoint=str(path), **{"bf16": False, **model_options})
    gpt = build_gpt(hf, options, groups, sequence_parallel=sp, lora=lora)
    hf_weights.load(gpt, groups)
    return gpt.eval()


def response_logits(gpt, groups, sp: bool, samples) -> torch.Tensor:
    """Full [R, vocabulary] logits of the student's stream, in the samples' order."""
    from megatron_trd.data.packing import Multiples, pack_in_order
    from megatron_trd.mcore.schedule import rows_without_gradients

    stream = pack_in_order(samples, Multiples(stream=groups.tp_size)).student
    (rows,) = rows_without_gradients(gpt, [stream], groups)
    if sp:
        rows = gathered(rows, groups, 0)[: stream.response_positions.numel()]
    return gathered(rows @ gpt.output_weight.T, groups, 1)[:, :VOCAB]


def gathered(part: torch.Tensor, groups, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(groups.tp_size)]
    dist.all_gather(parts, part.contiguous(), group=groups.tp)
    return torch.cat(parts, dim)


def expected_logits(path: Path, samples, dtype=torch.float32) -> torch.Tensor:
    """transformers, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    parts = []
    for s in samples:
        logits = model(torch.tensor([s.student_prompt_ids + s.response_ids])).logits[0]
        parts.append(logits[len(s.student_prompt_ids) - 1 : -1])
    return torch.cat(parts)


@torch.no_grad()
def check_parity(rank: int, world: int, root: str, sp: bool) -> None:
    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.groups import initialize_groups

    groups = initialize_groups(ParallelConfig(tensor_model_parallel_size=world, sequence_parallel=sp), 1, 0)
    samples = make_samples(4)
    for family, tied in MODELS:
        path = Path(root) / f"{family}-{tied}"
        gpt = load_model(path, groups, sp)
        logits, expected = response_logits(gpt, groups, sp, samples), expected_logits(path, samples)
        assert expected.abs().max() > 2, "the test needs logits of some size"
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        original, exported = load_file(path / "model.safetensors"), dict(hf_weights.export(gpt, groups))
        assert original.keys() == exported.keys()
        for name, tensor in original.items():
            assert torch.equal(tensor, exported[name]), name
    bf16 = load_model(Path(root) / "qwen3-True", groups, sp, bf16=True)
    exact = expected_logits(Path(root) / "qwen3-True", samples)
    ours = response_logits(bf16, groups, sp, samples).float()
    theirs = expected_logits(Path(root) / "qwen3-True", samples, torch.bfloat16).float()
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-3, "bf16 loses more than transformers' bf16"


@pytest.mark.parametrize(("world", "sp"), [(1, False), (2, False), (2, True), (4, True)])
def test_logits_equal_transformers_and_weights_survive_the_round_trip(models: Path, world: int, sp: bool) -> None:
    spawn(check_parity, world, str(models), sp, timeout_s=240)


@torch.no_grad()
def check_isolation(rank: int, world: int, root: str) -> None:
    from megatron_trd.mcore.groups import initialize_groups

    groups = initialize_groups(ParallelConfig(), 1, 0)
    gpt = load_model(Path(root) / "qwen3-True", groups, False)
    samples = make_samples(4)
    together = response_logits(gpt, groups, False, samples)
    alone = torch.cat([response_logits(gpt, groups, False, [s]) for s in samples])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    swapped = response_logits(gpt, groups, False, [samples[0], *make_samples(4, seed=9)[1:]])
    first = len(samples[0].response_ids)
    torch.testing.assert_close(together[:first], swapped[:first], atol=2e-5, rtol=0)


def test_attention_never_crosses_a_sequence(models: Path) -> None:
    spawn(check_isolation, 1, str(models), timeout_s=120)


def check_recompute(rank: int, world: int, root: str, lora_rank: int) -> None:
    from megatron_trd.data.packing import Multiples, pack_in_order
    from megatron_trd.mcore.gpt import forward_stream
    from megatron_trd.mcore.groups import initialize_groups

    groups = initialize_groups(ParallelConfig(tensor_model_parallel_size=world, sequence_parallel=world > 1), 1, 0)
    lora = LoraConfig(lora_rank=lora_rank) if lora_rank else None
    stream = pack_in_order(make_samples(4), Multiples(stream=world)).student
    gradients = []
    for granularity in ("none", "full"):
        gpt = load_model(
            Path(root) / "qwen3-True", groups, world > 1, lora=lora, recompute_granularity=granularity
        ).train()
        for i, (name, parameter) in enumerate(gpt.named_parameters()):
            if "lora_b" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
            if "lora_a" in name:
                parameter.data.fill_(0.01)
        forward_stream(gpt.chunks[0], stream, groups).square().sum().backward()
        gradients.append({n: p.grad for n, p in gpt.named_parameters() if p.requires_grad and p.grad is not None})
    kept, recomputed = gradients
    assert kept.keys() == recomputed.keys() and kept
    for name, gradient in kept.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_recomputed_gradients_equal_kept_ones(models: Path, world: int, lora_rank: int) -> None:
    """With a frozen embedding, recompute silently gave zero gradients to adapters."""
    spawn(check_recompute, world, str(models), lora_rank, timeout_s=120)


def check_adapter_start(rank: int, world: int, root: str) -> None:
    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.groups import initialize_groups

    groups = initialize_groups(ParallelConfig(tensor_model_parallel_size=world), 1, 0)
    gpt = load_model(Path(root) / "qwen3-True", groups, False, lora=LoraConfig(lora_rank=64))
    for name, tensor in hf_weights.export_adapter(gpt, groups):
        if "lora_B" in name:
            assert not tensor.any()
            continue
        bound = tensor.size(1) ** -0.5  # PEFT's: Kaiming uniform with a = sqrt(5), over the whole input width
        assert 0.95 * bound < tensor.abs().max() <= bound, name
        if "o_proj" in name or "down_proj" in name:  # split by input: ranks must not draw the same numbers
            first, second = tensor.chunk(2, 1)
            assert not torch.equal(first, second)


def test_adapters_start_as_in_peft_at_any_tensor_parallelism(models: Path) -> None:
    spawn(check_adapter_start, 2, str(models), timeout_s=120)
