"""Audited responses on disk: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from megatron_trd.objectives.token_audit import TokenAudit
from megatron_trd.records import Outcome

SCHEMA = 1
_PER_TOKEN = tuple(field.name for field in fields(TokenAudit))


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedResponse:
    """A response, and what the teacher says along it."""

    problem_id: str
    along: Literal["y_o", "y_r"]
    y_o_verdict: Outcome | None
    """None: it was not graded."""
    y_r_verdict: Outcome | None
    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...]
    tokens: TokenAudit
    turn: int | None
    """First token whose epistemic mass exceeds the threshold."""
    turn_threshold: float

    def as_json(self) -> dict[str, Any]:
        """Return the line's object, without what was not measured."""
        record = asdict(self)
        measured = {name: values for name, values in record.pop("tokens").items() if values is not None}
        measured["two_mode"] = self.tokens.two_mode
        return {"schema": SCHEMA, **record, **{name: _short(values) for name, values in measured.items()}}


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.7g}") for value in values]  # what fp32 knows, in half the bytes


def read_audit(path: str | Path) -> Iterator[AuditedResponse]:
    """Yield the responses of a file. Raises ValueError naming file and line."""
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if record.pop("schema") != SCHEMA:
                    raise ValueError(f"not of schema {SCHEMA}")
                record.pop("two_mode")  # follows from the rest
                measured: dict[str, Any] = {name: tuple(record.pop(name)) for name in _PER_TOKEN if name in record}
                texts: dict[str, Any] = {name: tuple(record.pop(name)) for name in ("token_ids", "token_texts")}
                yield AuditedResponse(**record, **texts, tokens=TokenAudit(**measured))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}:{number}: not an audited response ({error}); make it anew with megatron_trd.audit"
                ) from error
