"""What an iteration's trajectories came to, as metrics; what has no data has no entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron_trd.records import Completion, Outcome, Trajectory, Verdict

REPORTED: tuple[Outcome, ...] = ("truncated", "no_answer", "grader_error")


def summarize(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return rates, lengths and the 2x2 outcomes of an iteration."""
    means = _Means()
    for stage in ("y_o", "y_r"):
        pairs = [(t.y_o, t.y_o_verdict) if stage == "y_o" else (t.y_r, t.y_r_verdict) for t in trajectories]
        _summarize_stage(means, stage, [(c, verdict) for c, verdict in pairs if c is not None])
    means.add("refine_cut", (t.refine_cut_tokens > 0 for t in trajectories if t.refine_prompt_ids))
    means.add("vanilla_cut", (t.vanilla_cut_tokens > 0 for t in trajectories))
    _summarize_selection(means, trajectories)
    _summarize_kept(means, trajectories)
    blocks = [(t.y_r_reasoning, t.y_r) for t in trajectories if t.y_r_reasoning is not None and t.y_r is not None]
    means.add("y_r_reasoning_tokens", (block.num_tokens for block, _ in blocks))
    means.add("y_r_reasoning_unclosed", (block.num_tokens == len(y_r.token_ids) for block, y_r in blocks))
    counts = {"trajectories": float(len(trajectories)), **_outcome_table(trajectories)}
    return {f"rollout/{tag}": value for tag, value in (counts | means).items()}


class _Means(dict[str, float]):
    def add(self, tag: str, values: Iterable[float]) -> None:
        listed = [float(value) for value in values]
        if listed:
            self[tag] = sum(listed) / len(listed)


def _summarize_stage(means: _Means, stage: str, graded: Sequence[tuple[Completion, Verdict | None]]) -> None:
    verdicts = [verdict for _, verdict in graded if verdict is not None]
    means.add(f"{stage}_pass", (verdict.correct for verdict in verdicts if verdict.passed is not None))
    for outcome in REPORTED:
        means.add(f"{stage}_verdict_{outcome}", (verdict.outcome == outcome for verdict in verdicts))
    means.add(f"{stage}_truncated", (completion.finish_reason == "length" for completion, _ in graded))
    means.add(f"{stage}_failed", (completion.finish_reason == "abort" for completion, _ in graded))
    whole = [(len(c.token_ids), verdict) for c, verdict in graded if c.finish_reason != "abort"]
    means.add(f"{stage}_tokens", (length for length, _ in whole))
    for passed, name in ((True, "correct"), (False, "incorrect")):
        means.add(
            f"{stage}_tokens_{name}", (length for length, verdict in whole if verdict and verdict.passed is passed)
        )


def _outcome_table(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    names = {True: "pass", False: "fail"}
    both = [(t.y_o_correct, t.y_r_correct) for t in trajectories if None not in (t.y_o_correct, t.y_r_correct)]
    if not both:
        return {}
    return {f"{names[was]}_{names[became]}": float(both.count((was, became))) for was in names for became in names}


def _summarize_selection(means: _Means, trajectories: Sequence[Trajectory]) -> None:
    """Compare y_r with the first refinement, which it would be without a choice."""
    chosen_of = [(t.selection, t.y_r_verdict) for t in trajectories if t.selection is not None]
    firsts = [verdict if s.chosen == 0 else s.rejected[0].verdict for s, verdict in chosen_of]
    means.add("select_not_first", (s.chosen > 0 for s, _ in chosen_of))
    means.add("select_first_pass", (verdict.correct for verdict in firsts if verdict and verdict.passed is not None))
    means.add(
        "select_gained",
        (
            chosen.correct and not first.correct
            for first, (_, chosen) in zip(firsts, chosen_of, strict=True)
            if first is not None and chosen is not None
        ),
    )
    means.add("select_none_verified", (s.reason == "none_verified" for s, _ in chosen_of if s.reason != "first"))


def _summarize_kept(means: _Means, trajectories: Sequence[Trajectory]) -> None:
    kept = [(t.kept, len(t.y_o.token_ids)) for t in trajectories if t.kept is not None]
    means.add("kept_tokens", (prefix.num_tokens for prefix, _ in kept))
    means.add("kept_share", (prefix.num_tokens / length for prefix, length in kept if length))
    means.add("kept_continuations", (sum(len(probe.verdicts) for probe in prefix.probes) for prefix, _ in kept))
    verdicts = [verdict for prefix, _ in kept for probe in prefix.probes for verdict in probe.verdicts]
    means.add("kept_continuations_ungraded", (verdict is None or verdict.passed is None for verdict in verdicts))


def verdicts_of(trajectories: Iterable[Trajectory]) -> Iterator[tuple[str, Verdict | None]]:
    """Yield every verdict that was asked for, with the problem's id: on y_o, on each refinement and continuation."""
    for t in trajectories:
        rejected = t.selection.rejected if t.selection is not None else ()
        probes = t.kept.probes if t.kept is not None else ()
        yield from ((t.problem.id, verdict) for verdict in (t.y_o_verdict, t.y_r_verdict))
        yield from ((t.problem.id, candidate.verdict) for candidate in rejected)
        yield from ((t.problem.id, verdict) for probe in probes for verdict in probe.verdicts)
