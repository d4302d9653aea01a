"""The cut of the layers into pipeline stages, and of sequences into context-parallel slices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_trd.mcore.context_parallel import places, sliced_seq_params, tokens_of_rank
from megatron_trd.mcore.hf_config import read_hf_model
from megatron_trd.mcore.layouts import rows
from megatron_trd.mcore.stages import Stages, cut_into_stages
from tiny_models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), layers=6, tied=False)


def test_chunks_go_round_the_stages() -> None:
    stages = Stages(num_layers=8, pp_size=2, chunks_per_rank=2)
    homes = [stages.home(f"decoder.layers.{i}.mlp.linear_fc1.weight") for i in range(8)]
    assert [(h.pp_rank, h.chunk) for h in homes] == [(0, 0)] * 2 + [(1, 0)] * 2 + [(0, 1)] * 2 + [(1, 1)] * 2
    assert [h.name for h in homes] == [f"decoder.layers.{i}.mlp.linear_fc1.weight" for i in (0, 1)] * 4
    ends = [stages.home(name) for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight")]
    assert [(h.pp_rank, h.chunk) for h in ends] == [(0, 0), (1, 1)]


def test_every_parameter_has_one_home(model: Path) -> None:
    hf = read_hf_model(model, "hf-checkpoint", 1)
    homes = [cut_into_stages(hf, 3, 2).home(row.megatron) for row in rows(hf.family, hf.geometry, tied=False)]
    assert len({(h.pp_rank, h.chunk, h.name) for h in homes}) == len(homes)


def test_layers_that_cannot_be_cut_are_refused(model: Path) -> None:
    hf = read_hf_model(model, "hf-checkpoint", 1)
    with pytest.raises(ValueError, match=r"--pipeline-model-parallel-size 4: must divide the 6 layers .* 1, 2, 3, 6"):
        cut_into_stages(hf, 4)
    with pytest.raises(ValueError, match=r"--num-virtual-stages-per-pipeline-rank 2: must divide the 3 layers"):
        cut_into_stages(hf, 2, 2)


BOUNDS = torch.tensor([0, 8, 24, 32], dtype=torch.int32)


def test_slices_mirror_each_sequence() -> None:
    assert tokens_of_rank(BOUNDS, 2, 0).tolist() == [0, 1, 6, 7, *range(8, 12), *range(20, 24), 24, 25, 30, 31]
    assert tokens_of_rank(BOUNDS, 2, 1).tolist() == [2, 3, 4, 5, *range(12, 20), *range(26, 30)]
    laid_out = torch.cat([tokens_of_rank(BOUNDS, 4, rank) for rank in range(4)])
    assert torch.equal(laid_out[places(BOUNDS, 4)], torch.arange(32))


@pytest.mark.parametrize("rank", range(4))
def test_each_chunk_sees_the_keys_up_to_its_end(rank: int) -> None:
    params = sliced_seq_params(BOUNDS, 16, 4, rank)
    queries = tokens_of_rank(BOUNDS, 4, rank)
    gathered = torch.cat([tokens_of_rank(BOUNDS, 4, r) for r in range(4)])
    keys = gathered[params.key_places]
    assert params.longest_key == params.key_bounds.diff().max()
    for segment in range(6):
        mine = queries[params.query_bounds[segment] : params.query_bounds[segment + 1]]
        seen = keys[params.key_bounds[segment] : params.key_bounds[segment + 1]]
        start = int(BOUNDS[segment // 2])
        assert seen.tolist() == list(range(start, int(mine[-1]) + 1))
