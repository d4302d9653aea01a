"""Hugging Face -> Megatron's distributed checkpoint -> Hugging Face: every byte, at any grid, a parameter at a time."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import ROOT, run, spawn, torchrun
from megatron_trd.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from tests.distributed.parity import pack_step
from tiny_models import VOCAB, make_model, make_samples

TOOL = ROOT / "tools" / "convert_checkpoint.py"
MODELS = {  # layers: for two stages of two chunks
    "qwen3-tied": {"family": "qwen3", "tied": True, "layers": 4},
    "qwen3": {"family": "qwen3", "tied": False, "layers": 4},
    "qwen2": {"family": "qwen2", "tied": True, "layers": 4},
    "llama": {"family": "llama", "tied": False, "layers": 4},
    "moe": {"family": "qwen3_moe", "tied": False, "layers": 4},
    "mixed": {"family": "qwen3_moe", "tied": False, "layers": 4, "mlp_only_layers": [1]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Models, and what 1 and 3 ranks made of them: `m-NAME-N`, and back: `h-NAME-N`."""
    root = tmp_path_factory.mktemp("conversion")
    for name, options in MODELS.items():
        make_model(root / name, **options)
    to_bf16(root / "qwen3")
    for ranks in (1, 3):
        spawn(convert_all, ranks, root, timeout_s=200)
    return root


