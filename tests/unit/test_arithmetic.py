from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megatron_trd.config.schema import DataConfig
from megatron_trd.records import Problem
from megatron_trd.tasks import TASKS
from megatron_trd.tasks.arithmetic import WORDS, ArithmeticTask
from megatron_trd.tasks.prompts import PromptTemplates

MODELS = Path(__file__).parents[2] / "examples" / "quickstart_cpu" / "models"
TASK = ArithmeticTask()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODELS / "student", local_files_only=True)


def test_registry_makes_the_toy() -> None:
    task = TASKS["arithmetic"](DataConfig())
    assert task.name == "arithmetic"
    assert len(task.train_problem(0).prompt.split()) == 1 + 8


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("+3 20 /4 5 # 5", True),
        ("# 5", True),
        ("+3 21 W 20 /4 5 # 5", True),
        ("# 6 # 5", True),
        ("# 5 # 6", False),
        ("+3 20 /4 5 # 6", False),
        ("+3 20 /4 5", False),
        ("+3 20 /4 5 #", False),
        ("# 55", False),
        ("# +5", False),
        ("# 05", False),
        ("# W 5", False),
        ("#5", False),
        ("", False),
    ],
)
def test_verify(response: str, right: bool) -> None:
    problem = Problem(id="p", prompt="17 +3 /4", answer="5")
    assert TASK.grade(problem, response, "stop").correct is right


def test_every_step_is_exact_and_in_range() -> None:
    for problem in [*map(TASK.train_problem, range(2000)), *TASK.eval_problems(1000)]:
        assert problem.reference_solution is not None
        start, *operations = problem.prompt.split()
        *steps, mark, answer = problem.reference_solution.split()
        assert steps[::2] == operations and len(operations) == 8
        value = Fraction(start)
        for operation, result in zip(operations, steps[1::2], strict=True):
            operand = int(operation[1:])
            value = {"+": value + operand, "-": value - operand, "/": value / operand}[operation[0]]
            assert value == Fraction(result), f"{problem.prompt}: {operation} gives {value}, not {result}"
            assert 0 <= value <= 59
        assert (mark, answer) == ("#", problem.answer) and value == int(answer)
        assert TASK.grade(problem, problem.reference_solution, "stop").correct
        other = problem.reference_solution.removesuffix(answer) + str((value + 1) % 60)
        assert TASK.grade(problem, other, "stop").outcome == "wrong"


def test_an_index_always_gives_the_same_problem() -> None:
    again = ArithmeticTask()
    backwards = [again.train_problem(index) for index in reversed(range(3000))]
    forwards = [TASK.train_problem(index) for index in range(3000)]
    assert forwards == backwards[::-1]
    assert list(TASK.eval_problems(100)) == list(again.eval_problems(1000)[:100])
    assert len({problem.prompt for problem in forwards}) > 2990, "the stream repeats itself"
    assert len({problem.id for problem in [*forwards, *TASK.eval_problems(1000)]}) == 4000
    # Pinned: a resumed or compared run must see the problems it saw before.
    assert TASK.train_problem(0).prompt == "59 -1 -8 -4 -7 /3 -2 -3 -6"
    assert TASK.eval_problems(1)[0].prompt == "31 +7 +4 /3 -8 -6 /3 /5 /2"


def test_held_out_problems_are_disjoint_even_where_all_problems_are_drawn() -> None:
    """With one operation there are few problems: two independent streams of 4000 would share nearly all."""
    train = {ArithmeticTask(1, seed=1).train_problem(index).prompt for index in range(4000)}
    held_out = {problem.prompt for seed in (1, 2) for problem in ArithmeticTask(1, seed).eval_problems(2000)}
    assert len(train) > 120 and len(held_out) > 120
    assert not train & held_out


def test_other_seeds_and_lengths_give_other_problems() -> None:
    mine = {TASK.train_problem(index).prompt for index in range(500)}
    assert len(mine & {ArithmeticTask(seed=2).train_problem(index).prompt for index in range(500)}) < 5
    assert {len(ArithmeticTask(6).train_problem(index).prompt.split()) for index in range(50)} == {7}


def test_each_word_is_one_token_and_comes_back(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == len(WORDS) + 3 == 92
    ids = tokenizer.encode(" ".join(WORDS))
    assert len(ids) == len(set(ids)) == len(WORDS)
    assert not set(ids) & {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert tokenizer.decode(ids) == " ".join(WORDS)
    for problem in TASK.eval_problems(50):
        for text in (problem.prompt, problem.reference_solution):
            assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.encode("Wait 17 +10") == [
        tokenizer.unk_token_id,
        tokenizer.convert_tokens_to_ids("17"),
        tokenizer.unk_token_id,
    ]


def test_chat_template_adds_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    message = {"role": "user", "content": "Q 17 +3 S +3 20 # 20 Y +3 21 # 21 R"}
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == message["content"].split()


def test_shipped_models_are_small_and_what_they_claim(tokenizer: PreTrainedTokenizerBase) -> None:
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    for role, num_weights in (("student", 153_984), ("teacher", 350_688)):
        model, report = AutoModelForCausalLM.from_pretrained(MODELS / role, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert model.dtype is torch.bfloat16
        assert sum(weight.numel() for weight in model.parameters()) == num_weights
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        same = AutoTokenizer.from_pretrained(MODELS / role, local_files_only=True)
        assert same.get_vocab() == tokenizer.get_vocab()


def _pass_rate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], messages: list[str]
) -> tuple[float, list[str]]:
    batch = tokenizer(messages, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    torch.manual_seed(5)
    output = model.generate(**batch, do_sample=True, temperature=0.6, top_p=0.95, top_k=0, max_new_tokens=40)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(TASK.grade(problem, text, "stop").correct for problem, text in zip(problems, texts, strict=True)) / len(
        problems
    ), texts


def test_shipped_student_errs_but_refines_and_teacher_solves(tokenizer: PreTrainedTokenizerBase) -> None:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(MODELS / role, dtype=torch.float32) for role in ("student", "teacher")
    )
    templates = PromptTemplates.load(TASK.template_dir)
    problems = [problem for problem in TASK.eval_problems(32) for _ in range(4)]
    solve = [templates.solve(problem) for problem in problems]
    solved, y_o = _pass_rate(student, tokenizer, problems, solve)
    assert 0.2 < solved < 0.6
    for name, model, messages in (
        ("opsd y_r", student, [templates.refine(p, "opsd", y) for p, y in zip(problems, y_o, strict=True)]),
        ("opsd vanilla teacher", student, [templates.vanilla(p, "opsd") for p in problems]),
        ("opd y_r", teacher, [templates.refine(p, "opd", y) for p, y in zip(problems, y_o, strict=True)]),
        ("opd vanilla teacher", teacher, solve),
    ):
        assert _pass_rate(model, tokenizer, problems, messages)[0] >= 0.9, name
