"""The certificate of a layout: good layouts get it, broken ones do not and the report names what is broken."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from launch import run, spawn

NOWHERE = ["--student-urls", "http://nowhere", "--teacher-urls", "http://nowhere"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def write_config(path: Path, family: str, **settings: Any) -> str:
    """Write a config.json, and nothing else, of a model with the shape of real ones."""
    sizes = {
        "vocab_size": 1003,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    if family == "qwen3_moe":
        sizes |= {"num_experts": 128, "num_experts_per_tok": 4, "moe_intermediate_size": 768, "norm_topk_prob": True}
    AutoConfig.for_model(family, **(sizes | settings)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("configs")
    return {
        "qwen3": write_config(root / "qwen3", "qwen3"),
        "qwen2": write_config(root / "qwen2", "qwen2"),
        "teacher": write_config(root / "teacher", "qwen3", vocab_size=1024, tie_word_embeddings=False),
        "moe": write_config(root / "moe", "qwen3_moe"),
    }


# Defects: each breaks a part of the machine as a real bug would.
Defect = Callable[[pytest.MonkeyPatch], None]


def finalizing() -> Any:
    """Megatron's module of that name, which a function hides."""
    return importlib.import_module("megatron.core.distributed.finalize_model_grads")


def forget_qk_norm(patch: pytest.MonkeyPatch) -> None:
    """The gradients of q_norm and k_norm stay what each sequence-parallel rank saw of them."""
    complete = finalizing()._allreduce_non_tensor_model_parallel_grads

    def forgetful(model: Any, *args: Any) -> None:
        named = [(n, p) for chunk in model for n, p in chunk.named_parameters()]
        spared = [p.main_grad for n, p in named if n.endswith(("q_layernorm.weight", "k_layernorm.weight"))]
        kept = [gradient.clone() for gradient in spared]
        complete(model, *args)
        for gradient, own in zip(spared, kept, strict=True):
            gradient.copy_(own)

    patch.setattr(finalizing(), "_allreduce_non_tensor_model_parallel_grads", forgetful)


def forget_tied_copy(patch: pytest.MonkeyPatch) -> None:
    """The gradients of embedding and tied head are not summed over the first and the last stage."""
    patch.setattr(finalizing(), "_allreduce_word_embedding_grads", lambda *args, **kwargs: None)


def weigh_differently(patch: pytest.MonkeyPatch) -> None:
    """One data-parallel rank has a normaliser of its own."""
    from megatron_trd.certificate import training_step

    right = training_step.micro_batches

    def wrong(run: Any, groups: Any) -> Any:
        factor = 2.0 if groups.dp_rank == 1 else 1.0
        return [replace(batch, token_weight=factor * batch.token_weight) for batch in right(run, groups)]

    patch.setattr(training_step, "micro_batches", wrong)


def sum_twice(patch: pytest.MonkeyPatch) -> None:
    """Data-parallel ranks sum a sum."""
    from megatron_trd.mcore import student

    complete = student.finalize_model_grads

    def twice(model: Any, *args: Any, **kwargs: Any) -> None:
        complete(model, *args, **kwargs)
        for chunk in model:
            for buffer in chunk.buffers:
                buffer.grad_data *= 2

    patch.setattr(student, "finalize_model_grads", twice)


def keep_updates(patch: pytest.MonkeyPatch) -> None:
    """No rank hands its part of the updated weights to the others."""
    from megatron.core.distributed import DistributedDataParallel

    patch.setattr(DistributedDataParallel, "start_param_sync", lambda *args, **kwargs: None)


def take_others_tokens(patch: pytest.MonkeyPatch) -> None:
    """All context-parallel ranks read the first one's tokens."""
    from megatron_trd.mcore import gpt

    right = gpt.tokens_of_rank
    patch.setattr(gpt, "tokens_of_rank", lambda bounds, size, rank: right(bounds, size, 0))


@dataclass(frozen=True)
class Case:
    """A layout, and how it is broken."""

    model: str
    flags: tuple[str, ...]
    defect: Defect | None = None
    names: str = ""
    """Pattern of the parameters whose gradients are wrong; all others' are right."""
    says: str = ""
    """Part of the report of a broken layout."""


