"""The audit against fp64 transformers: with loaded models on ranks, and with servers of both kinds."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import launch
from integration.wire import Engine
from megatron_trd import audit
from megatron_trd.config.schema import Config, DataConfig, MethodConfig, ModelConfig, ParallelConfig, RolloutConfig
from megatron_trd.objectives.token_audit import TokenAudit
from megatron_trd.records import Completion, Problem, Trajectory, Verdict
from megatron_trd.reporting.audit_file import read_audit
from megatron_trd.rollout.trajectory_file import TrajectoryWriter
from megatron_trd.rollout.vocabulary import load_tokenizer

MODELS = Path(__file__).parents[2] / "examples/quickstart_cpu/models"
WORDS = [*range(4, 60, 3)]
"""Stand for the tokens that open a correction; the likeliest token is often one of them."""
NUM = 3


def trajectory(index: int) -> Trajectory:
    draw = random.Random(index)

    def ids(num: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 80) for _ in range(num))

    def completion(num: int) -> Completion:
        return Completion(token_ids=ids(num), text="1", finish_reason="stop")

    failed = Completion(token_ids=(), text="", finish_reason="abort")
    return Trajectory(
        problem=Problem(id=str(index), prompt="x", answer="1"),
        y_o=completion(5 + 2 * index),
        y_o_verdict=Verdict(outcome="wrong"),
        solve_prompt_ids=ids(6),
        vanilla_prompt_ids=ids(9),
        y_r=failed if index == 1 else completion(7),
        y_r_verdict=None if index == 1 else Verdict(outcome="correct"),
        refine_prompt_ids=ids(12),
    )


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "t.jsonl"
    with TrajectoryWriter(path, {"mode": "opd"}) as writer:
        for index in range(NUM):
            writer.append(trajectory(index))
    return path


def config_for(trajectories: Path, *urls: str, **parallel: Any) -> Config:
    return Config(
        method=MethodConfig(mode="opd"),
        model=ModelConfig(
            hf_checkpoint=str(MODELS / "student"), teacher_hf_checkpoint=str(MODELS / "teacher"), bf16=False
        ),
        parallel=ParallelConfig(**parallel),
        data=DataConfig(trajectories=str(trajectories)),
        rollout=RolloutConfig(teacher_urls=urls),
    )


@pytest.fixture(scope="module")
def expected(trajectories: Path) -> list[TokenAudit]:
    return reference(trajectories, "teacher")


def reference(trajectories: Path, teacher: str) -> list[TokenAudit]:
    """Every number from dense fp64 distributions."""
    from transformers import AutoModelForCausalLM

    models = {
        name: AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float64).eval()
        for name in ("student", teacher)
    }

    @torch.no_grad()
    def logprobs(name: str, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
        logits = models[name](torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)

    found = []
    for _, _, sample in audit.responses_of(config_for(trajectories), None):
        log_p = logprobs(teacher, sample.teacher_prompt_ids, sample.response_ids)
        log_q = logprobs("student", sample.student_prompt_ids, sample.response_ids)
        p, q = log_p.exp(), log_q.exp()
        labels = torch.tensor(sample.response_ids)[:, None]
        others = [i for i in range(p.shape[1]) if i not in WORDS]
        values = {
            "teacher_logprob": log_p.gather(1, labels)[:, 0],
            "epistemic_mass": p[:, WORDS].sum(1),
            "best_continuation": p[:, others].amax(1),
            "teacher_entropy": -(p * log_p).sum(1),
            "student_logprob": log_q.gather(1, labels)[:, 0],
            "student_entropy": -(q * log_q).sum(1),
            "kl": (p * (log_p - log_q)).sum(1),
        }
        found.append(TokenAudit(**{name: tuple(value.tolist()) for name, value in values.items()}))
    # The numbers must be able to tell right from wrong: words ahead of all others, and words behind.
    pairs = [pair for a in found for pair in zip(a.epistemic_mass, a.best_continuation, strict=True)]
    assert any(turn > go_on for turn, go_on in pairs) and any(0.01 < turn < go_on for turn, go_on in pairs)
    return found


def require_close(found: TokenAudit, wanted: TokenAudit, names: Iterator[str] | tuple[str, ...]) -> None:
    for name in names:
        torch.testing.assert_close(
            torch.tensor(getattr(found, name)), torch.tensor(getattr(wanted, name)), rtol=2e-5, atol=2e-6, msg=name
        )


def audit_on_rank(rank: int, world_size: int, trajectories: Path, output: Path, parallel: dict[str, Any]) -> None:
    config = config_for(trajectories, **parallel)
    responses = audit.responses_of(config, None)
    if rank:
        audit.audit_loaded(config, responses, WORDS, None, 0)
        return
    tokenizer = load_tokenizer(MODELS / "student", "hf-checkpoint")
    with audit.AuditWriter(output, tokenizer, 0.1) as writer:
        audit.audit_loaded(config, responses, WORDS, writer, 0)


@pytest.mark.parametrize(
    "world_size, parallel",
    [
        (2, {}),  # five responses on two ranks: the last block is not full
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (3, {"pipeline_model_parallel_size": 3}),
        (2, {"context_parallel_size": 2}),
    ],
    ids=["dp 2", "tp 2 with sequence parallelism", "pp 3", "cp 2"],
)
def test_loaded_models(
    world_size: int, parallel: dict[str, Any], trajectories: Path, expected: list[TokenAudit], tmp_path: Path
) -> None:
    launch.spawn(audit_on_rank, world_size, trajectories, tmp_path, parallel)
    found = list(read_audit(tmp_path / "audit.jsonl"))
    assert [(r.problem_id, r.along) for r in found] == [
        ("0", "y_o"), ("0", "y_r"), ("1", "y_o"), ("2", "y_o"), ("2", "y_r")
    ]  # fmt: skip
    for response, wanted in zip(found, expected, strict=True):
        require_close(response.tokens, wanted, tuple(TokenAudit.__slots__))
        assert response.turn == wanted.turn(0.1)
    assert audit.table(tmp_path).count("\n") == 2  # the head, y_o and y_r
    groups = json.loads((tmp_path / "audit_summary.json").read_text())["groups"]
    kl = [value for wanted in expected for value in wanted.kl or ()]
    assert sum(group["tokens"] for group in groups) == len(kl)
    assert sum(group["tokens"] * group["mean"]["kl"] for group in groups) == pytest.approx(sum(kl), rel=1e-5)


def test_servers(engine: Engine, trajectories: Path, tmp_path: Path) -> None:
    """The server holds the student, which teaches itself here."""
    wanted = reference(trajectories, "student")
    config = config_for(trajectories, engine.url)
    tokenizer = load_tokenizer(MODELS / "student", "hf-checkpoint")
    with audit.AuditWriter(tmp_path, tokenizer, 0.1) as writer:
        responses = audit.responses_of(config, None)
        asyncio.run(audit.audit_on_servers(config, responses, WORDS, writer, tokenizer))
    for response, one in zip(read_audit(tmp_path / "audit.jsonl"), wanted, strict=True):
        require_close(response.tokens, one, ("teacher_logprob", "epistemic_mass", "best_continuation"))
        assert response.tokens.kl is None and response.tokens.teacher_entropy is None  # not told, so not there


def test_a_file_of_another_mode_is_refused(trajectories: Path) -> None:
    model = ModelConfig(hf_checkpoint=str(MODELS / "student"))
    config = replace(config_for(trajectories), method=MethodConfig(mode="opsd"), model=model)
    with pytest.raises(ValueError, match="--mode opsd: .* was made with --mode opd"):
        next(audit.responses_of(config, None))
