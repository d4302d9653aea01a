"""Recomputed activations: the gradients of the fp64 dense reference, and forward passes that really run twice."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from launch import spawn
from megatron_trd.certificate.dense_reference import dense_reference
from megatron_trd.certificate.training_step import gradients, loss_of_all_ranks
from megatron_trd.config.schema import ObjectiveConfig, ParallelConfig
from tests.distributed.parity import LORA, build, compare, pack_step
from tiny_models import make_model, make_samples

LAYERS = 4
OBJECTIVE = ObjectiveConfig()
# Flags, and how often each layer's attention, MLP and whole layer run in a forward and backward pass.
DENSE = [
    ({"recompute_granularity": "selective"}, [2] * LAYERS, [1] * LAYERS, [1] * LAYERS),
    ({"recompute_granularity": "selective", "recompute_modules": ("mlp",)}, [1] * LAYERS, [2] * LAYERS, [1] * LAYERS),
    (
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")},
        [2] * LAYERS,
        [2] * LAYERS,
        [1] * LAYERS,
    ),
    ({"recompute_granularity": "full", "recompute_num_layers": 2}, [2] * LAYERS, [2] * LAYERS, [2] * LAYERS),
    (
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        [2, 1, 1, 1],
        [2, 1, 1, 1],
        [2, 1, 1, 1],
    ),
]
SPARSE = [
    ({"recompute_granularity": "selective", "recompute_modules": ("moe",)}, [1] * LAYERS, [2] * LAYERS, [1] * LAYERS)
]


def check(rank: int, world: int, root: str, name: str, cases: list) -> None:
    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.groups import initialize_groups

    path, samples = Path(root) / name, make_samples(4)
    parallel = ParallelConfig(tensor_model_parallel_size=world, sequence_parallel=world > 1)
    groups = initialize_groups(parallel, 1, 0)
    batch = pack_step(samples, groups, parallel, max_tokens=10_000, normalization=OBJECTIVE.loss_normalization)
    expected = {}
    for (flags, *times), lora in itertools.product(cases, (False, True)):
        student, teacher = build(path, path, groups, parallel, mode="opsd", lora=lora, **flags)
        student.config = replace(student.config, objective=OBJECTIVE)
        if lora not in expected and rank == 0:
            adapter = {k: v.clone() for k, v in hf_weights.export_adapter(student.gpt, groups)} if lora else None
            expected[lora] = dense_reference(OBJECTIVE, samples, path, path, adapter, LORA)
        elif lora:
            list(hf_weights.export_adapter(student.gpt, groups))
        runs = count_forwards(student.gpt)
        loss = loss_of_all_ranks(student.accumulate_gradients(batch[0], teacher), groups)
        if lora:  # the teacher was the student without its adapters
            runs = {place: number - 1 for place, number in runs.items()}
        for part, wanted in zip(("attention", "mlp", "layer"), times, strict=True):
            got = [runs[part, index] for index in range(LAYERS)]
            assert got == wanted, (flags, lora, part, got)
        grads = gradients(student, groups)
        if rank == 0:
            compare(f"{flags} lora={lora}", loss, grads, expected[lora])


def count_forwards(model) -> Counter:
    """Count, from now on, how often the parts of each layer run."""
    runs: Counter = Counter()

    def count(place):
        def hook(*_: object) -> None:
            runs[place] += 1

        return hook

    for index, layer in enumerate(model.chunks[0].decoder.layers):
        for part, module in (
            ("attention", layer.self_attention.core_attention),
            ("mlp", getattr(layer.mlp, "experts", layer.mlp)),
            ("layer", layer),
        ):
            module.register_forward_pre_hook(count((part, index)))
    return runs


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_model(root / "dense", layers=LAYERS, seed=1)
    make_model(root / "sparse", family="qwen3_moe", layers=LAYERS, seed=2)
    return root


@pytest.mark.parametrize(("name", "cases", "world"), [("dense", DENSE, 2), ("sparse", SPARSE, 1)])
def test_recomputed_gradients_equal_the_dense_reference(models: Path, name: str, cases: list, world: int) -> None:
    spawn(check, world, str(models), name, cases, timeout_s=200)
