"""From a problem to token ids: the one place where prompts are made, for sampling and for the loss alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_trd.config.schema import Config
from megatron_trd.log import get_logger
from megatron_trd.records import Problem
from megatron_trd.tasks.base import Task
from megatron_trd.tasks.prompts import Mode, PromptTemplates

logger = get_logger(__name__)


class Renderer:
    """Fills a task's templates and puts them through the tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: PromptTemplates,
        *,
        mode: Mode,
        thinking: bool,
        refiner_thinking: bool,
        max_prompt_tokens: int,
        max_refine_prompt_tokens: int,
    ) -> None:
        """Remember the parts; the flags of the same names explain them."""
        self.tokenizer, self.templates, self.mode = tokenizer, templates, mode
        self.thinking, self.refiner_thinking = thinking, refiner_thinking
        self.max_prompt_tokens, self.max_refine_prompt_tokens = max_prompt_tokens, max_refine_prompt_tokens

    @classmethod
    def from_config(cls, config: Config, task: Task, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """Make the renderer of a run."""
        thinking, refiner_thinking = config.rollout.thinking, config.rollout.refiner_thinking
        if (thinking or refiner_thinking) and "enable_thinking" not in (tokenizer.chat_template or ""):
            logger.warning("--thinking: the chat template has no such switch, and writes its prompts as it always does")
        return cls(
            tokenizer,
            PromptTemplates.load(Path(config.data.prompt_dir or task.template_dir)),
            mode=config.method.mode,
            thinking=thinking,
            refiner_thinking=thinking if refiner_thinking is None else refiner_thinking,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_refine_prompt_tokens=config.rollout.max_refine_prompt_tokens,
        )

    def solve(self, problem: Problem) -> tuple[int, ...]:
        """Return the plain prompt x. Raises ValueError if it is over budget: x is never cut."""
        ids = self._encode(self.templates.solve(problem), self.thinking)
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"--max-prompt-tokens {self.max_prompt_tokens}: the prompt of problem {problem.id} has {len(ids)} "
                "tokens; raise the budget or leave the problem out"
            )
        return ids

    def vanilla(self, problem: Problem) -> tuple[tuple[int, ...], int]:
        """Return the teacher's context along y_o, and the number of tokens cut from it: x in OPD; x and y* in OPSD.

        It ends as the solve prompt does, thinking or not, because y_o was sampled behind that.
        """
        if self.mode == "opd":
            return self.solve(problem), 0
        return self._fit(
            problem,
            lambda reference: self.templates.vanilla(replace(problem, reference_solution=reference), self.mode),
            [problem.reference_solution],
            self.thinking,
        )

    def refine(self, problem: Problem, y_o_text: str) -> tuple[tuple[int, ...], int]:
        """Return the refinement prompt and the number of tokens cut from y_o (then y*) to keep it in budget."""
        if self.mode == "opd":
            return self._fit(
                problem,
                lambda y_o: self.templates.refine(problem, self.mode, y_o),
                [y_o_text],
                self.refiner_thinking,
            )
        return self._fit(
            problem,
            lambda y_o, reference: self.templates.refine(problem, self.mode, y_o, reference),
            [y_o_text, problem.reference_solution],
            self.refiner_thinking,
        )

    def _fit(
        self, problem: Problem, fill: Callable[..., str], parts: Sequence[str | None], thinking: bool
    ) -> tuple[tuple[int, ...], int]:
        """Fill a template with `parts`, cutting the middle of the first, then of the next, until it fits."""
        ids = self._encode(fill(*parts), thinking)
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
            ids = self._encode(fill(*shortened), thinking)
        return ids, sum(cuts)

    def _without_middle(self, ids: Sequence[int], num_cut: int) -> str:
        num_head = (len(ids) - num_cut + 1) // 2
        head, tail = ids[:num_head], ids[num_head + num_cut :]
        return f"{self.tokenizer.decode(head)} [... {num_cut} tokens cut ...] {self.tokenizer.decode(tail)}"

    def _encode(self, message: str, thinking: bool) -> tuple[int, ...]:
        if self.tokenizer.chat_template is None:
            return tuple(self.tokenizer(message)["input_ids"])
        return tuple(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                add_generation_prompt=True,
                enable_thinking=thinking,
                return_dict=False,
            )
        )
