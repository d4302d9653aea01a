"""Audit given responses: where along them does the teacher want to turn back? Nothing is trained.

    torchrun --nproc-per-node N -m megatron_trd.audit --trajectories FILE --hf-checkpoint DIR --output DIR
    python -m megatron_trd.audit --trajectories FILE --hf-checkpoint DIR --teacher-urls URL --output DIR

The first loads student and teacher and measures everything. The second asks the teacher's servers, which tell neither
entropy nor KL. `objectives/token_audit.py` defines what is measured; `megatron_trd.report` draws the --output.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_trd.config.cli import exit_on_value_error, parse_config
from megatron_trd.config.schema import Config
from megatron_trd.log import configure, get_logger
from megatron_trd.mcore.groups import destroy_groups, initialize_groups
from megatron_trd.mcore.models import read_models
from megatron_trd.mcore.response_audit import ResponseAudit
from megatron_trd.objectives.token_audit import TURN_THRESHOLD, TokenAudit
from megatron_trd.records import Sample, Trajectory
from megatron_trd.reporting.audit_file import AuditedResponse
from megatron_trd.reporting.audit_numbers import audit_numbers
from megatron_trd.reporting.run_files import AUDIT
from megatron_trd.rollout.served_audit import audit_served
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.rollout.to_sample import to_sample
from megatron_trd.rollout.trajectory_file import read_fingerprint, read_trajectories
from megatron_trd.rollout.vocabulary import epistemic_token_ids, load_tokenizer
from megatron_trd.tasks import TASKS, TaskMakers, make_task
from megatron_trd.weight_sync.base import ServerError

logger = get_logger(__name__)
Along = Literal["y_o", "y_r"]
Response = tuple[Trajectory, Along, Sample]
Responses = Iterator[Response]
BLOCK = 256
"""Served responses under way at a time."""


def responses_of(config: Config, num_trajectories: int | None) -> Responses:
    """Yield y_o and y_r of each trajectory in the two contexts that training would give them.

    Left out, and counted in the log, are those that failed or that training would not use as they are.

    Raises:
        ValueError: the file is missing or malformed, or was made with another --mode.
    """
    path = config.data.trajectories
    if path is None or not Path(path).is_file():
        raise ValueError(f"--trajectories {path or '(unset)'}: no such file; make it with megatron_trd.generate")
    made_with = read_fingerprint(path)["mode"]
    if made_with != config.method.mode:
        raise ValueError(f"--mode {config.method.mode}: {path} was made with --mode {made_with}; use the same one")
    left_out = {"y_o": 0, "y_r": 0}
    for trajectory in itertools.islice(read_trajectories(path), num_trajectories):
        along: Along
        for along in ("y_o", "y_r"):
            method = replace(config.method, trajectory=along, trajectory_filter="full", on_bad_refinement="drop")
            if (sample := to_sample(trajectory, method).sample) is not None:
                yield trajectory, along, sample
            else:
                left_out[along] += 1
    if any(left_out.values()):
        logger.info("%s: left out %d y_o and %d y_r", path, left_out["y_o"], left_out["y_r"])


class AuditWriter:
    """Writes audited responses below a directory, and at the end what they come to. A context manager."""

    def __init__(self, output: str | Path, tokenizer: PreTrainedTokenizerBase, turn_threshold: float) -> None:
        """Begin `audit.jsonl` anew."""
        self._folder, self._tokenizer, self._threshold = Path(output), tokenizer, turn_threshold
        self._folder.mkdir(parents=True, exist_ok=True)
        self._partial = self._folder / f"{AUDIT}.partial"
        self._file = self._partial.open("w", encoding="utf-8")

    def __enter__(self) -> AuditWriter:
        """Return itself."""
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        """Give the file its name, if the audit came to its end."""
        self._file.close()
        if kind is None:
            os.replace(self._partial, self._folder / AUDIT)

    def write(self, response: Response, tokens: TokenAudit) -> None:
        """Append one response."""
        trajectory, along, sample = response
        verdicts = (trajectory.y_o_verdict, trajectory.y_r_verdict)
        audited = AuditedResponse(
            problem_id=trajectory.problem.id,
            along=along,
            y_o_verdict=None if verdicts[0] is None else verdicts[0].outcome,
            y_r_verdict=None if verdicts[1] is None else verdicts[1].outcome,
            token_ids=sample.response_ids,
            token_texts=tuple(self._tokenizer.decode([token]) for token in sample.response_ids),
            tokens=tokens,
            turn=tokens.turn(self._threshold),
            turn_threshold=self._threshold,
        )
        self._file.write(json.dumps(audited.as_json(), ensure_ascii=False) + "\n")


def table(output: str | Path) -> str:
    """Return what an audit came to, for people, and write it to `audit_summary.json`."""
    numbers = audit_numbers([Path(output) / AUDIT])
    numbers.pop("strips", None)
    (Path(output) / "audit_summary.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    lines = ["along  verdict    responses   tokens  epistemic mass  two-mode score  KL, nats   turns"]
    for group in numbers.get("groups", ()):
        mean = group["mean"]
        lines.append(
            f"{group['along']:5}  {group['verdict']:9}  {group['responses']:9,} {group['tokens']:8,}"
            f"  {1000 * mean['epistemic_mass']:10.3f} ‰    {1000 * mean['two_mode']:10.3f} ‰  "
            + (f"{mean['kl']:9.4f}" if "kl" in mean else f"{'-':>9}")
            + f"  {group['turns']['share']:6.1%}"
        )
    return "\n".join(lines)


def audit_loaded(
    config: Config, responses: Responses, epistemic_ids: Sequence[int], writer: AuditWriter | None, local_rank: int
) -> None:
    """Audit with student and teacher on the ranks of torchrun. Collective; rank 0 has the writer.

    Raises:
        ValueError: a model cannot be used.
    """
    student, teacher = read_models(config)
    groups = initialize_groups(config.parallel, config.data.seed, local_rank)
    models = ResponseAudit(config, groups, student, teacher, epistemic_ids)
    while block := list(itertools.islice(responses, groups.dp_size)):
        # Every rank takes part in every forward pass: experts may be spread over all of them.
        tokens = models.audit(block[min(groups.dp_rank, len(block) - 1)][2])
        found: list[tuple[int, TokenAudit]] = [(0, tokens)] * groups.world_size
        dist.all_gather_object(found, (groups.dp_rank, tokens))
        if writer is not None:
            of_rank = dict(found)
            for dp_rank, response in enumerate(block):
                writer.write(response, of_rank[dp_rank])


async def audit_on_servers(
    config: Config,
    responses: Responses,
    epistemic_ids: Sequence[int],
    writer: AuditWriter,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Audit with the teacher's servers. Raises ServerError."""
    async with SGLangFleet.from_config(config, "teacher", tokenizer) as fleet:
        await fleet.wait_healthy()
        while block := list(itertools.islice(responses, BLOCK)):
            audits = (audit_served(fleet, sample, epistemic_ids) for _, _, sample in block)
            for response, tokens in zip(block, await asyncio.gather(*audits), strict=True):
                writer.write(response, tokens)


