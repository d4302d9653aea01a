"""Prompts as ids: the chat template is applied, budgets hold, x and the instructions are never cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_trd.records import Problem
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.tasks.prompts import PromptTemplates

TOY = Path(__file__).parents[2] / "examples/quickstart_cpu/models/student"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking %}<|nothink|>{% endif %}{% endif %}"
)
TEMPLATES = PromptTemplates(
    solve_template="Solve: {problem}",
    vanilla_opsd_template="Know {reference_solution}. Solve: {problem}",
    refine_opd_template="Task {problem} Draft {y_o} Rewrite!",
    refine_opsd_template="Task {problem} Reference {reference_solution} Draft {y_o} Rewrite!",
)
X = "the one and only problem"


def characters(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character, so that lengths are plain to see."""
    vocab = {chr(i): i for i in range(128)}
    inner = Tokenizer(models.WordLevel(vocab | {"?": 63}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    tokenizer.chat_template = template
    return tokenizer


def renderer(tokenizer: Any = None, **changes: Any) -> Renderer:
    settings = {
        "mode": "opsd",
        "thinking": False,
        "refiner_thinking": False,
        "max_prompt_tokens": 500,
        "max_refine_prompt_tokens": 500,
    }
    return Renderer(tokenizer or characters(), TEMPLATES, **{**settings, **changes})


def problem(reference: str | None = "known") -> Problem:
    return Problem(id="p7", prompt=X, answer="1", reference_solution=reference)


def text(ids: tuple[int, ...]) -> str:
    return "".join(map(chr, ids))


def test_the_chat_template_is_applied_with_the_generation_prompt() -> None:
    assert text(renderer().solve(problem())) == f"<|user|>Solve: {X}<|end|><|assistant|><|nothink|>"
    assert text(renderer(thinking=True).solve(problem())) == f"<|user|>Solve: {X}<|end|><|assistant|>"
    silent, thinks = "<|assistant|><|nothink|>", "<|assistant|>"
    student = renderer(thinking=True)
    assert text(student.solve(problem())).endswith(thinks) and text(student.refine(problem(), "")[0]).endswith(silent)
    assert text(student.vanilla(problem())[0]).endswith(thinks), "y_o was sampled behind it"
    refiner = renderer(refiner_thinking=True)
    assert text(refiner.solve(problem())).endswith(silent) and text(refiner.refine(problem(), "")[0]).endswith(thinks)
    assert text(refiner.vanilla(problem())[0]).endswith(silent)
    assert text(renderer(characters(None)).solve(problem())) == f"Solve: {X}"


def test_teacher_contexts_by_mode() -> None:
    plain = characters(None)
    assert text(renderer(plain).vanilla(problem())[0]) == f"Know known. Solve: {X}"
    assert renderer(plain, mode="opd").vanilla(problem(None)) == (renderer(plain).solve(problem()), 0)
    assert (
        text(renderer(plain).refine(problem(), "{problem}")[0])
        == f"Task {X} Reference known Draft {{problem}} Rewrite!"
    )
    ids, cut = renderer(plain, mode="opd").refine(problem(None), "mine")
    assert (text(ids), cut) == (f"Task {X} Draft mine Rewrite!", 0)
    with pytest.raises(ValueError, match="p7.*reference"):
        renderer(plain).refine(problem(None), "mine")


def test_a_plain_prompt_over_budget_is_an_error_that_names_everything() -> None:
    length = len(renderer().solve(problem()))
    assert len(renderer(max_prompt_tokens=length).solve(problem())) == length
    with pytest.raises(ValueError, match=rf"--max-prompt-tokens {length - 1}: the prompt of problem p7 has {length} "):
        renderer(max_prompt_tokens=length - 1).solve(problem())


@pytest.mark.parametrize("mode", ["opd", "opsd"])
@pytest.mark.parametrize("budget", [160, 250, 433, 434])
def test_only_the_middle_of_y_o_is_cut(mode: str, budget: int) -> None:
    draft = "".join(chr(97 + i % 26) for i in range(400))
    render = renderer(mode=mode, max_refine_prompt_tokens=budget)
    ids, cut = render.refine(problem(), draft)
    whole, _ = renderer(mode=mode, max_refine_prompt_tokens=10_000).refine(problem(), draft)
    assert (ids, cut) == render.refine(problem(), draft)
    assert len(ids) <= budget < len(whole) and budget - len(ids) <= 3
    mark = f" [... {cut} tokens cut ...] "
    before, after = text(ids).split(mark)
    assert len(before) + cut + len(after) == len(whole)
    assert text(whole).startswith(before) and text(whole).endswith(after)
    assert X in before
    assert after.endswith("Rewrite!<|end|><|assistant|><|nothink|>")
    head, tail = before.partition("Draft ")[2], after.partition(" Rewrite!")[0]
    assert draft.startswith(head) and draft.endswith(tail) and 0 <= len(head) - len(tail) <= 1


def test_the_reference_is_cut_after_y_o_and_nothing_else_ever() -> None:
    draft, reference = "d" * 50, "r" * 300
    ids, cut = renderer(max_refine_prompt_tokens=300).refine(problem(reference), draft)
    assert len(ids) <= 300 and "[... 50 tokens cut ...]" in text(ids) and "d" * 3 not in text(ids)
    assert f"[... {cut - 50} tokens cut ...]" in text(ids) and X in text(ids)
    assert text(ids).count("r" * 20) > 0
    ids, cut = renderer(max_refine_prompt_tokens=200).vanilla(problem(reference))
    assert len(ids) <= 200 and f"[... {cut} tokens cut ...]" in text(ids) and X in text(ids)
    assert text(ids).count("r" * 10) > 0 and renderer().vanilla(problem("r" * 300))[1] == 0
    with pytest.raises(ValueError, match="--max-refine-prompt-tokens 90: problem p7 needs"):
        renderer(max_refine_prompt_tokens=90).refine(problem(reference), draft)


def test_a_vocabulary_without_words_for_the_mark_still_works() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    templates = PromptTemplates.load(Path(__file__).parents[2] / "megatron_trd/tasks/templates/arithmetic")
    render = Renderer(
        tokenizer,
        templates,
        mode="opsd",
        thinking=False,
        refiner_thinking=False,
        max_prompt_tokens=32,
        max_refine_prompt_tokens=30,
    )
    x = Problem(id="a", prompt="3 +4 +5", answer="12", reference_solution="+4 7 +5 12 # 12")
    draft = "+4 7 W 7 W 7 W 7 W 7 W 7 W 7 W 7 +5 12 # 12"
    assert tokenizer.decode(render.refine(x, "+4 7 +5 12 # 12")[0]) == "Q 3 +4 +5 S +4 7 +5 12 # 12 Y +4 7 +5 12 # 12 R"
    ids, cut = render.refine(x, draft)
    assert len(ids) <= 30 and cut > 0 and tokenizer.unk_token_id in ids
    assert (
        tokenizer.decode(ids).startswith("Q 3 +4 +5 S +4 7 +5 12 # 12 Y +4 7")
        and ids[-1] == tokenizer("R")["input_ids"][0]
    )
