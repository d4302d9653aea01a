"""The toy task from files: `python chain_corpus.py` is megatron_trd.evaluate that knows it as the task `chain`."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_trd import evaluate
from megatron_trd.records import FinishReason, Problem, Verdict
from megatron_trd.tasks import TASKS
from megatron_trd.tasks.arithmetic import ArithmeticTask
from megatron_trd.tasks.corpus import CorpusTask, Row

TOY = ArithmeticTask()


class ChainTask(CorpusTask):
    """Problems of the toy task in a file, which the shipped tiny models can solve."""

    name = "chain"
    template_dir = ArithmeticTask.template_dir

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        return TOY.grade(problem, response, finish_reason)


def write_chains(directory: Path, **sizes: int) -> Path:
    """Write benchmarks of the given sizes, all of different problems."""
    directory.mkdir(exist_ok=True)
    problems = iter(TOY.eval_problems(sum(sizes.values())))
    for name, size in sizes.items():
        lines = [json.dumps(Row(task="chain", problem=next(problems)).as_json()) + "\n" for _ in range(size)]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory


if __name__ == "__main__":
    evaluate.main(tasks={**TASKS, "chain": ChainTask})