def main(argv: Sequence[str] | None = None, tasks: TaskMakers = TASKS) -> None:
    """Audit a file of trajectories. Other projects pass their own `tasks`."""
    rank = int(os.environ.get("RANK", "0"))
    configure(rank)
    with exit_on_value_error():
        config, extras = parse_config(
            argv,
            description="Measure along given responses where the teacher wants to turn back.",
            extra={
                "output": (str, "", "Directory for audit.jsonl and audit_summary.json."),
                "num_trajectories": (int | None, None, "Audit the first N trajectories; unset = all."),
                "turn_threshold": (float, TURN_THRESHOLD, "Epistemic mass beyond which the teacher turns."),
            },
        )
        served = bool(config.rollout.teacher_urls)
        if not extras.output:
            raise ValueError("--output (unset): give a directory")
        if not served and "RANK" not in os.environ:
            raise ValueError("start it with torchrun --nproc-per-node N -m megatron_trd.audit, or give --teacher-urls")
        task = make_task(config, tasks, trains=False, evaluates=False, grades=False)
        tokenizer = load_tokenizer(config.model.hf_checkpoint, "hf-checkpoint")
        epistemic_ids = epistemic_token_ids(tokenizer, task.epistemic_words)
        if not epistemic_ids:
            raise ValueError(f"--task {config.data.task}: has no words that open a correction; give it epistemic_words")
        responses = responses_of(config, extras.num_trajectories)
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if rank != 0:
            audit_loaded(config, responses, epistemic_ids, None, local_rank)
            destroy_groups()
            return
        with AuditWriter(extras.output, tokenizer, extras.turn_threshold) as writer:
            if not served:
                audit_loaded(config, responses, epistemic_ids, writer, local_rank)
                destroy_groups()
            else:
                try:
                    asyncio.run(audit_on_servers(config, responses, epistemic_ids, writer, tokenizer))
                except ServerError as error:
                    sys.exit(f"error: {error}")
        print(table(extras.output))


if __name__ == "__main__":
    main()