VPP2 = (*PP2, "--num-virtual-stages-per-pipeline-rank", "2")
FP32 = "--no-bf16"
QK_NORM = r"model\.layers\.\d\.self_attn\.[qk]_norm\.weight"
TWO_RANKS = (
    Case("qwen2", (*VPP2, FP32)),
    Case("qwen3", ("--context-parallel-size", "2", "--lora-rank", "4", "--recompute-granularity", "full", FP32)),
    Case("moe", ("--expert-model-parallel-size", "2", FP32)),
    Case("qwen3", (*TP2, FP32), forget_qk_norm, QK_NORM, "q_norm and k_norm are not summed"),
    Case("qwen3", TP2, forget_qk_norm, QK_NORM, "q_norm and k_norm are not summed"),
    Case("qwen3", (*PP2, FP32), forget_tied_copy, r"model\.embed_tokens\.weight", "first and last stage"),
    Case("qwen3", ("--overlap-grad-reduce", FP32), weigh_differently, ".*", "NOT CERTIFIED: loss, gradient norm"),
    Case("qwen3", (FP32,), sum_twice, ".*", "every gradient is 2 times"),
    Case("qwen3", ("--use-distributed-optimizer", FP32), keep_updates, "", "the update is not"),
    Case("qwen3", ("--context-parallel-size", "2", FP32), take_others_tokens, ".*", "the forward pass"),
)
FOUR_RANKS = (
    Case("qwen3", (*TP2, *OVERLAP, FP32)),
    Case("qwen3", (*TP2, *OVERLAP, "--mode", "opd", "--divergence", "jsd", "--teacher-top-k", "20")),
)


def certify_all(rank: int, world: int, configs: dict[str, str], cases: tuple[Case, ...]) -> list[Any]:
    from megatron.core import parallel_state

    from megatron_trd.certificate import report
    from megatron_trd.certificate.certify import certify
    from megatron_trd.config.cli import parse_config

    torch.set_num_threads(1)
    found = []
    for case in cases:
        parallel_state.destroy_model_parallel()  # of the case before
        teacher = ["--teacher-hf-checkpoint", configs["teacher"]] if "opd" in case.flags else []
        config = parse_config([*NOWHERE, "--hf-checkpoint", configs[case.model], *case.flags, *teacher])
        with pytest.MonkeyPatch.context() as patch:
            if case.defect is not None:
                case.defect(patch)
            run, certificate = certify(config, 0)
        found.append((certificate, report.text(certificate, report.layout(config, world), run.notes)))
    return found if rank == 0 else []


@pytest.mark.parametrize(("world", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two ranks", "four ranks"])
def test_good_layouts_are_certified_and_broken_ones_are_named(configs, world: int, cases: tuple[Case, ...]) -> None:
    found = spawn(certify_all, world, configs, cases, timeout_s=300)[0]
    for case, (certificate, text) in zip(cases, found, strict=True):
        where = f"{case}\n{text}"
        if case.defect is None:
            assert certificate.certified and "\nCERTIFIED" in text and "hint" not in text, where
            assert len(certificate.gradients) == len(certificate.updates) > 10, where
            continue
        assert not certificate.certified and "NOT CERTIFIED" in text and case.says in text, where
        for finding in certificate.gradients:
            assert finding.ok != bool(re.fullmatch(case.names, finding.name)), (finding, where)


def test_the_tool_takes_a_whole_command(configs: dict[str, str], tmp_path: Path) -> None:
    """A run on 8 GPUs, cut to two replicas, in bf16 with an interleaved pipeline."""
    torchrun = ["torchrun", "--nproc-per-node=8", "-m", "megatron_trd.train", "--hf-checkpoint", configs["qwen3"]]
    command = [sys.executable, "tools/certify_layout.py", "--json", str(tmp_path / "certificate.json"), "--"]
    result = run([*command, *torchrun, "--lora-dropout", "0.1", "--lora-rank", "4"], timeout_s=200)
    assert result.returncode == 0, result.stdout + result.stderr
    numbers = json.loads((tmp_path / "certificate.json").read_text())
    assert numbers["certified"] and len(numbers["gradients"]) == 28
    for told in ("data-parallel size 2 in place of 8", "2 ranks on the CPU", "--lora-dropout is 0", "\nCERTIFIED"):
        assert told in result.stdout, result.stdout


@pytest.mark.parametrize(
    ("own", "flags", "says"),
    [
        (["--num-gpus", "3"], ["--tensor-model-parallel-size", "2"], "--num-gpus 3: must be a multiple of the 2 ranks"),
        ([], ["--tensor-model-parallel-size", "4096"], "GB of memory"),
        ([], ["--hf-checkpoint", "nowhere"], "no config.json there"),
        (["--data-parallel-size", "1"], ["--expert-model-parallel-size", "2"], "the 2 that hold all experts"),
    ],
)
def test_the_tool_refuses_before_it_starts_ranks(configs, own: list[str], flags: list[str], says: str) -> None:
    from tools import certify_layout

    with pytest.raises(ValueError, match=says):
        certify_layout.main([*own, "--", "--hf-checkpoint", configs["qwen3"], *flags])
