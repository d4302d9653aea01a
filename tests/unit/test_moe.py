"""Models with experts: what of their config and of a grid is refused, where each expert lives, and how it is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_trd.config.schema import ParallelConfig
from megatron_trd.mcore.experts import name_on_rank, require_expert_grid
from megatron_trd.mcore.groups import _require_whole_models
from megatron_trd.mcore.hf_config import HFModel, read_hf_model
from megatron_trd.mcore.layouts import rows
from megatron_trd.rollout.embedded.weights import ServedWeights
from megatron_trd.weight_sync.base import ServerError
from megatron_trd.weight_sync.names import keeps_own_head
from tiny_models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    return make_model(path, family="qwen3_moe", layers=4, mlp_only_layers=[1], decoder_sparse_step=2, num_experts=4)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("dense"))


def read(path: Path, tp_size: int = 1) -> HFModel:
    return read_hf_model(path, "hf-checkpoint", tp_size)


def test_the_shape_is_that_of_the_config(model: Path, dense: Path, tmp_path: Path) -> None:
    moe = read(model).moe
    assert moe is not None and read(dense).moe is None
    assert (moe.num_experts, moe.top_k, moe.expert_ffn_hidden_size, moe.norm_topk_prob) == (4, 3, 48, True)
    assert moe.sparse_layers == (False, False, False, True)
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [0, 1, 2, 3]}))
    assert read(tmp_path).moe is None, "a model without sparse layers is dense"
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    with pytest.raises(ValueError, match="--hf-checkpoint .* num_experts_per_tok 1 with norm_topk_prob"):
        read(tmp_path)


def test_rows_name_every_tensor_of_the_checkpoint_once(model: Path) -> None:
    hf = read(model)
    named = [name for row in rows(hf.family, hf.geometry, tied=hf.tied, moe=hf.moe) for name in row.hf]
    assert sorted(named) == sorted(load_file(model / "model.safetensors"))
    adapted = {
        row.megatron.partition("layers.3.")[2]
        for row in rows(hf.family, hf.geometry, tied=True, moe=hf.moe)
        if row.adapted
    }
    assert adapted - {""} == {"self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"}


def test_names_of_experts_on_a_rank() -> None:
    whole = "decoder.layers.3.mlp.experts.local_experts.13.linear_fc1.weight"
    assert name_on_rank(whole, 5, grouped=False) == whole.replace("13", "5")
    assert name_on_rank(whole, 5, grouped=True) == "decoder.layers.3.mlp.experts.linear_fc1.weight5"


@pytest.mark.parametrize(
    ("grid", "sparse", "message"),
    [
        ({"expert_model_parallel_size": 3}, True, "--expert-model-parallel-size 3: must divide the 4 experts of .*moe"),
        ({"expert_tensor_parallel_size": 5}, True, "--expert-tensor-parallel-size 5: must divide the width 48"),
        (
            {"tensor_model_parallel_size": 2},
            True,
            "--hf-checkpoint .*: experts under --tensor-model-parallel-size 2 .* add --sequence-parallel",
        ),
        ({"expert_model_parallel_size": 2}, False, "--expert-model-parallel-size 2: no model has experts .*; use 1"),
        ({"expert_tensor_parallel_size": 2}, False, "--expert-tensor-parallel-size 2: no model has experts"),
    ],
)
def test_grids_that_do_not_fit_are_refused(model: Path, dense: Path, grid, sparse, message) -> None:
    with pytest.raises(ValueError, match=message):
        require_expert_grid(ParallelConfig(**grid), {"hf-checkpoint": read(model if sparse else dense)})


def test_a_world_that_the_experts_do_not_fill_is_refused() -> None:
    grid = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=3)
    _require_whole_models(grid, 6)
    with pytest.raises(
        ValueError,
        match="--expert-model-parallel-size 3 x --expert-tensor-parallel-size 2 x --pipeline-model-parallel-size 1: 6 "
        "must divide the number of processes, 4; use fewer, or --nproc-per-node 6",
    ):
        _require_whole_models(grid, 4)


def test_a_dense_student_has_no_balance(model: Path, dense: Path) -> None:
    both = {"hf-checkpoint": read(dense), "teacher-hf-checkpoint": read(model)}
    with pytest.raises(
        ValueError, match=r"--moe-aux-loss-coeff 0.1: .*dense.* has no experts to balance; leave it out"
    ):
        require_expert_grid(ParallelConfig(), both, 0.1)


def test_grids_that_fit(model: Path, dense: Path) -> None:
    tp2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    both = {"hf-checkpoint": read(dense), "teacher-hf-checkpoint": read(model)}
    require_expert_grid(ParallelConfig(expert_model_parallel_size=4, **tp2), both)
    require_expert_grid(ParallelConfig(tensor_model_parallel_size=2), {"hf-checkpoint": read(dense)})


def test_the_embedded_server_takes_each_expert_by_its_own_name(model: Path, tmp_path: Path) -> None:
    other = make_model(
        tmp_path, family="qwen3_moe", layers=4, mlp_only_layers=[1], decoder_sparse_step=2, num_experts=4, seed=9
    )
    served, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (model, other))
    weights, named = ServedWeights(served), load_file(other / "model.safetensors")
    assert weights.checksums().keys() == named.keys()
    down = "model.layers.3.mlp.experts.2.down_proj.weight"
    assert weights.rows(down, 2) == load_file(model / "model.safetensors")[down][:2].tolist()
    with pytest.raises(ValueError, match=r"experts.2.down_proj.weight is \(64, 1\), not \(64, 48\)"):
        weights.copy([(down, torch.ones(64, 1))])
    with pytest.raises(ValueError, match="unknown model.layers.3.mlp.experts.4.down_proj.weight"):
        weights.copy([(down.replace(".2.", ".4."), named[down])])
    weights.copy(list(named.items()))
    weights.release_memory(["weights"])
    weights.resume_memory(["weights"])
    assert weights.trouble is not None
    weights.copy_directory(str(other))
    assert weights.trouble is None
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(served(ids).logits, reference(ids).logits)


def test_servers_that_stack_experts_have_a_place_for_each(model: Path) -> None:
    names = load_file(model / "model.safetensors").keys()
    held = {name for name in names if ".experts." not in name and "_proj." not in name}
    held |= {f"model.layers.{i}.self_attn.{part}.weight" for i in range(4) for part in ("qkv_proj", "o_proj")}
    held |= {f"model.layers.{i}.mlp.{part}.weight" for i in range(3) for part in ("gate_up_proj", "down_proj")}
    stacked = {f"model.layers.3.mlp.experts.{part}_weight" for part in ("w13", "w2")}
    keeps_own_head("u", held | stacked, names)
    with pytest.raises(ServerError, match="it does not know .*experts.0.down_proj.weight"):
        keeps_own_head("u", held | {"model.layers.3.mlp.experts.w13_weight"}, names)
    with pytest.raises(ServerError, match="it has besides model.layers.0.mlp.experts.w2_weight"):
        keeps_own_head("u", held | stacked | {"model.layers.0.mlp.experts.w2_weight"}, names)
