"""The whole work of a campaign in small: twenty real problems through every command, and nothing vanishes on the way.

The models are random and say nothing; scripted servers answer with real solutions, wrong ones, none and broken ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integration.rehearsal import (
    BUDGET,
    CODE,
    MATH,
    Rehearsal,
    Script,
    model_dir,
    prepare,
    prepare_code,
    prepare_math,
    records,
    rendered,
    serving,
)
from launch import run, torchrun
from megatron_trd import audit, evaluate, generate, report
from megatron_trd.benchmarks.samples_file import read_samples
from megatron_trd.config.schema import MethodConfig
from megatron_trd.data.packing import Multiples, pack
from megatron_trd.records import Trajectory
from megatron_trd.rollout.server_process import launch_embedded_server
from megatron_trd.rollout.summary import summarize
from megatron_trd.rollout.to_sample import to_sample
from megatron_trd.rollout.trajectory_file import read_trajectories
from sandboxes import sandbox_or_skip

ONLINE_TABLE = {"pass_pass": 0, "pass_fail": 0, "fail_pass": 5, "fail_fail": 4}
"""Every y_o of the code problems fails; one y_r is not scored."""
AUDITED = {("y_o", "right"): 4, ("y_o", "not right"): 6, ("y_r", "right"): 5, ("y_r", "not right"): 2}
METHODS = {"math": MethodConfig(mode="opsd"), "code": MethodConfig(mode="opd")}


class Stage:
    """What the tests share: prepared files, models, scripts, and the trajectories of both tasks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.student, self.teacher = model_dir(folder / "student", 32, 0), model_dir(folder / "teacher", 48, 1)
        self.benchmarks = folder / "benchmarks"
        self.benchmarks.mkdir()
        aime, human = self.benchmarks / "aime24.jsonl", self.benchmarks / "humaneval_plus.jsonl"
        self.benchmark_accounts = {
            "aime24": prepare("aime24", records("math/aime24.jsonl", 0, 1), aime),
            "humaneval_plus": prepare("humaneval_plus", records("code/HumanEvalPlus-substitute.jsonl", 1, 6), human),
        }
        math, self.math_account = prepare_math(self.benchmarks, folder)
        code, self.code_left_out = prepare_code(folder)
        self.paths = {"math": [math], "code": code}
        self.scripts = {one.task: Script(one, self.paths[one.task]) for one in (MATH, CODE)}

    def flags(self, rehearsal: Rehearsal) -> list[str]:
        """Return what generation and training have in common: OPSD for mathematics, OPD for programs."""
        flags = ["--task", rehearsal.task, "--train-data", *map(str, self.paths[rehearsal.task])]
        flags += ["--hf-checkpoint", str(self.student), "--max-response-tokens", str(BUDGET)]
        if rehearsal is CODE:
            flags += ["--mode", "opd", "--teacher-hf-checkpoint", str(self.teacher)]
        return flags

    def trajectories(self, rehearsal: Rehearsal) -> list[Trajectory]:
        """Read them in the order of the problems."""
        done = {t.problem.id: t for t in read_trajectories(self.folder / f"{rehearsal.task}.trajectories.jsonl")}
        assert len(done) == len(rehearsal.pairs)
        return [done[problem.id] for problem in self.scripts[rehearsal.task].problems]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    sandbox_or_skip()
    return Stage(tmp_path_factory.mktemp("rehearsal"))


@pytest.fixture(scope="module")
def generated(stage: Stage) -> Stage:
    """The trajectories of both tasks, each made in two runs: the servers refuse one problem in the first."""
    for rehearsal in (MATH, CODE):
        script = stage.scripts[rehearsal.task]
        script.refuse_once.add(script.problems[0].id)
        output = stage.folder / f"{rehearsal.task}.trajectories.jsonl"
        with serving(script.reply("y_o"), script.reply("y_r")) as (student, teacher):
            command = [*stage.flags(rehearsal), "--student-urls", student, "--teacher-urls", teacher]
            command += ["--output", str(output), "--num-problems", "10"]
            with pytest.raises(SystemExit, match="1 problems failed"):
                generate.main(command)
            assert len(output.read_text(encoding="utf-8").splitlines()) == 9
            generate.main(command)
    return stage


both = pytest.mark.parametrize("rehearsal", [MATH, CODE], ids=["math", "code"])


