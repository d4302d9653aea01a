"""What a check is: a function of a `Context` that returns `Rows`, each a number with its limit."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_PRINTED_KEY = 220  # the whole of it is in the JSON


class Skipped(Exception):
    """A check that makes no sense here; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number."""

    what: str
    value: float
    limit: float
    binding: bool = True
    """Whether missing the limit fails the check, or is only reported."""
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the value keeps the limit; NaN never does."""
        return self.value <= self.limit

    @property
    def use(self) -> float:
        """Share of the limit that is used up."""
        if math.isnan(self.value):
            return math.inf
        return self.value / self.limit if self.limit > 0 else (0.0 if self.value <= 0 else math.inf)

    def __str__(self) -> str:
        sign = "<=" if self.met else ">"
        return f"{self.what}: {self.value:.3g} {sign} {self.limit:.3g}" + (f" ({self.note})" if self.note else "")


class Rows(list[Row]):
    """The table of one check."""

    def at_most(self, what: str, value: float | Tensor, limit: float, *, binding: bool = True, note: str = "") -> None:
        """Add a number that may not exceed `limit`."""
        self.append(Row(what, float(value), float(limit), binding, note))

    def equal(self, what: str, got: Tensor, want: Tensor) -> None:
        """Add the number of entries in which two tensors differ; none may (NaN equals NaN)."""
        if got.shape != want.shape:
            self.at_most(what, math.inf, 0.0, note=f"shapes {tuple(got.shape)} and {tuple(want.shape)}")
            return
        same = (got == want) | ((got != got) & (want != want))
        self.at_most(what, (~same).sum(), 0.0, note="entries that differ")

    @contextmanager
    def attempting(self, what: str) -> Iterator[None]:
        """Turn an exception into a row that fails, so that the rest of the check still runs."""
        try:
            yield
        except Exception as e:
            traceback.print_exc()
            self.at_most(what, math.nan, 0.0, note=f"{type(e).__name__}: {str(e).strip()[:300]}")

    def worst(self, binding: bool = True) -> Row | None:
        """Return the row that uses most of its limit."""
        return max((r for r in self if r.binding or not binding), key=lambda r: r.use, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a check runs on and with."""

    operator: Callable[..., Any]
    """`linear_kl_div`, or a wrong one that the checks must catch."""
    device: torch.device
    full: bool
    """Real sizes, or toy ones."""
    backends: tuple[str, ...]
    deadline: float = math.inf
    """On the clock of `time.monotonic`."""

    def pick(self, full: T, small: T) -> T:
        """Choose by scale."""
        return full if self.full else small

    def seconds_left(self) -> float:
        """Return the time until the deadline."""
        return self.deadline - time.monotonic()

    def need_cuda(self) -> None:
        """Leave a check that only means something on a GPU."""
        if self.device.type != "cuda":
            raise Skipped("needs CUDA")


Check = Callable[[Context], Rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a check ended."""

    name: str
    verdict: str
    """`ok`, `failed`, `skipped` or `not run`."""
    seconds: float = 0.0
    key: str = ""
    """The number that says most, or the reason."""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        key = " ".join(self.key.split())
        return f"{self.name:<26}{self.seconds:>7.1f} s  {self.verdict:<8} {key[:_PRINTED_KEY]}"

    @property
    def good(self) -> bool:
        """Whether it leaves the run a success."""
        return self.verdict in ("ok", "skipped")


def run_check(name: str, check: Check, context: Context) -> Outcome:
    """Run one check and judge it; an exception is a failure, a passed deadline too."""
    if context.seconds_left() <= 0:
        return Outcome(name=name, verdict="not run", key="out of time")
    start = time.monotonic()

    def ended(verdict: str, key: str, rows: Rows | None = None) -> Outcome:
        table = [asdict(row) | {"met": row.met} for row in rows or ()]
        return Outcome(name=name, verdict=verdict, seconds=time.monotonic() - start, key=key, rows=table)

    try:
        rows = check(context)
    except Skipped as reason:
        return ended("skipped", str(reason))
    except Exception as e:
        traceback.print_exc()
        return ended("failed", f"{type(e).__name__}: {str(e).strip()[:300]}")
    finally:
        gc.collect()
        if context.device.type == "cuda" and device_works():
            torch.cuda.empty_cache()
    failed = [row for row in rows if row.binding and not row.met]
    if failed or not rows:
        return ended("failed", "; ".join(map(str, failed[:4])) or "checked nothing", rows)
    return ended("ok", f"{rows.worst()} [{len(rows)}]", rows)


def device_works() -> bool:
    """Tell whether the GPU still answers: after a bad memory access no call of this process ever will."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
