"""The loop. It reads as Algorithm 1 of the paper:

    roll out  y_o ~ student(x)
    refine    y_r ~ teacher(x, y_o [, y*])
    distill   min KL(teacher(. | x, y_o [, y*], y_r,<t) || student(. | x, y_r,<t))
    publish   the new weights to the student's servers

Rank 0 talks to servers and files; every rank computes. An iteration is one batch of trajectories, a step is one
optimizer update.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_trd.config.schema import Config
from megatron_trd.data.broadcast import run_on_rank_zero
from megatron_trd.data.packing import Multiples, StepBatch, counts, pack, pack_in_order, stream_lengths
from megatron_trd.log import get_logger
from megatron_trd.mcore.checkpoint import Checkpoints
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.student import Student
from megatron_trd.mcore.teacher import Teacher
from megatron_trd.metrics import MetricSums, Reporter, StageClock
from megatron_trd.objectives.diagnostics import NAMES, Sums, with_perplexities
from megatron_trd.objectives.drift import ALARM_NATS, watch_drift
from megatron_trd.records import Sample, Trajectory
from megatron_trd.rollout.refine import RolloutBatch
from megatron_trd.rollout.saved_trajectories import save_trajectories
from megatron_trd.rollout.staleness import weight_version
from megatron_trd.rollout.to_sample import to_sample

logger = get_logger(__name__)


class World(Protocol):
    """What rank 0 sees outside the trainer: trajectories come in, weights go out."""

    def rollout(self, iteration: int, cursor: int) -> RolloutBatch:
        """Return the batch of an iteration, from problem `cursor` on."""
        ...

    def rest(self) -> None:
        """Have servers on the trainer's GPUs give their memory back until the next publication."""
        ...

    def publish(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: str, only: frozenset[str] | None
    ) -> tuple[dict[str, float], frozenset[str]]:
        """Bring weights to the student's servers, all or those whose URL is in `only`; return metrics and the URLs of
        those that failed."""
        ...

    def require_servers(self) -> None:
        """Raise an error that names every server and its trouble if none holds the published weights."""
        ...

    def probe(self) -> list[tuple[Sample, tuple[float, ...]]]:
        """Sample a few short responses from the served student, with the log-probabilities it reports for them at the
        rollout temperature; empty if every request failed."""
        ...

    def evaluate(self) -> dict[str, Any] | None:
        """Evaluate the served student, as plain values; None where there is nothing to evaluate."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return the servers' health."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Handout:
    """What rank 0 hands to every rank, once an iteration."""

    steps: list[StepBatch]
    audits: dict[str, StepBatch]
    """The same trajectories along y_o and along y_r, to compare the teacher's signal without training."""
    num_samples: int
    num_tokens: int
    """Tokens of both streams over all steps, without padding."""


@dataclass(slots=True)
class Progress:
    """Where the run is: plain values, saved with every checkpoint."""

    iteration: int = 0
    """Finished iterations; also names the weights."""
    step: int = 0
    cursor: int = 0
    """Next problem to draw."""
    consumed_samples: int = 0
    before: dict[str, Any] | None = None
    """Evaluation before training."""
    first: dict[str, float] = field(default_factory=dict)
    """Metrics of the first iteration, its audit among them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock of each stage since the run began."""

    @property
    def weight_version(self) -> str:
        """Version the servers know these weights by."""
        return weight_version(self.iteration)


