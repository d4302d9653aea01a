"""Worker processes of the math verifier: deadlines, death, threads, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import psutil
import pytest

from megatron_trd.tasks.math_problems import Verdict, verify_answer
from megatron_trd.tasks.math_problems.pool import GraderError, MathWorkerPool

pytest.importorskip("math_verify", reason="math-verify is not installed")

RIGHT = (r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
ENDLESS = ("5^{5^{5^{5^5}}}", r"9^{9^{9}}!")
ENORMOUS = ("2^{2^{2^{2^{2^2}}}}", "2^2^2^2^2^2", "(10^7)!", r"\sum_{k=1}^{10^9} 1/k")
HARMLESS = ("{" * 3000 + "1" + "}" * 3000, "(" * 3000, "9" * 50_000, "1," * 900 + "2", r"\pm" * 400, r"\sqrt" * 300)
END_S = 30
ORPHAN = """
import sys
from megatron_trd.tasks.math_problems.pool import MathWorkerPool
pool = MathWorkerPool(num_workers=1, deadline_s=2)
pool.ask(rule="expressions", gold="1", answer="1")
print(pool.process_ids()[0], flush=True)
pool.ask(rule="expressions", gold="x", answer=sys.argv[1])
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[MathWorkerPool]:
    with MathWorkerPool(num_workers=2, deadline_s=2) as made:
        workers = [psutil.Process(pid) for pid in made.process_ids()]
        yield made
        workers += [psutil.Process(pid) for pid in made.process_ids()]
    assert made.process_ids() == [] and not any(worker.is_running() for worker in workers)


def _patiently(pool: MathWorkerPool) -> MathWorkerPool:
    """Give honest comparisons on a busy machine all the time they need."""
    pool.deadline_s = 60
    return pool


@pytest.mark.parametrize("answer", ENDLESS)
def test_an_endless_comparison_ends(answer: str, pool: MathWorkerPool) -> None:
    pool.deadline_s = 1
    verdict = verify_answer(rf"\boxed{{{answer}}}", r"\sqrt{2}", pool=pool)
    assert (verdict.outcome, verdict.correct, verdict.extracted) == ("grader_error", False, answer)
    assert len(pool.process_ids()) <= 2


@pytest.mark.parametrize("answer", ENORMOUS)
def test_an_enormous_number_is_not_the_answer(answer: str, pool: MathWorkerPool) -> None:
    """How long one takes depends on the versions of the libraries; that it ends does not."""
    pool.deadline_s = 2
    assert verify_answer(rf"\boxed{{{answer}}}", r"\sqrt{2}", pool=pool).outcome in ("wrong", "grader_error")
    assert verify_answer(*RIGHT, pool=_patiently(pool)).correct


@pytest.mark.parametrize("answer", HARMLESS)
def test_monstrous_text_is_wrong(answer: str, pool: MathWorkerPool) -> None:
    assert verify_answer(rf"\boxed{{{answer}}}", "204", pool=_patiently(pool)).outcome == "wrong"


def test_a_killed_worker_is_replaced(pool: MathWorkerPool) -> None:
    assert verify_answer(*RIGHT, pool=_patiently(pool)).correct
    dead = [psutil.Process(pid) for pid in pool.process_ids()]
    for process in dead:
        process.kill()
    assert verify_answer(*RIGHT, pool=pool).correct
    assert not set(pool.process_ids()) <= {process.pid for process in dead}


def test_two_hundred_at_once(pool: MathWorkerPool) -> None:
    cases = [(rf"\boxed{{\sqrt{{{8 * i * i}}}}}", rf"{2 * i + i % 2}\sqrt{{2}}", i % 2 == 0) for i in range(1, 201)]
    _patiently(pool)
    with ThreadPoolExecutor(50) as threads:
        verdicts = list(threads.map(lambda case: verify_answer(case[0], case[1], pool=pool), cases))
    assert [verdict.outcome for verdict in verdicts] == ["correct" if equal else "wrong" for *_, equal in cases]


def test_nothing_outlives_a_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN, ENDLESS[0]], stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        worker.wait(END_S)
    assert not worker.is_running()


def test_a_spawned_process_has_workers_of_its_own() -> None:
    others = psutil.Process().children(recursive=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        assert executor.submit(verify_answer, *RIGHT).result() == Verdict(outcome="correct", extracted=r"\sqrt{8}")
        started = set(psutil.Process().children(recursive=True)) - set(others)
        workers = [process for process in started if "math_problems.worker" in " ".join(process.cmdline())]
        assert workers
    assert psutil.wait_procs(workers, END_S)[1] == []


def test_a_closed_pool_says_so() -> None:
    pool = MathWorkerPool(num_workers=1)
    pool.close()
    pool.close()
    verdict = verify_answer(*RIGHT, pool=pool)
    assert (verdict.outcome, verdict.error) == ("grader_error", "the pool is closed")
    with pytest.raises(GraderError, match="closed"):
        pool.ask(rule="expressions", gold="1", answer="1")
