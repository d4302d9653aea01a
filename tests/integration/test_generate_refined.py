"""Kept prefixes and chosen refinements on real servers: through generation, the rollout process and a training step."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch import torchrun
from megatron_trd import generate
from megatron_trd.config.schema import Config, DataConfig, MethodConfig, ModelConfig, RolloutConfig
from megatron_trd.records import Trajectory
from megatron_trd.rollout.ahead import RolloutProcess
from megatron_trd.rollout.refine import stable_seed
from megatron_trd.rollout.summary import summarize
from megatron_trd.rollout.to_sample import to_sample
from megatron_trd.rollout.trajectory_file import read_fingerprint, read_trajectories
from megatron_trd.tasks.arithmetic import ArithmeticTask

NUM = 32
REFINED = MethodConfig(refine_samples=3, refine_select="verified", refine_from="failing-prefix", prefix_steps="tokens")


def config_for(url: str, student_dir: Path, method: MethodConfig = REFINED) -> Config:
    # Hot enough that refinements go wrong too.
    sampling = {"rollout_temperature": 1.6, "rollout_top_p": 1.0, "rollout_top_k": -1, "max_response_tokens": 40}
    return Config(
        method=method,
        model=ModelConfig(hf_checkpoint=str(student_dir)),
        data=DataConfig(rollout_batch_size=NUM, global_batch_size=NUM),
        rollout=RolloutConfig(student_urls=(url,), teacher_urls=(url,), **sampling),  # type: ignore[arg-type]
    )


def made(url: str, student_dir: Path, path: Path, method: MethodConfig = REFINED) -> list[Trajectory]:
    config = config_for(url, student_dir, method)
    assert asyncio.run(generate.generate(config, ArithmeticTask(), path, NUM)) == 0
    return sorted(read_trajectories(path), key=lambda t: t.problem.id)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refined") / "t.jsonl"


@pytest.fixture(scope="module")
def refined(server: str, student_dir: Path, path: Path) -> list[Trajectory]:
    return made(server, student_dir, path)


def test_y_r_is_what_was_kept_and_what_the_server_goes_on_with(
    refined: list[Trajectory], server: str, post: Any, path: Path
) -> None:
    """The refiner's part once more, by a plain request from the refinement prompt and the kept ids."""
    kept = [t for t in refined if t.kept is not None]
    assert {t.problem.id for t in kept} == {t.problem.id for t in refined if t.y_o_correct is False}
    assert any(t.kept.num_tokens for t in kept) and not all(t.kept.num_tokens for t in kept)
    for t in refined:
        num_kept = t.kept.num_tokens if t.kept is not None else 0
        assert t.y_r.token_ids[:num_kept] == t.y_o.token_ids[:num_kept]
        assert len(t.y_r.logprobs) == len(t.y_r.token_ids)
        assert t.y_r.weight_spans[-1].end == len(t.y_r.token_ids)
        stage = f"y_r {t.selection.chosen}" if t.selection.chosen else "y_r"
        sampling = {"temperature": 1.6, "max_new_tokens": 40 - num_kept, "stop_token_ids": [1]}
        sampling["sampling_seed"] = stable_seed(1234, 0, t.problem.id, stage)
        start = [*t.refine_prompt_ids, *t.y_r.token_ids[:num_kept]]
        _, answer = post(server, "/generate", {"input_ids": start, "sampling_params": sampling})
        assert t.y_r.token_ids[num_kept:] == tuple(answer["output_ids"])
    for probe in (probe for t in kept for probe in t.kept.probes):
        assert len(probe.verdicts) == 4 and None not in probe.verdicts
    assert read_fingerprint(path)["refinement"] == "verified of 3 from failing-prefix (tokens, 1 of 4)"


def test_choosing_never_makes_y_r_worse(
    server: str, student_dir: Path, tmp_path: Path, refined: list[Trajectory]
) -> None:
    plain = made(server, student_dir, tmp_path / "plain.jsonl", MethodConfig())
    first, verified, shortest = (
        made(server, student_dir, tmp_path / f"{rule}.jsonl", MethodConfig(refine_samples=3, refine_select=rule))
        for rule in ("first", "verified", "shortest-verified")
    )
    alone = [t.y_r.token_ids for t in plain]
    assert alone == [t.y_r.token_ids for t in first], "the first one is the one that would be alone"
    for one, three, shorter in zip(first, verified, shortest, strict=True):
        assert three.y_r_correct >= one.y_r_correct and shorter.y_r_correct == three.y_r_correct
        assert len(shorter.y_r.token_ids) <= len(three.y_r.token_ids)
    right = [sum(bool(t.y_r_correct) for t in batch) for batch in (first, verified)]
    assert right[0] < right[1]
    metrics = summarize(verified)
    assert metrics["rollout/select_first_pass"] == right[0] / NUM and metrics["rollout/y_r_pass"] == right[1] / NUM
    assert metrics["rollout/select_gained"] == pytest.approx((right[1] - right[0]) / NUM)


def test_other_refinements_refuse_the_file(refined: Any, server: str, student_dir: Path, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"refinement was 'verified of 3 .*' and is 'first of 3 from start'"):
        made(server, student_dir, path, MethodConfig(refine_samples=3))
    assert path.read_bytes() == before


def test_the_rollout_process_sends_all_of_it(refined: list[Trajectory], server: str, student_dir: Path) -> None:
    """Batch 0 of a run is what was generated: the seeds are the same, and everything survives the way.

    Staleness 0, because the server's weights have no trainer's name.
    """
    process = RolloutProcess(config_for(server, student_dir), ArithmeticTask())
    try:
        process.wait_ready()
        batch = process.batch(0, 0)
    finally:
        process.close()
    for sent, wanted in zip(sorted(batch.trajectories, key=lambda t: t.problem.id), refined, strict=True):
        assert (sent.y_o.token_ids, sent.y_r.token_ids) == (wanted.y_o.token_ids, wanted.y_r.token_ids)
        assert (sent.kept, sent.y_r_verdict) == (wanted.kept, wanted.y_r_verdict)
        assert (sent.selection.chosen, sent.selection.reason) == (wanted.selection.chosen, wanted.selection.reason)
        others = [[c.completion.token_ids for c in t.selection.rejected] for t in (sent, wanted)]
        assert others[0] == others[1]


def test_a_training_step_on_what_was_rewritten(
    refined: list[Trajectory], student_dir: Path, path: Path, tmp_path: Path
) -> None:
    """The loss of the first step against the same models in transformers, in fp64."""
    flags = ["--hf-checkpoint", str(student_dir), "--trajectories", str(path), "--run-dir", str(tmp_path / "run")]
    flags += ["--num-iterations", "1", "--rollout-batch-size", str(NUM), "--global-batch-size", str(NUM), "--no-bf16"]
    flags += ["--prefix-loss", "rewritten", "--no-save-checkpoints", "--kl-workspace-mb", "8"]
    result = torchrun(1, "-m", "megatron_trd.train", *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    expected = summarize(refined)
    assert {tag: metrics[tag] for tag in expected} == pytest.approx(expected)

    method = replace(REFINED, prefix_loss="rewritten")
    samples = [s for t in refined if (s := to_sample(t, method).sample) is not None]
    assert len(samples) == metrics["rollout/usable_samples"]
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float64).eval()

    def logprobs(prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)

    with torch.no_grad():
        pairs = [
            (logprobs(s.teacher_prompt_ids, s.response_ids), logprobs(s.student_prompt_ids, s.response_ids))
            for s in samples
        ]
    losses = [(p.exp() * (p - q)).sum(-1).mean() for p, q in pairs]
    assert metrics["train/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
