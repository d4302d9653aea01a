"""How much of one statement is in another: by the word n-grams they have in common."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from megatron_trd.tasks.corpus import squeezed

NGRAM = 13
"""Words of an n-gram."""
MIN_SHARE = 0.5
"""Share of the shorter statement's n-grams from which on two statements count as one."""
_WORD = re.compile(r"[^\W\d_]+|\d+")


def words(statement: str) -> tuple[str, ...]:
    """Return the words and numbers of a statement in lower case, without punctuation and mark-up."""
    return tuple(_WORD.findall(statement.casefold()))


class StatementIndex:
    """Statements that others are compared with."""

    def __init__(self, statements: Iterable[tuple[str, str]]) -> None:
        """Index pairs of id and statement."""
        self._exact: dict[str, str] = {}
        self._holders: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
        self._sizes: dict[str, int] = {}
        for problem_id, statement in statements:
            self._exact.setdefault(squeezed(statement), problem_id)
            grams = set(_ngrams(words(statement)))
            self._sizes[problem_id] = len(grams)
            for gram in grams:
                self._holders[gram].add(problem_id)

    def nearest(self, statement: str) -> tuple[str, float] | None:
        """Return the id of the nearest statement and its likeness; None where that is below `MIN_SHARE`.

        The likeness is 1 for the same characters, white space aside, else the share of the n-grams of the statement
        that has fewer. Statements of fewer than `NGRAM` words have none.
        """
        if same := self._exact.get(squeezed(statement)):
            return same, 1.0
        grams = set(_ngrams(words(statement)))
        counts = Counter(holder for gram in grams for holder in self._holders.get(gram, ()))
        shares = {holder: count / min(len(grams), self._sizes[holder]) for holder, count in counts.items()}
        best = max(shares, key=lambda holder: shares[holder], default=None)
        return None if best is None or shares[best] < MIN_SHARE else (best, shares[best])


def _ngrams(tokens: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1))
