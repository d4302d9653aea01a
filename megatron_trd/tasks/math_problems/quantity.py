"""Numbers as exact fractions, with what is written around them: unit, percent sign, number base, "about"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SIGNED = rf"\s*[+-]?\s*{_DIGITS}\s*"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)?\s*\\frac\{{(?P<top>{_SIGNED})\}}\{{(?P<bottom>{_SIGNED})\}}"
    rf"|(?P<decimal>{_DIGITS})(?:\\overline\{{(?P<repeating>\d+)\}})?"
    rf"(?:\s*\\cdot\s*10\s*\^\{{(?P<power>\s*-?\d{{1,3}})\s*\}})?)"
)
_BASED = re.compile(r"(-?[0-9A-Z]+)\s*_\s*\{?\s*(\d+)\s*\}?")

_UNIT_OF_WORD = {
    word: unit
    for unit, words in {
        **{
            "mm": "millimeter millimetre",
            "cm": "centimeter centimetre",
            "m": "meter metre",
            "km": "kilometer kilometre",
        },
        **{"in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "mph": "", "kmph": "", "acre": ""},
        **{"s": "sec second", "min": "minute", "h": "hr hour", "day": "", "week": "", "month": "", "year": "yr"},
        **{"mg": "", "g": "gram", "kg": "kilogram", "lb": "pound", "oz": "ounce", "l": "liter litre", "ml": ""},
        **{"USD": "dollar usd", "cent": "", "euro": "", "degree": "deg", "radian": "rad", "gallon": ""},
    }.items()
    for word in (unit, *words.split())
}
_WORDS_AROUND = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_TEXT_UNIT = re.compile(r"(?P<bare>.*\S)\s*\\text\{(?P<unit>[^{}]*)\}\s*(?:\^\{(?P<power>\d)\})?")
_WORD_UNIT = re.compile(
    r"(?P<bare>.*[\d}) ])(?<![\\a-zA-Z])(?P<unit>(?:[a-z]+\.? )*?[a-z]{2,}\.?)\s*(?:\^\{(?P<power>\d)\})?"
)
_NUMERIC_END = re.compile(r"[\w})]$")
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_NO_UNIT = re.compile(r",|\b(?:more|less|least|most|not|than|mod|if|where|when)\b")
_CLOCK = re.compile(r"\s*[ap]\.?\s?m\.?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """What an answer says beside its bare value."""

    bare: str
    """The text without unit, percent sign and "about"."""
    unit: str = ""
    r"""`cm^2`, `USD`, `degree`, ...; `%`; `?` for a word that is no known unit; empty for none."""
    approximate: bool = False
    r"""The text began with `\approx`."""


def read_quantity(text: str) -> Quantity:
    r"""Take unit, percent sign and a leading `\approx` off a normalised answer without commas."""
    approximate = text.startswith(r"\approx")
    text = text.removeprefix(r"\approx").strip()
    if text.startswith(r"\text{USD}"):
        return Quantity(bare=text.removeprefix(r"\text{USD}").strip(), unit="USD", approximate=approximate)
    for sign in (r"\%", r"^\circ"):
        if text.endswith(sign) and len(text) > len(sign) and not _ANGLE_FUNCTION.search(text):
            unit = "%" if sign == r"\%" else "degree"
            return Quantity(bare=text.removesuffix(sign).strip(), unit=unit, approximate=approximate)
    match = _TEXT_UNIT.fullmatch(text) or _WORD_UNIT.fullmatch(text)
    if (
        match is None
        or _CLOCK.fullmatch(match["unit"])
        or _NO_UNIT.search(match["unit"])
        or not _NUMERIC_END.search(match["bare"].rstrip())
    ):
        return Quantity(bare=text, approximate=approximate)
    bare, known = match["bare"].strip(), _known_unit(match["unit"], match["power"])
    if match.re is _WORD_UNIT and known == "?" and exact_value(bare) is None:
        return Quantity(bare=text, approximate=approximate)  # letters after a formula are factors
    return Quantity(bare=bare, unit=known, approximate=approximate)


def _known_unit(words: str, power: str | None) -> str:
    exponent, names = f"^{power}" if power else "", []
    for word in words.replace(".", " ").split():
        if word.lower() in _WORDS_AROUND:
            exponent = _WORDS_AROUND[word.lower()]
        else:
            names.append(word if word in _UNIT_OF_WORD else word.lower())
    if len(names) != 1 or names[0] in ("unit", "units"):
        return "?"
    unit = _UNIT_OF_WORD.get(names[0]) or _UNIT_OF_WORD.get(names[0].removesuffix("s"))
    return unit + exponent if unit else "?"


def exact_value(bare: str) -> Fraction | None:
    r"""Return the rational that a bare number spells: `-073`, `.5`, `\frac{1}{2}`, `3\frac{1}{2}`, `6.2\cdot 10^{3}`,
    `0.\overline{3}`. None for everything else, `\frac{1}{0}` too."""
    text = bare
    while text.startswith("(") and text.endswith(")") and "(" not in text[1:]:
        text = text[1:-1].strip()
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if match["top"] is not None:
        top, bottom = (Fraction("".join(match[name].split())) for name in ("top", "bottom"))
        return sign * (int(match["whole"] or 0) + top / bottom) if bottom else None
    value = Fraction(match["decimal"])
    if repeating := match["repeating"]:
        places = len(match["decimal"].partition(".")[2])
        value += Fraction(int(repeating), (10 ** len(repeating) - 1) * 10**places)
    return sign * value * Fraction(10) ** int(match["power"] or 0)


def equal_quantities(gold: Quantity, answer: Quantity) -> bool | None:
    """Compare two numbers exactly; None when one of them is no rational number.

    A decimal is the number that it spells: 0.333333 is not 1/3. Only a gold that says "about" allows half a unit
    of its last place. Units that are known and differ make a difference; a missing unit does not.
    """
    if (based := _equal_in_base(gold.bare, answer.bare)) is not None:
        return based
    gold_value, value = exact_value(gold.bare), exact_value(answer.bare)
    if gold_value is None or value is None:
        return None
    if units_differ(gold.unit, answer.unit):
        return False
    if (gold.unit == "%") != (answer.unit == "%"):
        return _equal_percent(gold_value, value, of_gold=gold.unit == "%")
    places = len(gold.bare.partition(".")[2])
    tolerance = Fraction(1, 2 * 10**places) if gold.approximate else 0
    return abs(gold_value - value) <= tolerance


def units_differ(gold: str, answer: str) -> bool:
    """Return whether both units are known and not the same."""
    return gold != answer and not {gold, answer} & {"", "?"}


def _equal_percent(gold: Fraction, answer: Fraction, *, of_gold: bool) -> bool:
    if of_gold:  # 62.5% is 62.5, of a question "what percent", and 0.625
        return answer in (gold, gold / 100)
    return gold == answer / 100 or (gold == answer and abs(gold) > 1)  # a share below 1 is no percentage


def _equal_in_base(gold: str, answer: str) -> bool | None:
    golds, answers = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if golds and answers:
        return (golds[1].lstrip("0"), int(golds[2])) == (answers[1].lstrip("0"), int(answers[2]))
    if golds and answer.lstrip("-").isalnum():
        return golds[1] == answer
    if answers and (value := exact_value(gold)) is not None:
        base = int(answers[2])
        fits = 2 <= base <= 36 and all(int(digit, 36) < base for digit in answers[1].lstrip("-"))
        return fits and value == int(answers[1], base)
    return None
