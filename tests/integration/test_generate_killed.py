"""`kill -9` of offline generation between the stages: what was sampled is not sampled again."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from launch import ROOT
from megatron_trd.rollout.trajectory_file import read_trajectories
from scripted_server import Scripted, answer, hang, scripted

NUM, NUM_Y_O, NUM_Y_R = 16, 12, 5
DEADLINE_S = 60


def test_a_response_whose_refinement_was_under_way_is_not_sampled_again(
    student_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    output = tmp_path / "t.jsonl"
    done = answer([20, 66, tokenizer.eos_token_id], [("v1", 0, 3)])

    def first(num_answers: int, enough: asyncio.Event) -> Any:
        left = iter([done] * num_answers)

        async def reply(body: dict[str, Any]) -> Any:
            try:
                return next(left)
            except StopIteration:
                enough.set()
                return await hang(body)

        return reply

    async def start(student: Scripted, teacher: Scripted) -> asyncio.subprocess.Process:
        flags = ["--mode", "opsd", "--hf-checkpoint", str(student_dir), "--student-urls", student.url]
        flags += ["--teacher-urls", teacher.url, "--output", str(output), "--num-problems", str(NUM)]
        flags += ["--max-response-tokens", "40", "--max-concurrent-requests", "64"]
        return await asyncio.create_subprocess_exec(sys.executable, "-m", "megatron_trd.generate", *flags, cwd=ROOT)

    async def main() -> None:
        y_o_enough, y_r_enough = asyncio.Event(), asyncio.Event()
        async with scripted(first(NUM_Y_O, y_o_enough), first(NUM_Y_R, y_r_enough)) as (student, teacher):
            process = await start(student, teacher)
            try:
                await y_o_enough.wait()
                while len(teacher.asked) < NUM_Y_O:  # each was asked for when its y_o had been written down
                    await asyncio.sleep(0.01)
                while len(output.read_bytes().splitlines()) < NUM_Y_R:
                    await asyncio.sleep(0.01)
            finally:
                process.kill()
                await process.wait()
            assert Path(f"{output}.y_o.jsonl").read_bytes().count(b"\n") == NUM_Y_O
            student.reply = teacher.reply = lambda _: done
            asked_before = len(student.asked)
            process = await start(student, teacher)
            try:
                assert await process.wait() == 0
            finally:
                if process.returncode is None:
                    process.kill()
            again = [tuple(body["input_ids"]) for body in student.asked[asked_before:]]
            assert len(set(again)) == len(again) == NUM - NUM_Y_O

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    trajectories = list(read_trajectories(output))
    assert len({t.problem.id for t in trajectories}) == len(trajectories) == NUM
    assert all(t.y_o.token_ids == tuple(done["output_ids"]) and t.y_r is not None for t in trajectories)
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]
