"""One spelling for what LaTeX and plain text spell in many ways. The meaning of the text stays as it is."""

from __future__ import annotations

import re

from megatron_trd.tasks.math_problems.brackets import closing_braces

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–‐", "-"),
        **dict.fromkeys("$\n\t~\u00a0\u2009\u202f", " "),
        **{"，": ",", "；": ";", "（": "(", "）": ")", "％": "%", "｛": r"\{", "｝": r"\}"},
        **{"×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt "},
        **{"°": r"^\circ ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "},
        **{"≈": r"\approx ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "θ": r"\theta ", "²": "^2", "³": "^3"},
    }
)

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![a-zA-Z])\s*", ""),
        (r"(?<!\\)\\[()\[\]]", " "),
        (r"\\([{}])\s*", r"\\\1"),
        (r"(?<=\d)(?:,?\\!|\{,\}|\\,|\\;|\\:)\s*(?=\d{3}(?!\d))", ""),  # thousands
        (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-zA-Z])|\\hspace\{[^{}]*\}", " "),
        (r"\\(?:mbox|text(?:rm|bf|it|normal|sf|tt)?|emph)\s*\{", r"\\text{"),
        (r"(?<=[\d}])\s*\\mathrm\s*\{\s*([mgshlL])\s*\}", r"\\text{\1}"),
        (r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bm)\s*\{\s*([^{}\\]{2,}?)\s*\}", r"\\text{\1}"),
        (r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bm)\s*\{([^{}]*)\}", r"\1"),
        (r"\\text\{\s*,?\s*(?:and|or)\s*\}", ","),
        (r"(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ","),
        (r"(?:,\s*){2,}", ", "),
        (r"\\text\{\s*\}", ""),
        (r"\\(?:d|t|c)(frac|binom)(?![a-zA-Z])", r"\\\1"),
        (r"\\(?:leq(?:slant)?|le)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:geq(?:slant)?|ge)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq?(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:times|ast)(?![a-zA-Z])", r"\\cdot "),
        (r"\\(?:[lr]?vert)(?![a-zA-Z])", "|"),
        (r"\\([lr])brace(?![a-zA-Z])", lambda match: r"\{" if match[1] == "l" else r"\}"),
        (r"\\([lr])brack(?![a-zA-Z])", lambda match: "[" if match[1] == "l" else "]"),
        (r"\\varnothing|\\empty(?![a-zA-Z])", r"\\emptyset"),
        (r"\^\s*\{\s*\\circ\s*\}|\\degree(?![a-zA-Z])|\^\s*\\circ(?![a-zA-Z])", r"^\\circ "),
        (r"\\%|(?<!\\)%|\\text\{\s*(?:percent|%|\\%)\s*\}|(?<=[\d ])percent\b", r"\\%"),
        (r"(?<![\\a-zA-Z])(sqrt|pi|infty|sin|cos|tan|cot|sec|csc|ln|log|exp)(?![a-zA-Z])", r"\\\1"),
        (r"(?<![\\a-zA-Z])(?:infinity|inf)(?![a-zA-Z])", r"\\infty"),
        (r"\\log(?!\s*_)(?![a-zA-Z])", r"\\ln"),  # a logarithm without base is natural
        (r"\*\*(?=\s*[\d({a-zA-Z])(?<=[\w)}]\*\*)", "^"),
        (r"\*\*|(?<!\\)\\\\$", " "),
        (r"\*", r"\\cdot "),
        (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda match: match[0].replace(" ", "")),
        (r"\s+", " "),
    )
]
_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, "^": 1}
_COMMAND = re.compile(r"\\(?:frac|binom|sqrt)(?![a-zA-Z])|\^(?!\s*\\circ)")
_ARGUMENT = re.compile(r"\\[a-zA-Z]+|-?\d+|.", re.DOTALL)
_ROOT_DEGREE = re.compile(r"\s*\[[^\[\]{}]*\]")
_PLAIN_FRACTION = re.compile(r"(?<![\w.^}!)/])(\d+)\s*/\s*(\d+)(?![\d.!/]|\s*\^)")


def normalise(answer: str) -> str:
    r"""Return `answer` in one spelling: `\frac{1}{2}` for `\dfrac12` and `1/2`, `10080` for `10,\!080`, and so on.

    Commas stay, but for those that LaTeX marks as part of a number: whether `1,234` is a number depends on where
    it stands. `\log` without a base becomes `\ln`.
    """
    text = answer.replace(r"\$", r"\text{USD}").translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _PLAIN_FRACTION.sub(r"\\frac{\1}{\2}", _brace_arguments(text))
    text = text.strip().rstrip(".,;: ")
    while text.startswith("{") and closing_braces(text).get(0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _brace_arguments(text: str) -> str:
    r"""Put every argument of `\frac`, `\binom`, `\sqrt` and `^` into braces: `\frac\pi2`, `\sqrt(3)`, `2^10`."""
    out, position = [], 0
    closing = closing_braces(text)
    while match := _COMMAND.search(text, position):
        command = match[0]
        out += [text[position : match.start()], command]
        position = match.end()
        if command == r"\sqrt" and (degree := _ROOT_DEGREE.match(text, position)):
            out.append(degree[0].strip())
            position = degree.end()
        for _ in range(_ARGUMENTS[command]):
            argument, position = _read_argument(text, position, closing, digits=command == "^")
            out.append("{" + _brace_arguments(argument) + "}" if argument else "")
    return "".join(out) + text[position:]


def _read_argument(text: str, start: int, closing: dict[int, int], *, digits: bool) -> tuple[str, int]:
    while start < len(text) and text[start] == " ":
        start += 1
    if start in closing:
        return text[start + 1 : closing[start]].strip(), closing[start] + 1
    if text.startswith("(", start):
        depth = 0
        for end in range(start, len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + 1 : end], end + 1
    match = _ARGUMENT.match(text, start)
    if match is None:
        return "", start
    if text.startswith(r"\sqrt", start) or text.startswith(r"\frac", start):  # \frac\sqrt{3}2: rare, one level
        end = closing.get(match.end(), match.end() - 1) + 1
        return text[start:end], end
    if not digits and match[0].lstrip("-").isdigit():
        return text[start], start + 1
    return match[0], match.end()
