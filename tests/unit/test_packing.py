"""Alignment, balance and weights of packed batches against brute force."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from megatron_trd.config.schema import ParallelConfig
from megatron_trd.data.packing import Multiples, counts, lay_out, pack, pack_in_order
from megatron_trd.records import Sample
from tiny_models import make_samples


def test_each_response_token_is_predicted_by_the_position_before_it() -> None:
    input_ids, positions = lay_out([7, 8, 9], [1, 2, 3, 4])
    whole = [7, 8, 9, 1, 2, 3, 4]
    assert input_ids == whole[:-1]
    assert [whole[p + 1] for p in positions] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="prompt and a response"):
        lay_out([1], [])


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize(
    ("dp_size", "max_tokens", "num_steps", "multiple"), [(1, 1000, 1, 1), (2, 40, 2, 4), (3, 25, 1, 2)]
)
def test_every_token_lands_once_with_its_weight(normalization, dp_size, max_tokens, num_steps, multiple) -> None:
    samples = make_samples(9)
    steps = pack(
        samples,
        num_steps=num_steps,
        dp_size=dp_size,
        max_tokens=max_tokens,
        multiples=Multiples(stream=multiple),
        normalization=normalization,
    )
    assert len(steps) == num_steps
    found = []
    for step in steps:
        assert len(step) == dp_size and len({len(rank) for rank in step}) == 1, "ranks differ in micro-batches"
        batches = [m for rank in step for m in rank]
        in_step = sum(m.num_sequences for m in batches)
        tokens_in_step = sum(m.response_ids.numel() for m in batches)
        assert sum(m.token_weight.double().sum().item() for m in batches) == pytest.approx(1.0, abs=1e-6)
        for m in batches:
            assert (
                m.num_sequences <= 1 or max(s.input_ids.numel() for s in (m.student, m.teacher)) < max_tokens + multiple
            )
            for stream in (m.student, m.teacher):
                assert stream.input_ids.numel() % multiple == 0 and stream.cu_seqlens[-1] == stream.input_ids.numel()
                assert stream.max_seqlen == (stream.cu_seqlens[1:] - stream.cu_seqlens[:-1]).max()
            found += list(unpack(m))
        for m in batches:
            for sample, weights in unpack(m):
                in_sequence = Fraction(1, in_step * len(sample.response_ids))
                want = float(in_sequence if normalization == "sequence" else Fraction(1, tokens_in_step))
                torch.testing.assert_close(weights, torch.full_like(weights, want))
    key = lambda s: (s.student_prompt_ids, s.teacher_prompt_ids, s.response_ids)  # noqa: E731
    assert sorted(key(s) for s, _ in found) == sorted(key(s) for s in samples)
    assert counts(steps) == {
        "train/sequences": len(samples),
        "train/response_tokens": sum(len(s.response_ids) for s in samples),
    }


def unpack(batch):
    """Recover the samples from the two streams alone: what a model would be fed."""
    start = 0
    for n in range(batch.num_sequences):
        (s0, s1), (t0, t1) = (stream.cu_seqlens[n : n + 2].tolist() for stream in (batch.student, batch.teacher))
        student, teacher = batch.student.input_ids[s0:s1].tolist(), batch.teacher.input_ids[t0:t1].tolist()
        positions = batch.student.response_positions
        length = int(((positions >= s0) & (positions < s1)).sum())
        response = batch.response_ids[start : start + length].tolist()
        for stream, ids, first in ((batch.student, student, s0), (batch.teacher, teacher, t0)):
            places = (stream.response_positions[start : start + length] - first).tolist()
            assert places == list(range(len(ids) - length, len(ids)))
            assert [ids[p + 1] for p in places[:-1]] == response[:-1]
        verdict = {1: True, 0: False, -1: None}[int(batch.y_o_correct[start])] if length else None
        cut = length - 1
        yield (
            Sample(
                problem_id="?",
                student_prompt_ids=tuple(student[: len(student) - cut]),
                teacher_prompt_ids=tuple(teacher[: len(teacher) - cut]),
                response_ids=tuple(response),
                y_o_correct=verdict,
            ),
            batch.token_weight[start : start + length],
        )
        start += length


def test_a_rank_without_sequences_still_gets_a_micro_batch() -> None:
    ((first, second),) = pack(
        make_samples(1), num_steps=3, dp_size=2, max_tokens=10, multiples=Multiples(stream=4), normalization="sequence"
    )
    assert first[0].num_sequences == 1 and second[0].num_sequences == 0
    assert second[0].response_ids.numel() == 0 and second[0].student.input_ids.numel() == 4


def test_load_is_balanced_over_ranks() -> None:
    (step,) = pack(
        make_samples(40), num_steps=1, dp_size=4, max_tokens=400, multiples=Multiples(), normalization="token"
    )
    loads = [sum(m.student.input_ids.numel() + m.teacher.input_ids.numel() for m in rank) for rank in step]
    assert max(loads) <= 1.1 * min(loads)


def test_order_is_kept_where_asked() -> None:
    samples = make_samples(5)
    batch = pack_in_order(samples, Multiples(stream=2))
    assert batch.response_ids.tolist() == [i for s in samples for i in s.response_ids]


def test_zero_usable_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="zero usable samples.*--on-bad-refinement"):
        pack([], num_steps=1, dp_size=1, max_tokens=1, multiples=Multiples(), normalization="token")


def test_multiples_of_a_grid() -> None:
    grid = ParallelConfig(
        tensor_model_parallel_size=4,
        sequence_parallel=True,
        context_parallel_size=2,
        pipeline_model_parallel_size=3,
        num_virtual_stages_per_pipeline_rank=2,
    )
    assert Multiples.of(grid) == Multiples(sequence=4, stream=16, micro_batches=3)
    assert Multiples.of(ParallelConfig(pipeline_model_parallel_size=3)) == Multiples()


def test_sequences_are_padded_behind_their_tokens_and_micro_batches_come_in_multiples() -> None:
    samples, multiples = make_samples(5), Multiples(sequence=4, stream=8, micro_batches=3)
    ((rank,),) = pack(samples, num_steps=1, dp_size=1, max_tokens=1000, multiples=multiples, normalization="sequence")
    assert len(rank) == 3
    responses = []
    for batch in rank:
        for stream, side in ((batch.student, "student"), (batch.teacher, "teacher")):
            lengths = stream.cu_seqlens.diff()
            assert (lengths % 4 == 0).all() and stream.input_ids.numel() % 8 == 0
            assert stream.cu_seqlens[-1] == stream.input_ids.numel() and stream.max_seqlen == lengths.max()
            predicted = stream.input_ids[stream.response_positions[1:]]
            first = batch.token_weight.numel()  # the position of a later token holds the token before it
            assert first == stream.response_positions.numel()
            follows = stream.response_positions.diff() == 1
            assert torch.equal(predicted[follows], batch.response_ids[:-1][follows]), side
        responses += batch.response_ids.tolist()
    assert sorted(responses) == sorted(i for s in samples for i in s.response_ids)