def to_bf16(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


def convert_all(rank: int, world: int, root: Path) -> None:
    groups = data_parallel()
    for name in MODELS:
        megatron, back = root / f"m-{name}-{world}", root / f"h-{name}-{world}"
        to_megatron(root / name, megatron, groups).write()
        to_hf(megatron, root / name, back, groups, shard_bytes=40_000 * world).write()


def data_parallel():
    from megatron_trd.mcore.groups import initialize_groups

    return initialize_groups(ParallelConfig(), 1, 0)


def to_megatron(source: Path, output: Path, groups, **options):
    from megatron_trd.mcore.conversion.to_megatron import to_megatron

    options = {"divisible_by": 8, "dtype": None, "common": lambda hf: {"about": hf.hidden_size}, **options}
    return to_megatron(source, output, groups, **options)


def to_hf(checkpoint: Path, template: Path, output: Path, groups, **options):
    from megatron_trd.mcore.conversion.to_hf import to_hf

    return to_hf(checkpoint, template, output, groups, **{"shard_bytes": 1 << 30, "dtype": None, **options})


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory; its index must name them, each in its file."""
    files = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    if files.keys() != {"model.safetensors"}:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
        assert index["metadata"]["total_size"] == sum(t.nbytes for part in files.values() for t in part.values())
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_byte_equal(root: Path, name: str, ranks: int) -> None:
    back = root / f"h-{name}-{ranks}"
    assert_same_bytes(tensors_of(back), tensors_of(root / name))
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 3 and all((file.stat().st_mode & 0o777) == 0o644 & ~_umask() for file in files)
    before, after = (json.loads((path / "config.json").read_text()) for path in (root / name, back))
    assert after == before
    assert (back / "generation_config.json").read_bytes() == (root / name / "generation_config.json").read_bytes()


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "num_virtual_stages_per_pipeline_rank": 2}
EP2 = {"expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("world", "grids"),
    [
        (2, [(TP2, "qwen3"), (VPP2, "qwen3-tied"), (EP2, "moe")]),
        (4, [({**TP2, **PP2}, "qwen2"), ({**TP2, **EP2, **VPP2, "expert_tensor_parallel_size": 1}, "mixed")]),
    ],
)
def test_any_grid_loads_what_hugging_face_says(root: Path, world: int, grids) -> None:
    spawn(check_grids, world, root, grids, timeout_s=200)


@torch.no_grad()
def check_grids(rank: int, world: int, root: Path, grids) -> None:
    from megatron.core import parallel_state

    from megatron_trd.mcore import hf_weights
    from megatron_trd.mcore.initial_weights import load_initial_weights

    for grid, name in grids:
        gpt, groups = build_model(root / name, grid)
        load_initial_weights(gpt, groups, str(root / f"m-{name}-3"), "megatron-checkpoint")
        loaded = {n: p.clone() for n, p in gpt.named_parameters()}
        for parameter in gpt.parameters():
            parameter.fill_(torch.nan)
        hf_weights.load(gpt, groups)
        for parameter_name, parameter in gpt.named_parameters():
            assert torch.equal(loaded[parameter_name], parameter), (name, grid, parameter_name)
        parallel_state.destroy_model_parallel()


def build_model(path: Path, grid):
    from megatron_trd.mcore.gpt import build_gpt
    from megatron_trd.mcore.groups import initialize_groups
    from megatron_trd.mcore.hf_config import padded_vocab_size, read_hf_model

    groups = initialize_groups(ParallelConfig(**grid), 1, 0)
    hf = read_hf_model(path, "hf-checkpoint", groups.tp_size)
    hf = hf.padded_to(padded_vocab_size(VOCAB, 7, groups.tp_size))  # not the padding of the checkpoint
    gpt = build_gpt(
        hf,
        ModelConfig(hf_checkpoint=str(path), bf16=False),
        groups,
        sequence_parallel=groups.tp_size > 1,
        virtual_stages=grid.get("num_virtual_stages_per_pipeline_rank", 1),
    )
    return gpt, groups


LORA = LoraConfig(lora_rank=4, lora_alpha=8.0, lora_dropout=0.1)


@pytest.mark.parametrize(
    ("name", "lora", "start", "grid"),
    [
        ("qwen3", None, "hf", {**TP2, "use_distributed_optimizer": True}),
        ("qwen3-tied", LORA, "hf", {**TP2, **VPP2}),
        ("moe", LORA, "megatron", EP2),
    ],
)
def test_checkpoint_of_a_run_becomes_what_the_run_exports(root: Path, tmp_path: Path, name, lora, start, grid) -> None:
    world = max(2, ParallelConfig(**grid).model_parallel_size)
    spawn(train, world, root, tmp_path, name, lora, start, grid, timeout_s=200)
    spawn(convert_run, 2, root / name, tmp_path, lora is not None, timeout_s=200)
    assert_same_bytes(tensors_of(tmp_path / "converted"), tensors_of(tmp_path / "exported"))
    assert tensors_of(tmp_path / "converted").values() and not same(tmp_path / "converted", root / name)
    if lora is not None:
        exported, converted = (
            load_file(tmp_path / f"{d}-adapter" / "adapter_model.safetensors") for d in ("exported", "converted")
        )
        assert_same_bytes(converted, exported)
        configs = [
            json.loads((tmp_path / f"{d}-adapter" / "adapter_config.json").read_text())
            for d in ("exported", "converted")
        ]
        assert configs[0] == configs[1]


def same(one: Path, other: Path) -> bool:
    found, expected = tensors_of(one), tensors_of(other)
    return all(torch.equal(found[name].float(), expected[name].float()) for name in expected)


def train(rank: int, world: int, root: Path, directory: Path, name: str, lora, start: str, grid) -> None:
    """One step in bf16; then the run's own exports and its checkpoint."""
    from megatron_trd import job
    from megatron_trd.mcore.checkpoint import Checkpoints
    from megatron_trd.mcore.groups import initialize_groups
    from megatron_trd.mcore.models import read_models
    from megatron_trd.mcore.student import Student
    from megatron_trd.mcore.teacher import build_teacher

    config = Config(
        model=ModelConfig(
            hf_checkpoint=str(root / name),
            megatron_checkpoint=str(root / f"m-{name}-1") if start == "megatron" else None,
        ),
        parallel=ParallelConfig(**grid),
        lora=lora or LoraConfig(),
        data=DataConfig(trajectories="unused"),
        optimizer=OptimizerConfig(lr=1e-2, lr_warmup_fraction=0.0),
        checkpoint=CheckpointConfig(
            run_dir=str(directory / "run"),
            save_hf=str(directory / "exported"),
            save_adapter=str(directory / "exported-adapter") if lora else None,
        ),
    )
    groups = initialize_groups(config.parallel, 7, 0)
    hf, teacher_hf = read_models(config)
    student = Student(config, groups, hf, total_steps=6, vocab_size=VOCAB, epistemic_ids=[1])
    teacher = build_teacher(config, groups, student.gpt, teacher_hf)
    batch = pack_step(make_samples(6), groups, config.parallel, max_tokens=100)
    student.train_step(batch[groups.dp_rank], teacher)
    (directory / "run").mkdir(exist_ok=True)
    Checkpoints(config.checkpoint, groups).save(student, {"iteration": 10})
    job.export(config, student, rank)


def convert_run(rank: int, world: int, template: Path, directory: Path, adapters: bool) -> None:
    from megatron_trd.mcore.conversion.to_hf import to_adapter

    groups = data_parallel()
    checkpoints = directory / "run" / "checkpoints"
    to_hf(checkpoints, template, directory / "converted", groups, shard_bytes=60_000).write()
    if adapters:
        iteration = checkpoints / "iter_0000010"
        to_adapter(iteration, template, directory / "converted-adapter", groups).write()


def test_errors_name_file_tensor_and_shape(root: Path, tmp_path: Path) -> None:
    spawn(check_errors, 1, root, tmp_path, timeout_s=200)


def check_errors(rank: int, world: int, root: Path, directory: Path) -> None:
    from megatron.core import parallel_state

    from megatron_trd.mcore.initial_weights import load_initial_weights

    groups = data_parallel()
    down = "model.layers.1.mlp.down_proj.weight"

    def broken(change, name: str = "llama", **config) -> Path:
        path = directory / "broken"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(root / name, path)
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file({k: v.clone() for k, v in weights.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | config))
        return path

    def refused(pattern: str, path: Path, **options) -> None:
        with pytest.raises(ValueError, match=pattern):
            to_megatron(path, directory / "new", groups, **options)

    refused(f"broken: tensor {down} is missing", broken(lambda w: w.pop(down)))
    refused(
        f"{down} is \\(64, 95\\); by its config.json it is \\(64, 96\\)",
        broken(lambda w: w.update({down: w[down][:, 1:]})),
    )
    refused(r"has no extra.weight \(1 tensors", broken(lambda w: w.update({"extra.weight": torch.zeros(2)})))
    mixed = broken(lambda w: w.update({down: w[down].bfloat16()}))
    refused(f"{down} is torch.bfloat16.* torch.float32; give one for all with --dtype", mixed)
    to_megatron(mixed, directory / "new", groups, dtype=torch.float32)
    head = {"lm_head.weight": torch.ones(VOCAB, 64)}
    refused("lm_head.weight differs from the embedding", broken(lambda w: w.update(head), "qwen3-tied"))
    to_megatron(
        broken(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}), "qwen3-tied"),
        directory / "new",
        groups,
    )
    refused("model type 'gpt2' is not supported", broken(lambda w: None, model_type="gpt2"))
    (directory / "new").mkdir()
    (directory / "new" / "file").touch()
    refused("--output .*: is already there", root / "llama")
    shutil.rmtree(directory / "new")
    path = broken(lambda w: None)
    conversion = to_megatron(path, directory / "new", groups)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused("model.safetensors: cannot be read .*; copy the file anew", path)
    with pytest.raises(ValueError, match="rank 0 could not write its part: .*model.safetensors: cannot be read"):
        conversion.write()  # damaged since it was planned
    assert not (directory / "new").exists() and not list((directory / ".tmp-new").rglob("latest*"))

    without_biases = broken(lambda w: None, "qwen2", model_type="llama")
    with pytest.raises(ValueError, match=r"m-qwen2-1/release: .*/config.json has no .*linear_qkv.bias \(1 tensors"):
        to_hf(root / "m-qwen2-1", without_biases, directory / "new", groups)
    with pytest.raises(ValueError, match=r"m-llama-1/release: tensor .*q_layernorm.weight is missing"):
        to_hf(root / "m-llama-1", root / "qwen3", directory / "new", groups)
    wide = broken(lambda w: None, intermediate_size=192)
    with pytest.raises(ValueError, match=r"linear_fc1.weight is \(4, 192, 64\); by .* it is \(4, 384, 64\)"):
        to_hf(root / "m-llama-1", wide, directory / "new", groups)
    with pytest.raises(ValueError, match="--megatron-checkpoint .*: no latest_checkpointed_iteration.txt there"):
        to_hf(root / "llama", root / "llama", directory / "new", groups)
    shutil.copytree(root / "m-llama-1", directory / "cut")
    (file,) = (directory / "cut" / "release").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100_000])
    with pytest.raises(ValueError, match=r"cut/release: .* cannot be read"):
        to_hf(directory / "cut", root / "llama", directory / "new", groups).write()
    assert not (directory / "new").exists() and not (directory / ".tmp-new" / "config.json").exists()

    parallel_state.destroy_model_parallel()
    gpt, groups = build_model(root / "qwen2", {})
    with pytest.raises(ValueError, match=r"m-llama-1/release: tensor .*linear_qkv.bias is missing"):
        load_initial_weights(gpt, groups, str(root / "m-llama-1"), "megatron-checkpoint")