class Trainer:
    """Runs iterations from wherever the run stands to its end."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        handout_group: dist.ProcessGroup,
        student: Student,
        teacher: Teacher,
        world: World | None,
        reporter: Reporter | None,
    ) -> None:
        """Assemble the loop.

        Args:
            handout_group: gloo group over all ranks whose timeout outlasts any rollout.
            world, reporter: on rank 0 only; None elsewhere.
        """
        self.config, self.groups, self.handout_group = config, groups, handout_group
        self.student, self.teacher = student, teacher
        self.world, self.reporter = world, reporter
        self.progress = Progress()
        self.clock = StageClock()
        self.checkpoints = Checkpoints(config.checkpoint, groups)

    def resume(self) -> None:
        """Go on after the newest good checkpoint. Collective over all ranks."""
        self.progress = Progress(**self.checkpoints.resume(self.student))
        self.clock.totals.update(self.progress.seconds)
        logger.info("resumed after iteration %d of %s", self.progress.iteration, self.checkpoints.root)
        if self.reporter:
            self.reporter.rewind(self.progress.iteration)

    def run(self) -> dict[str, Any] | None:
        """Train to the end; return the final evaluation (on rank 0)."""
        self._publish()
        if self.progress.iteration == 0:
            self.progress.before = self._evaluate()
        after: dict[str, Any] | None = None
        while self.progress.iteration < self.config.data.num_iterations:
            metrics = self._iterate()
            last = self.progress.iteration == self.config.data.num_iterations
            if last or self._due(self.config.eval.eval_interval):
                after = self._evaluate()
                metrics |= _evaluation_tags(self.config.data.task, after)
            self._report(metrics)
            if self.config.checkpoint.save_checkpoints and (last or self._due(self.config.checkpoint.save_interval)):
                self._save()
        with self.clock("checkpoint"):
            self.checkpoints.finish()
        return after if after is not None else self._evaluate()

    def _iterate(self) -> dict[str, float]:
        """Roll out, refine, distill, publish."""
        metrics: dict[str, float] = {}

        def prepare() -> Handout:
            assert self.world is not None  # rank 0
            batch = self.world.rollout(self.progress.iteration, self.progress.cursor)
            self.world.rest()
            metrics.update(batch.metrics())
            if self.config.checkpoint.save_trajectories:
                save_trajectories(self.config, self.progress.iteration + 1, batch.trajectories)
            for stage, seconds in batch.stage_seconds.items():
                self.clock.note(f"rollout, {stage}", seconds)
            return self._pack(batch.trajectories, self._samples(batch.trajectories, metrics))

        with self.clock("rollout"):
            handout = run_on_rank_zero(prepare, self.handout_group)
        if handout.audits:
            with self.clock("diagnose"):
                metrics |= self._diagnose(handout)
        with self.clock("train"):
            metrics |= self._train(handout)
        logger.info("iteration %d is trained", self.progress.iteration + 1)
        self.progress.iteration += 1
        self.progress.cursor += self.config.data.rollout_batch_size
        self.progress.consumed_samples += handout.num_samples
        if self.progress.iteration == 1:
            self.progress.first = dict(metrics)
        with self.clock("publish"):
            metrics |= self._publish()
        return metrics

    def _save(self) -> None:
        with self.clock("checkpoint"):
            self.progress.seconds = dict(self.clock.totals)
            progress = run_on_rank_zero(lambda: asdict(self.progress), self.handout_group)  # the full one, everywhere
            self.checkpoints.save(self.student, progress)

    # ------------------------------------------------------------------ trajectories -> packed steps (rank 0)

    def _samples(self, trajectories: Sequence[Trajectory], metrics: dict[str, float]) -> list[Sample]:
        decided = [to_sample(t, self.config.method) for t in trajectories]
        for decision in decided:
            if decision.reason:
                tag = f"rollout/{decision.reason}"
                metrics[tag] = metrics.get(tag, 0.0) + 1.0
        samples = [d.sample for d in decided if d.sample is not None]
        metrics["rollout/usable_samples"] = float(len(samples))
        if not samples:
            logger.warning("iteration %d: zero usable samples, no update", self.progress.iteration)
        return samples

    def _pack(self, trajectories: Sequence[Trajectory], samples: Sequence[Sample]) -> Handout:
        data = self.config.data

        def packed(chosen: Sequence[Sample], num_steps: int) -> list[StepBatch]:
            return pack(
                chosen,
                num_steps=num_steps,
                dp_size=self.groups.dp_size,
                max_tokens=data.max_tokens_per_micro_batch,
                multiples=Multiples.of(self.config.parallel, self.config.model.tokens_multiple),
                normalization=self.config.objective.loss_normalization,
            )

        audits: dict[str, StepBatch] = {}
        interval = self.config.checkpoint.diagnose_interval
        if interval >= 0 and (self.progress.iteration == 0 or self._due(interval)):
            for which in ("y_o", "y_r"):
                method = replace(
                    self.config.method, trajectory=which, trajectory_filter="full", on_bad_refinement="drop"
                )
                chosen = [s for t in trajectories if (s := to_sample(t, method).sample) is not None]
                if chosen:
                    (audits[which],) = packed(chosen, 1)
        return Handout(
            steps=packed(samples, data.rollout_batch_size // data.global_batch_size) if samples else [],
            audits=audits,
            num_samples=len(samples),
            num_tokens=sum(sum(stream_lengths(sample)) for sample in samples),
        )

    # ------------------------------------------------------------------ compute (all ranks)

    def _train(self, handout: Handout) -> dict[str, float]:
        if not handout.steps:
            return {}
        start = time.perf_counter()
        sums: list[Sums] = []
        for batch in handout.steps:
            result = self.student.train_step(batch[self.groups.dp_rank], self.teacher)
            sums += result.sums
            self.progress.step += 1
        means = self._reduce(sums)
        seconds = time.perf_counter() - start
        return {
            "perf/tokens_per_s_per_gpu": handout.num_tokens / seconds / self.groups.world_size,
            "train/loss": means.pop("loss"),
            "train/grad_norm": result.grad_norm,
            "train/lr": result.lr,
            **counts(handout.steps),
            **{f"distill/{name}": value for name, value in means.items()},
        }

    def _diagnose(self, handout: Handout) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for which, batch in handout.audits.items():
            means = self._reduce(self.student.audit(batch[self.groups.dp_rank], self.teacher))
            metrics |= {f"audit/{which}/{name}": value for name, value in means.items()}
        return metrics

    def _reduce(self, sums: Sequence[Sums]) -> dict[str, float]:
        """Divide once, after one reduction over all ranks; equal ones count alike above and below the line."""
        total = MetricSums(NAMES, device=self.groups.device)
        for part in sums:
            for name, (numerator, denominator) in part.items():
                total.add(name, numerator, denominator)
        return with_perplexities(total.reduce())

    # ------------------------------------------------------------------ the student's servers (all ranks export)

    def _publish(self) -> dict[str, float]:
        """Export collectively, send from rank 0, and check that trainer and servers hold the same model."""
        if not self.config.rollout.student_urls:
            return {}
        if self.config.rollout.colocate and self.groups.device.type == "cuda":
            torch.cuda.empty_cache()  # for the servers, which take their memory again
            dist.barrier(self.handout_group)
        metrics: dict[str, float] = {}
        only: frozenset[str] | None = None
        for _ in range(1 + self.config.weight_sync.weight_sync_retries):
            if not (only := self._publish_once(metrics, only)):
                break
        run_on_rank_zero(lambda: self.world.require_servers() if self.world else None, self.handout_group)
        if self.world is not None:
            metrics |= self.world.metrics()
        return metrics | self._compare_with_servers()

    def _publish_once(self, metrics: dict[str, float], only: frozenset[str] | None) -> frozenset[str]:
        """Publish to all servers, or to those whose URL is in `only`; return the URLs of those that failed."""
        adapter_alone = self.config.weight_sync.weight_sync == "adapter"
        weights = self.student.export_adapter() if adapter_alone else self.student.export()
        failed: frozenset[str] = frozenset()
        if self.world is not None:
            published, failed = self.world.publish(weights, self.progress.weight_version, only)
            metrics |= published
        for _ in weights:  # making them is collective
            pass
        return run_on_rank_zero(lambda: failed, self.handout_group)

    def _compare_with_servers(self) -> dict[str, float]:
        """Compute the log-probabilities of tokens the server just sampled, and compare with what it reported."""
        probe = run_on_rank_zero(lambda: self.world.probe() if self.world else [], self.handout_group)
        if not probe:
            return {}
        multiples = Multiples.of(self.config.parallel, self.config.model.tokens_multiple)
        batch = pack_in_order([sample for sample, _ in probe], multiples)
        ours = self.student.response_logprobs(batch, self.config.rollout.rollout_temperature or 1.0)
        served = torch.tensor([logprob for _, logprobs in probe for logprob in logprobs], dtype=torch.float64)
        alarm = self.config.rollout.drift_alarm_nats or ALARM_NATS["bf16" if self.config.model.bf16 else "fp32"]
        return watch_drift(ours, served, alarm)

    def _evaluate(self) -> dict[str, Any] | None:
        with self.clock("evaluate"):
            return run_on_rank_zero(lambda: self.world.evaluate() if self.world else None, self.handout_group)

    def _report(self, metrics: dict[str, float]) -> None:
        if self.reporter:
            times = {f"time/{stage}_s": seconds for stage, seconds in self.clock.lap().items()}
            self.reporter.report(self.progress.iteration, self.progress.step, metrics | times)

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.progress.iteration % interval == 0


def _evaluation_tags(task: str, result: dict[str, Any] | None) -> dict[str, float]:
    if result is None:
        return {}
    scores = {key: value for key, value in result.items() if isinstance(value, float)}
    return {f"eval/{task}/{key}": value for key, value in scores.items()}