@pytest.fixture(scope="module")
def offline(generated: Stage) -> Path:
    """A run on the trajectories of the mathematics problems."""
    run_dir = generated.folder / "offline"
    file = str(generated.folder / "math.trajectories.jsonl")
    flags = ["--trajectories", file, "--trajectory-filter", "fail", "--run-dir", str(run_dir)]
    train(*generated.flags(MATH), *flags)
    return run_dir


@pytest.fixture(scope="module")
def student_server(stage: Stage) -> Iterator[str]:
    with launch_embedded_server(stage.student) as url:
        yield url


@pytest.fixture(scope="module")
def audited(generated: Stage, student_server: str) -> Path:
    """An audit of the mathematics trajectories by the first weights, which are OPSD's teacher."""
    output = generated.folder / "audit"
    flags = ["--teacher-urls", student_server, "--trajectories", str(generated.folder / "math.trajectories.jsonl")]
    audit.main([*generated.flags(MATH), *flags, "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def online(stage: Stage, student_server: str, audited: Path) -> Path:
    """A run on the programming problems: a student that says nothing, and a teacher that follows the script."""
    run_dir = stage.folder / "online"
    with serving(stage.scripts["code"].reply("y_r")) as (teacher,):
        flags = ["--student-urls", student_server, "--teacher-urls", teacher, "--on-bad-refinement", "drop"]
        flags += ["--run-dir", str(run_dir), "--eval-num-problems", "0", "--lr", "1e-3", "--save-trajectories"]
        train(*stage.flags(CODE), *flags, "--check-weight-update-equal")
    return run_dir


@pytest.fixture(scope="module")
def converted(stage: Stage, online: Path) -> Path:
    """The last checkpoint of the online run as a Hugging Face directory."""
    output = stage.folder / "converted"
    command = [sys.executable, "tools/convert_checkpoint.py", "to-hf", "--megatron-checkpoint"]
    command += [str(online / "checkpoints"), "--hf-template", str(stage.student), "--output", str(output)]
    succeed(run(command))
    return output


@pytest.fixture(scope="module")
def evaluations(stage: Stage, online: Path, converted: Path, student_server: str) -> tuple[Path, Path]:
    """Both benchmarks, by the server that was resynced and by one that loaded the converted checkpoint."""
    with launch_embedded_server(converted) as anew:
        return evaluated(stage, student_server, "resynced"), evaluated(stage, anew, "converted")


def evaluated(stage: Stage, url: str, name: str) -> Path:
    output = stage.folder / "results" / name
    flags = ["--hf-checkpoint", str(stage.student), "--student-urls", url, "--output", str(output)]
    flags += ["--benchmarks", "aime24", "humaneval_plus", "--benchmark-dir", str(stage.benchmarks)]
    evaluate.main([*flags, "--eval-num-samples", "2", "--eval-max-response-tokens", "16"])
    return output


def train(*flags: str) -> None:
    grid = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--no-bf16"]
    sizes = ["--num-iterations", "2", "--rollout-batch-size", "5", "--global-batch-size", "5"]
    succeed(torchrun(2, "-m", "megatron_trd.train", *flags, *grid, *sizes, timeout_s=300))


def succeed(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def counted(lines: Iterable[dict[str, float]], expected: dict[str, int]) -> dict[str, float]:
    """Return the expected counts as all iterations of a run have them; a count that is not there is 0."""
    return {name: sum(line.get(f"rollout/{name}", 0.0) for line in lines) for name in expected}


def test_every_record_becomes_a_problem_or_is_accounted_for(stage: Stage) -> None:
    account = stage.math_account
    assert (account["records"], account["problems"]) == (13, 10)
    assert account["left_out"] == {"malformed-gold": 1, "duplicate": 1, "overlap": 1}
    assert stage.code_left_out == {"failing-solution": 1, "not-gradable": 1}
    assert [len(stage.scripts[task].problems) for task in ("math", "code")] == [10, 10]
    assert [account["problems"] for account in stage.benchmark_accounts.values()] == [2, 2]


@both
def test_every_problem_becomes_a_trajectory_with_the_verdicts_it_deserves(
    rehearsal: Rehearsal, generated: Stage
) -> None:
    script, trajectories = generated.scripts[rehearsal.task], generated.trajectories(rehearsal)
    outcomes = {"right": "correct", "thought": "correct", "none": "no_answer", "empty": "no_answer", "cut": "truncated"}
    for (number, t), pair in zip(enumerate(trajectories), rehearsal.pairs, strict=True):
        undecided = rehearsal is CODE and number == 9
        for completion, verdict, stage_name, kind in (
            (t.y_o, t.y_o_verdict, "y_o", pair[0]),
            (t.y_r, t.y_r_verdict, "y_r", pair[1]),
        ):
            assert completion is not None
            assert list(completion.token_ids) == script.ids(t.problem, stage_name)
            got = None if verdict is None else verdict.outcome
            assert got == (None if kind == "lost" else "grader_error" if undecided else outcomes.get(kind, "wrong"))
        vanilla = "solve" if rehearsal is CODE else "vanilla_opsd"
        refine = "refine_opd" if rehearsal is CODE else "refine_opsd"
        assert list(t.solve_prompt_ids) == rendered(script, t.problem, "solve")
        assert list(t.vanilla_prompt_ids) == rendered(script, t.problem, vanilla)
        assert list(t.refine_prompt_ids) == rendered(script, t.problem, refine, t.y_o.text)
    expected = rehearsal.table | {"trajectories": 10}
    assert counted([summarize(trajectories)], expected) == expected


@both
def test_every_trajectory_becomes_a_sample_or_is_counted(rehearsal: Rehearsal, generated: Stage) -> None:
    trajectories, method = generated.trajectories(rehearsal), METHODS[rehearsal.task]
    for name, passed in rehearsal.passed.items():
        decisions = [to_sample(t, replace(method, trajectory_filter=name)) for t in trajectories]  # type: ignore[arg-type]
        filtered = sum(d.reason == "filtered" for d in decisions)
        samples = sum(d.sample is not None for d in decisions)
        assert (samples, filtered) == (passed, 10 - passed)
    for name, reasons in rehearsal.decided.items():
        decisions = [to_sample(t, replace(method, on_bad_refinement=name)) for t in trajectories]  # type: ignore[arg-type]
        assert Counter(d.reason for d in decisions) == reasons
        assert sum(d.sample is None for d in decisions) == reasons.get("bad_y_r_dropped", 0)


@both
def test_every_token_of_a_sample_is_packed_once(rehearsal: Rehearsal, generated: Stage) -> None:
    """The streams hold what script and templates say, and nothing else but padding."""
    script, wanted, responses = generated.scripts[rehearsal.task], 0, 0
    contexts = ("solve", "refine_opd") if rehearsal is CODE else ("vanilla_opsd", "refine_opsd")
    for problem, (first, second) in zip(script.problems, rehearsal.pairs, strict=True):
        solve = rendered(script, problem, "solve")
        if second in ("empty", "cut", "lost"):  # y_o in its place
            response, teacher = script.ids(problem, "y_o"), rendered(script, problem, contexts[0])
        else:
            response = script.ids(problem, "y_r")
            teacher = rendered(script, problem, contexts[1], script.text(problem, first))
            if second == "thought":  # the teacher alone reads the block
                end = response.index(script.tokenizer.convert_tokens_to_ids("</think>")) + 2
                teacher, response = teacher + response[:end], response[end:]
        wanted += len(solve) + len(teacher) + 2 * (len(response) - 1)
        responses += len(response)
    method = METHODS[rehearsal.task]
    samples = [sample for t in generated.trajectories(rehearsal) if (sample := to_sample(t, method).sample) is not None]
    assert len(samples) == 10
    packed = pack(
        samples,
        num_steps=2,
        dp_size=1,
        max_tokens=2048,
        multiples=Multiples(stream=2),
        normalization="sequence",
    )
    micro_batches = [micro_batch for step in packed for rank in step for micro_batch in rank]
    streams = [stream for m in micro_batches for stream in (m.student, m.teacher)]
    assert sum(int((~stream.is_padding).sum()) for stream in streams) == wanted
    assert sum(len(m.response_ids) for m in micro_batches) == responses
    assert sum(m.num_sequences for m in micro_batches) == 10
    assert sum(float(m.token_weight.double().sum()) for m in micro_batches) == pytest.approx(2.0, abs=1e-6)


def test_the_audit_has_every_response_that_training_would_take(stage: Stage, audited: Path) -> None:
    """Every y_o, and every y_r that is neither empty nor cut nor lost; of the one that reasons first, what follows."""
    groups = json.loads((audited / "audit_summary.json").read_text(encoding="utf-8"))["groups"]
    assert {(group["along"], group["verdict"]): group["responses"] for group in groups} == AUDITED
    script = stage.scripts["math"]
    tokens = sum(len(script.ids(problem, "y_o")) for problem in script.problems)
    for problem, (_, kind) in zip(script.problems, MATH.pairs, strict=True):
        if kind in ("right", "thought", "wrong"):
            text = script.text(problem, "right" if kind == "thought" else kind)
            tokens += len(script.tokenizer(text)["input_ids"]) + 1
    assert sum(group["tokens"] for group in groups) == tokens


def test_training_from_the_file_accounts_for_every_trajectory(offline: Path) -> None:
    lines = metrics(offline)
    assert [(line["iteration"], line["step"]) for line in lines] == [(1, 1), (2, 2)]
    expected = MATH.table | {"trajectories": 10, "usable_samples": 6, "filtered": 4, "bad_y_r_replaced": 1}
    assert counted(lines, expected) == expected
    assert json.loads((offline / "summary.json").read_text(encoding="utf-8"))["consumed_samples"] == 6
    assert sum(line["train/sequences"] for line in lines) == 6


def test_online_training_accounts_for_every_problem(stage: Stage, online: Path) -> None:
    lines = metrics(online)
    assert [(line["iteration"], line["step"]) for line in lines] == [(1, 1), (2, 2)]
    expected = ONLINE_TABLE | {"trajectories": 10, "usable_samples": 8, "bad_y_r_dropped": 2, "filtered": 0}
    assert counted(lines, expected) == expected
    assert sum(line["train/sequences"] for line in lines) == 8
    saved = [t.problem.id for file in (online / "trajectories").iterdir() for t in read_trajectories(file)]
    assert sorted(saved) == sorted(problem.id for problem in stage.scripts["code"].problems)


def test_the_checkpoint_is_what_the_servers_were_sent_and_answers_alike(
    stage: Stage, online: Path, converted: Path, evaluations: tuple[Path, Path]
) -> None:
    assert max(line["weights/logprob_gap_max"] for line in metrics(online)) < 1e-3
    first, sent, written = (
        load_file(folder / "model.safetensors")
        for folder in (stage.student, online / "weights/iter_0000002", converted)
    )
    assert first.keys() == sent.keys() == written.keys()
    for name in first:
        assert torch.equal(written[name], sent[name]) and not torch.equal(sent[name], first[name])
    resynced, loaded = ({row.key: (row.response, row.verdict) for row in read_samples(path)} for path in evaluations)
    assert Counter(bench for bench, _, _ in resynced) == {"aime24": 4, "humaneval_plus": 4}
    assert resynced == loaded


def test_the_report_counts_as_all_the_others_do(
    stage: Stage, offline: Path, online: Path, audited: Path, evaluations: tuple[Path, Path]
) -> None:
    file = stage.folder / "math.trajectories.jsonl"
    runs = [str(path) for path in (offline, online, audited, evaluations[1], file)]
    report.main([*runs, "--output", str(stage.folder / "report"), "--tokenizer", str(stage.student)])
    found = json.loads((stage.folder / "report/report.json").read_text(encoding="utf-8"))
    trained, rolled_out, turns, scored, recorded = found
    tables = [numbers["outcomes"]["counts"] for numbers in (trained, rolled_out, recorded)]
    assert tables == [MATH.table, ONLINE_TABLE, MATH.table]
    assert {(group["along"], group["verdict"]): group["responses"] for group in turns["audit"]["groups"]} == AUDITED
    assert [(s["set"], s["problems"], s["samples"]) for s in scored["scores"]] == [
        ("aime24", 2, 2),
        ("humaneval_plus", 2, 2),
    ]
    lengths = {(part["response"], part["verdict"]): part["n"] for part in recorded["lengths"]}
    assert lengths == {
        ("y*", "right"): 4,
        ("y*", "not right"): 6,
        ("y_o", "right"): 4,
        ("y_o", "not right"): 6,
        ("y_r", "right"): 5,
        ("y_r", "not right"): 4,
    }
    page = (stage.folder / "report/report.html").read_text(encoding="utf-8")
    assert all(Path(path).name in page for path in runs)