WATCHED = """
import resource, runpy, sys
tool, small, big, scratch = sys.argv[1:]
main = runpy.run_path(tool)["main"]

def convert(model, name):
    main(["to-megatron", "--hf-checkpoint", model, "--output", f"{scratch}/m-{name}"])
    main(["to-hf", "--megatron-checkpoint", f"{scratch}/m-{name}", "--hf-template", model, "--output",
          f"{scratch}/h-{name}", "--shard-size-gb", "0.03"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = convert(small, "small")
print("GROWTH", convert(big, "big") - before)
"""


def test_memory_is_a_layer_and_a_file_not_the_model(tmp_path: Path) -> None:
    layers, file_bytes = 24, 0.03 * 2**30
    small = make_model(tmp_path / "small", family="llama")
    layer_bytes = write_big_model(tmp_path / "big", layers)
    assert layer_bytes == pytest.approx(20e6, rel=0.02)
    done = run([sys.executable, "-c", WATCHED, str(TOOL), str(small), str(tmp_path / "big"), str(tmp_path)])
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout.rpartition("GROWTH")[2])
    assert_same_bytes(tensors_of(tmp_path / "h-big"), tensors_of(tmp_path / "big"))
    assert len(list((tmp_path / "h-big").glob("*.safetensors"))) > layers / 2
    assert growth < 3 * layer_bytes + file_bytes < 0.2 * layers * layer_bytes, (growth, layer_bytes)
    assert "GiB/s" in done.stdout


