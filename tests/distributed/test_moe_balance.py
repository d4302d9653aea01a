"""The load-balancing loss and what is reported of the balance, against fp64 routers of transformers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import spawn
from megatron_trd.certificate.dense_reference import dense_reference, stacked_experts
from megatron_trd.certificate.training_step import gradients, loss_of_all_ranks
from megatron_trd.config.schema import ObjectiveConfig, ParallelConfig
from tests.distributed.parity import build, compare, pack_step
from tiny_models import make_model, make_samples

COEFF, TOP_K = 0.7, 3


def dense_balance(path: Path, batch) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of the loss of a step, [rank][micro-batch], and its imbalance, from the definitions."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    logits: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
    leaves = {k: v.double().requires_grad_() for k, v in load_file(path / "model.safetensors").items()}
    weights = stacked_experts(leaves) | {"lm_head.weight": leaves["model.embed_tokens.weight"]}
    streams = [micro_batch.student for rank in batch for micro_batch in rank]
    step_tokens = sum(int((~stream.is_padding).sum()) for stream in streams)
    loss, chosen = torch.zeros((), dtype=torch.float64), 0
    for stream in streams:
        bounds = stream.cu_seqlens.tolist()
        sequences = [stream.input_ids[a:b][~stream.is_padding[a:b]] for a, b in itertools.pairwise(bounds)]
        routed: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
        for ids in filter(len, sequences):
            logits.clear()
            torch.func.functional_call(model, weights, (ids[None],))
            for layer, of_layer in zip(routed, logits, strict=True):
                layer.append(of_layer)
        if not routed[0]:
            continue
        scores = torch.stack([torch.cat(layer).softmax(-1) for layer in routed])  # [layers, tokens, experts]
        counts = torch.zeros_like(scores).scatter(-1, scores.topk(TOP_K).indices, 1).sum(1)
        num_tokens, num_experts = scores.shape[1:]
        balance = num_experts * (counts / (TOP_K * num_tokens) * scores.mean(1)).sum()
        loss = loss + COEFF * balance * num_tokens / step_tokens
        chosen = chosen + counts
    loss.backward()
    used = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return used, (chosen.amax(1) / chosen.mean(1)).mean().item()


def check_balance(rank: int, world: int, root: str, grids: list[dict]) -> None:
    from megatron.core import parallel_state

    from megatron_trd.mcore.groups import initialize_groups

    torch.set_num_threads(1)
    student_path, samples = Path(root) / "moe", make_samples(5)
    for grid in grids:
        parallel = ParallelConfig(sequence_parallel=True, expert_tensor_parallel_size=1, **grid)
        parallel_state.destroy_model_parallel()
        groups = initialize_groups(parallel, 1, 0)
        student, teacher = build(
            student_path, student_path, groups, parallel, mode="opsd", lora=False, moe_aux_loss_coeff=COEFF
        )
        batch = pack_step(samples, groups, parallel, max_tokens=40)
        assert any(m.student.is_padding.any() for m in batch[groups.dp_rank]), "the test needs padding"
        sums = student.accumulate_gradients(batch[groups.dp_rank], teacher)
        loss, grads = loss_of_all_ranks(sums, groups), gradients(student, groups)
        if rank == 0:
            balance, imbalance = dense_balance(student_path, batch)
            if sums:
                assert sums[0]["expert_imbalance"][0].item() == pytest.approx(imbalance, rel=1e-6)
            distilled, expected = dense_reference(ObjectiveConfig(), samples, student_path, student_path)
            both = {name: g + balance.get(name, 0) for name, g in expected.items()}
            gate = "model.layers.1.mlp.gate.weight"
            assert balance[gate].norm() > 0.05 * expected[gate].norm(), "the test needs a loss that matters"
            compare(str(grid), loss, grads, (distilled, both))


def test_each_token_of_a_step_counts_once(tmp_path: Path) -> None:
    """Over tensor-, data- and expert-parallel ranks, pipeline stages and micro-batches; padding does not count."""
    make_model(tmp_path / "moe", family="qwen3_moe", num_experts_per_tok=TOP_K)
    tp2, pp2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
    spawn(check_balance, 4, str(tmp_path), [{**tp2, "expert_model_parallel_size": 2}, {**tp2, **pp2}], timeout_s=200)
