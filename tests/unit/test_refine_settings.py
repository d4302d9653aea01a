"""Refinement settings that cannot be, and files whose refinements were made otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.config.schema import Config, DataConfig, MethodConfig, ModelConfig, RolloutConfig
from megatron_trd.records import Completion, Problem, Trajectory
from megatron_trd.rollout.refine import describe_refinement
from megatron_trd.rollout.trajectory_file import TrajectoryWriter
from megatron_trd.rollout.world import World
from megatron_trd.tasks.arithmetic import ArithmeticTask
from scripted_rollouts import TOKENIZER, byte_tokenizer

PREFIX = MethodConfig(refine_from="failing-prefix", prefix_continuations=8, prefix_min_correct=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine_samples": 0}, "--refine-samples 0: give a positive integer"),
        ({"prefix_continuations": 0}, "--prefix-continuations 0: give a positive integer"),
        ({"prefix_min_correct": 0}, "--prefix-min-correct 0: give a positive integer"),
        ({"prefix_min_correct": 5}, "--prefix-min-correct 5: no prefix can have that many; give at most"),
        ({"refine_select": "verified"}, "--refine-select verified: there is nothing to choose from; raise"),
        ({"refine_samples": 2, "trajectory": "y_o"}, "--refine-samples 2: --trajectory y_o trains on the raw rollout"),
        ({"refine_from": "failing-prefix", "trajectory": "y_o"}, "--refine-from failing-prefix: --trajectory y_o"),
        ({"refine_from": "failing-prefix", "refiner_thinking": True}, "--refiner-thinking True: with --refine-from"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    servers = {"student_urls": ("http://s",), "teacher_urls": ("http://t",)}
    thinking = {key: settings[key] for key in settings if key == "refiner_thinking"}
    with pytest.raises(ValueError) as error:
        Config(
            method=MethodConfig(**{key: value for key, value in settings.items() if key not in thinking}),
            model=ModelConfig(hf_checkpoint="m"),
            rollout=RolloutConfig(**servers, **thinking),
        )
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (MethodConfig(), "first of 1 from start"),
        (MethodConfig(refine_samples=3, refine_select="shortest-verified"), "shortest-verified of 3 from start"),
        (PREFIX, "first of 1 from failing-prefix (lines, 2 of 8)"),
        (replace(PREFIX, prefix_loss="rewritten", refiner_reasoning="drop"), describe_refinement(PREFIX)),
    ],
)
def test_a_description_names_what_decides_y_r_and_nothing_else(method: MethodConfig, text: str) -> None:
    assert describe_refinement(method) == text


def open_recorded(path: Path, method: MethodConfig, tokenizer: Any = TOKENIZER) -> None:
    config = Config(
        method=method,
        model=ModelConfig(hf_checkpoint="m"),
        data=DataConfig(trajectories=str(path), rollout_batch_size=1, global_batch_size=1),
        rollout=RolloutConfig(),
    )
    World(config, ArithmeticTask(), tokenizer).close()


def test_a_file_is_trained_on_as_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    y = Completion(token_ids=(1,), text="a", finish_reason="stop")
    problem = Problem(id="p", prompt="x", answer="1")
    with TrajectoryWriter(path, {"mode": "opsd", "refinement": describe_refinement(PREFIX)}) as writer:
        writer.append(
            Trajectory(problem=problem, y_o=y, y_o_verdict=None, solve_prompt_ids=(1,), vanilla_prompt_ids=(1,))
        )
    for method in (MethodConfig(), PREFIX, replace(PREFIX, prefix_loss="rewritten")):
        open_recorded(path, method)
    with pytest.raises(ValueError, match=r"first of 2 from start: the y_r of .* are first of 1 from failing-prefix"):
        open_recorded(path, MethodConfig(refine_samples=2))
    with pytest.raises(ValueError, match="--refiner-reasoning drop: the tokenizer has no tokens"):
        open_recorded(path, MethodConfig(refiner_reasoning="drop"), byte_tokenizer(added=()))