def write_big_model(path: Path, layers: int) -> int:
    """Write a model in a file per layer; return the bytes of a layer."""
    hidden, ffn = 512, 2560
    make_model(path, family="llama", hidden=64, layers=1, tied=False)
    config = json.loads((path / "config.json").read_text())
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 8}
    (path / "config.json").write_text(json.dumps(config | sizes | {"num_key_value_heads": 8, "head_dim": 64}))
    (path / "model.safetensors").unlink()
    shapes = {f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
    shapes |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    layer = {name: torch.randn(shape) for name, shape in shapes.items()}
    vocabulary = torch.randn(2, VOCAB, hidden)
    files = {
        f"model-{i}.safetensors": {f"model.layers.{i}.{k}.weight": v for k, v in layer.items()} for i in range(layers)
    }
    files["model-rest.safetensors"] = {
        "model.embed_tokens.weight": vocabulary[0].clone(),
        "lm_head.weight": vocabulary[1].clone(),
        "model.norm.weight": torch.ones(hidden),
    }
    for file, tensors in files.items():
        save_file(tensors, path / file)
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(tensor.nbytes for tensor in layer.values())


def test_torchrun_and_dry_run(root: Path, tmp_path: Path) -> None:
    flags = ["to-megatron", "--hf-checkpoint", root / "llama", "--output", tmp_path / "out"]
    done = torchrun(2, TOOL, *flags, "--dtype", "bf16", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    assert "out/release/__0_0_0.distcp" in done.stdout and "out/release/__1_0_0.distcp" in done.stdout
