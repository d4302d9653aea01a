"""Random samples whose lengths follow given distributions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megatron_trd.config.schema import Config
from megatron_trd.records import Sample

FORMS = "fixed:N, uniform:A:B or lognormal:MEDIAN:SIGMA"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Of a number of tokens."""

    kind: str
    """`fixed`, `uniform` or `lognormal`."""
    parameters: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, where: str) -> Distribution:
        """Read `fixed:N`, `uniform:A:B` or `lognormal:MEDIAN:SIGMA`.

        Raises:
            ValueError: it is none of them; the message begins with `where`.
        """
        kind, *rest = text.split(":")
        try:
            numbers = tuple(float(number) for number in rest)
        except ValueError:
            numbers = ()
        valid = {
            "fixed": len(numbers) == 1 and numbers[0] >= 1,
            "uniform": len(numbers) == 2 and 1 <= numbers[0] <= numbers[1],
            "lognormal": len(numbers) == 2 and numbers[0] >= 1 and numbers[1] >= 0,
        }
        if not valid.get(kind, False) or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{where} {text}: give {FORMS}, of one token or more")
        return cls(kind=kind, parameters=numbers)

    def draw(self, rng: random.Random) -> int:
        """Return a number of tokens, at least one."""
        if self.kind == "fixed":
            return int(self.parameters[0])
        first, second = self.parameters
        if self.kind == "uniform":
            return rng.randint(int(first), int(second))
        return max(1, round(rng.lognormvariate(math.log(first), second)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthMix:
    """Lengths of one problem's texts, in tokens."""

    prompt: Distribution
    y_o: Distribution
    y_r: Distribution
    reference: Distribution
    """y*, which the teacher of OPSD sees."""

    @classmethod
    def parse(cls, given: Sequence[str]) -> LengthMix:
        """Read `name=distribution` for any of the four; the others keep their default.

        Raises:
            ValueError: an unknown name or no distribution.
        """
        mix = DEFAULT_MIX
        for item in given:
            name, _, text = item.partition("=")
            if name not in _NAMES:
                raise ValueError(f"--lengths {item}: give NAME=DISTRIBUTION with NAME one of {', '.join(_NAMES)}")
            mix = replace(mix, **{name: Distribution.parse(text, f"--lengths {name}")})
        return mix


_NAMES = tuple(field.name for field in fields(LengthMix))
DEFAULT_TEXTS = ("prompt=lognormal:150:0.4", "y_o=lognormal:600:0.7", "y_r=lognormal:400:0.5", "reference=fixed:300")
DEFAULT_MIX = LengthMix(
    **{name: Distribution.parse(text, "--lengths") for name, text in (item.split("=") for item in DEFAULT_TEXTS)}
)


def draw_samples(config: Config, mix: LengthMix, number: int, vocab_size: int, seed: str) -> list[Sample]:
    """Draw samples as the method makes them: who sees what follows the flags, and every text is cut at its limit."""
    rng = random.Random(seed)
    limits, method = config.rollout, config.method

    def text(lengths: Distribution, limit: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(vocab_size), k=min(lengths.draw(rng), limit)))

    samples = []
    for i in range(number):
        prompt = text(mix.prompt, limits.max_prompt_tokens)
        y_o, y_r = (text(lengths, limits.max_response_tokens) for lengths in (mix.y_o, mix.y_r))
        reference = text(mix.reference, limits.max_response_tokens) if method.mode == "opsd" else ()
        if method.trajectory == "y_r":
            response, context = y_r, (*prompt, *reference, *y_o)[: limits.max_refine_prompt_tokens]
        else:
            response, context = y_o, (*prompt, *reference)
        samples.append(
            Sample(
                problem_id=str(i),
                student_prompt_ids=prompt,
                teacher_prompt_ids=context,
                response_ids=response,
                y_o_correct=rng.random() < 0.5,
            )
        )
    return samples
