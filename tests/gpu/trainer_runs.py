"""Small training runs on this process's device, for the checks of `run_megatron.py`."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from gpu.dense_model import Shape, Weights, write_model
from gpu.harness import Context, Skipped
from megatron_trd.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_trd.data.packing import MicroBatch, Multiples, pack
from megatron_trd.records import Sample

DISTRIBUTED = ParallelConfig(use_distributed_optimizer=True)
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


class ConfigReader:
    """What the trainer asks `transformers.AutoConfig` for, of a `config.json` that `write_model` wrote."""

    @staticmethod
    def from_pretrained(path: Path) -> SimpleNamespace:
        """Return the file's entries as attributes."""
        config = json.loads((Path(path) / "config.json").read_text())
        return SimpleNamespace(**config, rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]})


if not HAS_TRANSFORMERS:
    stand_in = ModuleType("transformers")
    vars(stand_in).update(AutoConfig=ConfigReader, PretrainedConfig=object, AutoModelForCausalLM=None)
    sys.modules["transformers"] = stand_in


def sizes(context: Context) -> tuple[Shape, Shape]:
    """Return the shapes of student and teacher."""
    small = Shape(hidden=64, ffn=96, layers=2, heads=4, kv_heads=2, head_dim=32, vocab=91)
    full = Shape(hidden=512, ffn=1536, layers=4, heads=8, kv_heads=4, head_dim=64, vocab=8000)
    wide = Shape(hidden=768, ffn=2048, layers=4, heads=8, kv_heads=4, head_dim=128, vocab=8000)
    return context.pick(full, small), context.pick(wide, small)


def make_samples(number: int, vocab: int, longest: int, seed: int = 0) -> list[Sample]:
    """Draw sequences of unequal lengths, the teacher's prompt apart from the student's."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())

    return [
        Sample(
            problem_id=str(i),
            student_prompt_ids=ids(longest // 8 + i),
            teacher_prompt_ids=ids(longest // 4 + 2 * (number - i)),
            response_ids=ids(longest // 4 + longest * i // (2 * number)),
            y_o_correct=None,
        )
        for i in range(number)
    ]


@dataclass(slots=True, kw_only=True)
class Run:
    """A student, its teacher and one step's samples."""

    config: Config
    groups: Any
    student: Any
    teacher: Any
    shapes: tuple[Shape, Shape]
    samples: list[Sample]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.groups.device

    def batch(self, samples: list[Sample] | None = None) -> tuple[MicroBatch, ...]:
        """Pack a step's micro-batches."""
        ((mine,),) = pack(
            samples or self.samples,
            num_steps=1,
            dp_size=1,
            max_tokens=self.config.data.max_tokens_per_micro_batch,
            multiples=Multiples.of(self.config.parallel, self.config.model.tokens_multiple),
            normalization="sequence",
        )
        return mine

    def gradients(self) -> tuple[float, Weights]:
        """Return the step's loss and its gradients under Hugging Face names (PEFT's with an adapter)."""
        from megatron_trd.certificate.training_step import gradients, loss_of_all_ranks

        loss = loss_of_all_ranks(self.student.accumulate_gradients(self.batch(), self.teacher), self.groups).item()
        return loss, gradients(self.student, self.groups)

    def step(self, number: int) -> float:
        """Train on samples of that number; return the loss."""
        from megatron_trd.certificate.training_step import loss_of_all_ranks

        shape = self.shapes[0]
        longest = 4 * len(self.samples[0].teacher_prompt_ids)
        batch = self.batch(make_samples(4, shape.vocab, longest, seed=100 + number))
        return loss_of_all_ranks(self.student.train_step(batch, self.teacher).sums, self.groups).item()

    def weights(self) -> Weights:
        """Return the student's weights as they are now."""
        return {name: tensor.detach().clone() for name, tensor in self.student.export()}

    def checkpoints(self, directory: Path) -> Any:
        """Return its checkpoints below a directory."""
        from megatron_trd.mcore.checkpoint import Checkpoints

        return Checkpoints(CheckpointConfig(run_dir=str(directory)), self.groups)


class Runs:
    """Models on the disk, and runs that start from them."""

    def __init__(self, context: Context, folder: Path, *, sparse: bool = False) -> None:
        """Write student and teacher."""
        student, teacher = sizes(context)
        self.context, self.shapes = context, (student.sparse() if sparse else student, teacher)
        self.paths = tuple(write_model(folder / f"model{i}", shape, i) for i, shape in enumerate(self.shapes))

    def open(
        self,
        *,
        parallel: ParallelConfig | None = None,
        lora: LoraConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        **model: Any,
    ) -> Run:
        """Build student and teacher as the trainer does. Padding rows of the heads would win any softmax."""
        from megatron.core import parallel_state

        from megatron_trd.certificate.training_step import build_poisoned, randomize_adapters
        from megatron_trd.mcore.groups import initialize_groups
        from megatron_trd.mcore.hf_config import common_padding, read_hf_model

        longest = self.context.pick(400, 32)
        config = Config(
            method=MethodConfig(mode="opd"),
            model=ModelConfig(hf_checkpoint=str(self.paths[0]), teacher_hf_checkpoint=str(self.paths[1]), **model),
            parallel=parallel or ParallelConfig(),
            lora=lora or LoraConfig(),
            optimizer=optimizer or OptimizerConfig(lr=1e-3, lr_warmup_fraction=0.0),
            data=DataConfig(trajectories="unused", max_tokens_per_micro_batch=3 * longest),
        )
        gc.collect()
        parallel_state.destroy_model_parallel()  # of the run before
        groups = initialize_groups(config.parallel, 7, 0)
        hfs = (
            read_hf_model(p, flag, 1)
            for p, flag in zip(self.paths, ("hf-checkpoint", "teacher-hf-checkpoint"), strict=True)
        )
        student_hf, teacher_hf = common_padding(*hfs, 128, 1)
        student, teacher = build_poisoned(config, groups, student_hf, teacher_hf, self.shapes[0].vocab)
        if lora is not None:
            randomize_adapters(student.gpt, groups)
            student.optimizer.reload_model_params()
        samples = make_samples(8, self.shapes[0].vocab, longest)
        return Run(config=config, groups=groups, student=student, teacher=teacher, shapes=self.shapes, samples=samples)


@contextmanager
def runs(context: Context, *, sparse: bool = False) -> Iterator[Runs]:
    """Give runs a folder for as long as they need it."""
    begin(context)
    with tempfile.TemporaryDirectory(prefix="trainer-") as folder:
        yield Runs(context, Path(folder), sparse=sparse)


def begin(context: Context) -> None:
    """Make the process group of one rank, once."""
    if not dist.is_initialized():
        backend = "nccl" if context.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.TCPStore("127.0.0.1", 0, 1, True), rank=0, world_size=1)


def need_transformer_engine(context: Context) -> None:
    """Leave a check of Transformer Engine's parts where they cannot run."""
    context.need_cuda()
    if importlib.util.find_spec("transformer_engine") is None:
        raise Skipped("needs Transformer Engine")
