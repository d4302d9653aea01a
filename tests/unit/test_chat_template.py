"""Prompts of the real tasks through the real chat templates."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from typing import Any

import pytest

from megatron_trd import generate, train
from megatron_trd.config.schema import Config, DataConfig, MethodConfig, ModelConfig, RolloutConfig
from megatron_trd.records import Problem
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.show_prompts import show_prompts
from megatron_trd.tasks import TASKS
from megatron_trd.tasks.prompts import PromptTemplates
from shared_data import qwen_tokenizer, shared

HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
EMPTY_BLOCK = [151667, 271, 151668, 271]
HOSTILE = r"I used {problem} and {y_o}. \boxed{1} \1 \g<0> {reference_solution}"
PROBLEM = Problem(id="p", prompt="What is $1 + 1$?", answer="2", reference_solution="It is \\boxed{2}.")


def renderer(tokenizer: Any = None, task: str = "math", **changes: Any) -> Renderer:
    settings = {"mode": "opsd", "thinking": False, "refiner_thinking": False}
    budgets = {"max_prompt_tokens": 4096, "max_refine_prompt_tokens": 18432}
    templates = PromptTemplates.load(TASKS[task](DataConfig()).template_dir)
    return Renderer(tokenizer or qwen_tokenizer(), templates, **{**settings, **budgets, **changes})


def with_template(name: str | None) -> Any:
    tokenizer = copy.copy(qwen_tokenizer())
    tokenizer.chat_template = name and shared(f"qwen_tokenizer/{name}").read_text(encoding="utf-8")
    return tokenizer


@pytest.mark.parametrize(("thinking", "refiner_thinking"), [*itertools.product([False, True], repeat=2)])
def test_qwen3_thinks_role_by_role(thinking: bool, refiner_thinking: bool) -> None:
    render = renderer(thinking=thinking, refiner_thinking=refiner_thinking)
    prompts = [
        (render.solve(PROBLEM), thinking),
        (render.vanilla(PROBLEM)[0], thinking),
        (render.refine(PROBLEM, HOSTILE)[0], refiner_thinking),
    ]
    for ids, thinks in prompts:
        text = qwen_tokenizer().decode(ids)
        assert text.startswith(HEAD), "there is no default system prompt"
        assert (list(ids[-4:]) == EMPTY_BLOCK) is not thinks
        assert text.removesuffix("<think>\n\n</think>\n\n").endswith(TAIL)


@pytest.mark.parametrize("thinking", [False, True])
def test_instruct_2507_never_gets_a_block(thinking: bool) -> None:
    tokenizer = with_template("chat_template_instruct_2507.jinja")
    ids = renderer(tokenizer, thinking=thinking, refiner_thinking=thinking).solve(PROBLEM)
    text = "What is $1 + 1$?\n\nReason step by step, and put your final answer in \\boxed{}."
    assert tokenizer.decode(ids) == HEAD + text + TAIL


def test_a_base_tokenizer_without_a_template_gets_the_bare_text() -> None:
    tokenizer = with_template(None)
    render = renderer(tokenizer, thinking=True)
    assert tokenizer.decode(render.solve(PROBLEM)) == render.templates.solve(PROBLEM)


def test_a_switch_that_the_template_lacks_is_reported(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_trd"), "propagate", True)
    rollout = {"student_urls": ("http://s",), "teacher_urls": ("http://t",)}
    model = ModelConfig(hf_checkpoint="here")
    for flags in ({}, {"thinking": True}, {"refiner_thinking": True}):
        caplog.clear()
        config = Config(model=model, rollout=RolloutConfig(**rollout, **flags))  # type: ignore[arg-type]
        render = Renderer.from_config(config, TASKS["math"](DataConfig()), with_template(None))
        assert render.refiner_thinking is bool(flags), "unset means as --thinking"
        assert ("the chat template has no such switch" in caplog.text) is bool(flags)


@pytest.mark.parametrize("task", ["math", "code"])
@pytest.mark.parametrize("mode", ["opd", "opsd"])
def test_every_prompt_says_what_it_must(task: str, mode: str) -> None:
    render = renderer(task=task, mode=mode)
    decode = qwen_tokenizer().decode
    solve, vanilla, refine = (
        decode(ids) for ids in (render.solve(PROBLEM), render.vanilla(PROBLEM)[0], render.refine(PROBLEM, HOSTILE)[0])
    )
    asks = r"\boxed{}" if task == "math" else "```python"
    assert all(PROBLEM.prompt in text and asks in text for text in (solve, vanilla, refine))
    assert HOSTILE in refine and "{problem}" not in refine.replace(HOSTILE, "")
    shown = [str(PROBLEM.reference_solution) in text for text in (solve, vanilla, refine)]
    assert shown == [False, mode == "opsd", mode == "opsd"]
    assert (vanilla == solve) is (mode == "opd")


def test_long_references_are_cut_where_they_stand_and_counted() -> None:
    known = " ".join(f"Step {i} holds." for i in range(2000))
    long = Problem(id="p", prompt=PROBLEM.prompt, answer="2", reference_solution=known)
    whole, no_cut = renderer().vanilla(long)
    ids, num_cut = renderer(max_refine_prompt_tokens=1000).vanilla(long)
    text = qwen_tokenizer().decode(ids)
    assert no_cut == 0 < num_cut and f"[... {num_cut} tokens cut ...]" in text
    assert 950 < len(ids) <= 1000 < len(whole)
    assert "Step 0 holds." in text and "Step 1999 holds." in text and text.endswith("</think>\n\n")
    refined, refined_cut = renderer(max_refine_prompt_tokens=1000).refine(long, "short")
    assert len(refined) <= 1000 and refined_cut > num_cut, "y_o goes first, then y*"


def test_show_prompts_prints_what_the_servers_get() -> None:
    folder = shared("qwen_tokenizer")
    rollout = RolloutConfig(student_urls=("http://s",), teacher_urls=("http://t",), refiner_thinking=True)
    task = TASKS["arithmetic"](DataConfig())
    for mode, count in (("opsd", 3), ("opd", 2)):
        teacher = str(folder) if mode == "opd" else None
        model = ModelConfig(hf_checkpoint=str(folder), teacher_hf_checkpoint=teacher)
        config = Config(method=MethodConfig(mode=mode), model=model, rollout=rollout)  # type: ignore[arg-type]
        shown = show_prompts(config, task, 2)
        assert "a response ends with: 151645 <|im_end|>, 151643 <|endoftext|>" in shown
        assert shown.count("=== arithmetic-train-") == 2 * count
        render = Renderer.from_config(config, task, qwen_tokenizer())
        for problem in (task.train_problem(0), task.train_problem(1)):
            for ids in (render.solve(problem), render.refine(problem, str(problem.reference_solution))[0]):
                assert f"({len(ids)} tokens) ===\n{qwen_tokenizer().decode(ids)}\n" in shown


@pytest.mark.parametrize("main", [train.main, generate.main])
def test_mains_show_prompts_without_servers(main: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"schema": 1, "task": "math", "id": "sums/1", "prompt": "What is 1 + 1?", "answer": "2"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row | {"reference_solution": "Two."}) + "\n")
    urls = ["--student-urls", "http://127.0.0.1:9", "--teacher-urls", "http://127.0.0.1:9"]
    model = ["--hf-checkpoint", str(shared("qwen_tokenizer"))]
    main([*model, *urls, "--task", "math", "--train-data", str(tmp_path / "p.jsonl"), "--show-prompts", "2"])
    shown = capsys.readouterr().out
    assert shown.count("=== sums/1: solve (") == shown.count("=== sums/1: refine, y* in place of y_o (") == 2
