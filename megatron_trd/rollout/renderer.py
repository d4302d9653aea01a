"""From a problem to token ids: the one place where prompts are made, for sampling and for the loss alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_trd.config.schema import Config
from megatron_trd.records import Problem
from megatron_trd.tasks.base import Task
from megatron_trd.tasks.prompts import Mode, PromptTemplates


class Renderer:
    """Fills a task's templates and puts them through the tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: PromptTemplates,
        *,
        mode: Mode,
        thinking: bool,
        max_prompt_tokens: int,
        max_refine_prompt_tokens: int,
    ) -> None:
        """Remember the parts; the flags of the same names explain them."""
        self.tokenizer, self.templates, self.mode, self.thinking = tokenizer, templates, mode, thinking
        self.max_prompt_tokens, self.max_refine_prompt_tokens = max_prompt_tokens, max_refine_prompt_tokens

    @classmethod
    def from_config(cls, config: Config, task: Task, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """Make the renderer of a run."""
        return cls(
            tokenizer,
            PromptTemplates.load(Path(config.data.prompt_dir or task.template_dir)),
            mode=config.method.mode,
            thinking=config.rollout.thinking,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_refine_prompt_tokens=config.rollout.max_refine_prompt_tokens,
        )

    def solve(self, problem: Problem) -> tuple[int, ...]:
        """Return the plain prompt x. Raises ValueError if it is over budget: x is never cut."""
        ids = self._encode(self.templates.solve(problem))
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"--max-prompt-tokens {self.max_prompt_tokens}: the prompt of problem {problem.id} has {len(ids)} "
                "tokens; raise the budget or leave the problem out"
            )
        return ids

    def vanilla(self, problem: Problem) -> tuple[int, ...]:
        """Return the teacher's context along y_o: x in OPD; x and y* (cut if need be) in OPSD."""
        if self.mode == "opd":
            return self.solve(problem)
        return self._fit(
            problem,
            lambda reference: self.templates.vanilla(replace(problem, reference_solution=reference), self.mode),
            [problem.reference_solution],
        )[0]

    def refine(self, problem: Problem, y_o_text: str) -> tuple[tuple[int, ...], int]:
        """Return the refinement prompt and the number of tokens cut from y_o (then y*) to keep it in budget."""
        if self.mode == "opd":
            return self._fit(problem, lambda y_o: self.templates.refine(problem, self.mode, y_o), [y_o_text])
        return self._fit(
            problem,
            lambda y_o, reference: self.templates.refine(problem, self.mode, y_o, reference),
            [y_o_text, problem.reference_solution],
        )

    def _fit(
        self, problem: Problem, fill: Callable[..., str], parts: Sequence[str | None]
    ) -> tuple[tuple[int, ...], int]:
        """Fill a template with `parts`, cutting the middle of the first, then of the next, until it fits."""
        ids = self._encode(fill(*parts))
        budget = self.max_refine_prompt_tokens
        if len(ids) <= budget:
            return ids, 0
        tokens = [self.tokenizer(part or "", add_special_tokens=False)["input_ids"] for part in parts]
        cuts = [0] * len(parts)
        while len(ids) > budget:
            whole = [i for i, part in enumerate(tokens) if cuts[i] < len(part)]
            if not whole:
                raise ValueError(
                    f"--max-refine-prompt-tokens {budget}: problem {problem.id} needs {len(ids)} tokens even with "
                    "everything else cut; raise the budget"
                )
            i = whole[0]
            cuts[i] = min(len(tokens[i]), cuts[i] + len(ids) - budget)
            shortened = [
                self._without_middle(part_ids, cut) if cut else part
                for part, part_ids, cut in zip(parts, tokens, cuts, strict=True)
            ]
            ids = self._encode(fill(*shortened))
        return ids, sum(cuts)

    def _without_middle(self, ids: Sequence[int], num_cut: int) -> str:
        num_head = (len(ids) - num_cut + 1) // 2
        head, tail = ids[:num_head], ids[num_head + num_cut :]
        return f"{self.tokenizer.decode(head)} [... {num_cut} tokens cut ...] {self.tokenizer.decode(tail)}"

    def _encode(self, message: str) -> tuple[int, ...]:
        if self.tokenizer.chat_template is None:
            return tuple(self.tokenizer(message)["input_ids"])
        return tuple(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                add_generation_prompt=True,
                enable_thinking=self.thinking,
                return_dict=False,
            )
        )
