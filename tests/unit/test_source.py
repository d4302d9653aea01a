from __future__ import annotations

from megatron_trd.config.schema import DataConfig
from megatron_trd.data.source import ProblemSource
from megatron_trd.tasks import TASKS


def test_batches_are_consecutive_and_a_restored_source_goes_on() -> None:
    task = TASKS["arithmetic"](DataConfig())
    source = ProblemSource(task, batch_size=3)
    first, second = source.draw(), source.draw()
    assert [*first, *second] == [task.train_problem(i) for i in range(6)]
    assert len({problem.id for problem in (*first, *second)}) == 6
    state = source.state_dict()
    third = source.draw()
    restored = ProblemSource(TASKS["arithmetic"](DataConfig()), batch_size=3)
    restored.load_state_dict(state)
    assert restored.draw() == third
    assert ProblemSource(task, batch_size=2, cursor=6).draw() == third[:2]
