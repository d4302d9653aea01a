"""Train the quickstart's student and teacher from scratch: `python make_models.py --output models`.

The student makes systematic errors when it solves, yet rewrites any y_o flawlessly when it sees y* (OPSD). The
teacher solves well, and rewrites any y_o without y* (OPD). Two models of 154 and 332 thousand weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_data import Curriculum, draw_misconceptions
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_trd.records import Problem
from megatron_trd.tasks.arithmetic import WORDS, ArithmeticTask
from megatron_trd.tasks.prompts import PromptTemplates

TASK = ArithmeticTask()
TEMPLATES = PromptTemplates.load(TASK.template_dir)
MISCONCEIVED_SHARE = 0.36
FIRST_INDEX = 1 << 40
"""Base training draws training problems from here on, distillation from 0 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One run of AdamW (warm-up 100 steps, cosine to 5 %) on chains of one length."""

    num_operations: int
    steps: int
    num_solve: int
    """Solve examples in a batch; half as many others make the second half of the loss."""
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A model and how it is trained: short chains first, they cost less."""

    hidden_size: int
    num_heads: int
    seed: int
    stages: tuple[Stage, ...]


RECIPES = {
    "student": Recipe(
        hidden_size=64,
        num_heads=2,
        seed=8,
        stages=(
            Stage(num_operations=6, steps=1200, num_solve=128, lr=3e-3),
            Stage(num_operations=8, steps=600, num_solve=96, lr=2e-3),
        ),
    ),
    "teacher": Recipe(
        hidden_size=96,
        num_heads=4,
        seed=7,
        stages=(
            Stage(num_operations=6, steps=1100, num_solve=112, lr=2.5e-3),
            Stage(num_operations=8, steps=600, num_solve=96, lr=2e-3),
        ),
    ),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer: one token for each word, words parted by single spaces, `<unk>` for all others."""
    specials = ("<pad>", "<eos>", "<unk>")
    vocabulary = {word: index for index, word in enumerate((*specials, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the tokenizer's files; the class name is the one that transformers 4 knows as well as 5."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Make an untrained three-layer Qwen3 with tied embeddings."""
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=3,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


class Batches:
    """Endless batches of base-training examples with chains of one length."""

    def __init__(self, role: str, stage: Stage, seed: int, tokenizer: PreTrainedTokenizerFast) -> None:
        self.curriculum = Curriculum(role, TEMPLATES, draw_misconceptions(MISCONCEIVED_SHARE))
        self.task = ArithmeticTask(num_operations=stage.num_operations)
        self.rng = random.Random(f"{seed} {stage}")
        self.next_index = FIRST_INDEX
        self.vocabulary = tokenizer.get_vocab()

    def draw(self, kind: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and target weights, both [size, longest], int64 and float32; padded on the right."""
        rows = [self._example(kind) for _ in range(size)]
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
        is_target = torch.tensor([flags + [0.0] * (longest - len(flags)) for _, flags in rows])
        return input_ids, is_target

    def _example(self, kind: str) -> tuple[list[int], list[float]]:
        problem = self.task.train_problem(self.next_index)
        self.next_index += 1
        message, derivation = self.curriculum.draw(kind, problem, self.rng)
        prompt, response = message.split(), [*derivation.words, "<eos>"]
        flags = [0.0] * len(prompt) + [float(index not in derivation.untaught) for index in range(len(response))]
        return [self.vocabulary[word] for word in (*prompt, *response)], flags


def train_stage(model: Qwen3ForCausalLM, batches: Batches, stage: Stage, role: str) -> None:
    """Train in place; the loss is the mean of the solve examples' and the other examples' token means."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01)
    kinds, started = batches.curriculum.rewrites, time.perf_counter()
    model.train()
    for step in range(stage.steps):
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        optimizer.param_groups[0]["lr"] = stage.lr * min(1.0, (step + 1) / 100) * decay
        losses = []
        for kind, size in (("solve", stage.num_solve), (kinds[step % len(kinds)], stage.num_solve // 2)):
            input_ids, is_target = batches.draw(kind, size)
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
            nll = F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
            loss = (nll * is_target[:, 1:]).sum() / is_target[:, 1:].sum()
            (0.5 * loss).backward()
            losses.append(f"{kind} {loss.item():.4f}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(role, step + 1, *losses, f"{time.perf_counter() - started:.0f} s", flush=True)


def make(role: str, output: Path, work_dir: Path) -> None:
    """Train `role` and write its directory; a finished stage found in `work_dir` is not trained again."""
    tokenizer, recipe = build_tokenizer(), RECIPES[role]
    model = build_model(recipe, tokenizer)
    work_dir.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(recipe.stages, start=1):
        weights = work_dir / f"{role}-stage{number}.pt"
        if weights.exists():
            print(f"{weights}: stage {number} is done; delete the file to train it again")
            model.load_state_dict(torch.load(weights))
            continue
        train_stage(model, Batches(role, stage, recipe.seed, tokenizer), stage, role)
        torch.save(model.state_dict(), weights)
    model.to(torch.bfloat16).save_pretrained(output / role)
    (output / role / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, output / role)


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, messages: Sequence[str]) -> list[str]:
    """Return one response for each user message, at temperature 0.6 and top-p 0.95."""
    batch = tokenizer(list(messages), return_tensors="pt", padding=True, padding_side="left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, do_sample=True, temperature=0.6, top_p=0.95, top_k=0, max_new_tokens=40)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def is_right(problem: Problem, response: str) -> bool:
    """Return whether a whole response answers its problem."""
    return TASK.grade(problem, response, "stop").correct


def share_right(problems: Sequence[Problem], responses: Sequence[str]) -> float:
    """Return the share of responses that answer their problem."""
    return sum(map(is_right, problems, responses)) / len(problems)


def measure(output: Path, num_problems: int = 512) -> None:
    """Print how often the written models are right on held-out problems: the rounded weights, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(output / "student")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(output / role, dtype=torch.float32) for role in ("student", "teacher")
    )
    torch.manual_seed(0)
    problems, repeated = TASK.eval_problems(num_problems), [p for p in TASK.eval_problems(128) for _ in range(8)]
    y_o = sample(student, tokenizer, [TEMPLATES.solve(p) for p in problems])
    for role, model in (("student", student), ("teacher", teacher)):
        solved = sample(model, tokenizer, [TEMPLATES.solve(p) for p in repeated])
        right = torch.tensor(list(map(is_right, repeated, solved))).view(128, 8)
        average, passed = right.float().mean().item(), right.any(1).float().mean().item()
        print(f"{role} solves: avg@8 {average:.3f}, pass@8 {passed:.3f} (128 problems)")
    print(f"y_o of the student right: {share_right(problems, y_o):.3f} ({num_problems} problems, as below)")
    for name, model, messages in (
        ("OPSD y_r", student, [TEMPLATES.refine(p, "opsd", y) for p, y in zip(problems, y_o, strict=True)]),
        ("OPSD vanilla teacher", student, [TEMPLATES.vanilla(p, "opsd") for p in problems]),
        ("OPD y_r", teacher, [TEMPLATES.refine(p, "opd", y) for p, y in zip(problems, y_o, strict=True)]),
        ("OPD vanilla teacher", teacher, [TEMPLATES.vanilla(p, "opd") for p in problems]),
    ):
        print(f"{name} right: {share_right(problems, sample(model, tokenizer, messages)):.3f}")


def main() -> None:
    """Train both models and measure them, or do one of the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory that gets student/ and teacher/")
    parser.add_argument("--only", choices=("student", "teacher", "measure"), help="do one thing; default: all three")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/quickstart_models"), help="weights of each stage")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; one is fastest for models this small")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for role in RECIPES:
        if arguments.only in (None, role):
            make(role, arguments.output, arguments.work_dir)
    if arguments.only in (None, "measure"):
        measure(arguments.output)


if __name__ == "__main__":
    main()
