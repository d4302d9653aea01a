"""The GPU examples with the real models' shapes: their scripts' commands are understood, and fit what they claim."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_trd import evaluate, train
from megatron_trd.benchmarks.benchmark import CONVENTIONS
from megatron_trd.config.cli import parse_config
from megatron_trd.config.schema import Config
from megatron_trd.mcore.hf_config import read_hf_model
from megatron_trd.tasks.corpora.table import CORPORA

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("qwen3_*/README.md"))
TRAIN = sorted(EXAMPLES.glob("qwen3_*/train*.sh"))
SCRIPTS = [EXAMPLES / "common.sh", *sorted(EXAMPLES.glob("*/*.sh"))]
ROWS = {
    "math": {"answer": "2", "reference_solution": "1 + 1 is 2."},
    "code": {"answer": "", "tests": {"kind": "stdin", "inputs": ["1"], "outputs": ["1"]}},
}


def tool(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name=f"megatron_trd.{name}")


PLAN, LAUNCH, PREPARE = tool("plan_run"), tool("launch_sglang"), tool("prepare_data")


def bash(script: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = ("STUDENT", "TEACHER", "DATA", "RUN_DIR", "TRAIN_GPUS", "STUDENT_GPUS", "TEACHER_GPUS", "NNODES")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(
        ["bash", str(script), *flags],
        env=inherited | {"PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def commands(script: Path, *flags: str, **variables: str) -> list[list[str]]:
    """Return the commands that a script would run, as words."""
    done = bash(script, *flags, PRINT="1", **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def behind(words: list[str], program: str) -> list[str]:
    """Return the arguments of a program in a command."""
    (index,) = (i for i, word in enumerate(words) if word.endswith(program))
    return words[index + 1 :]


@cache
def training(script: Path) -> Config:
    """Return the configuration that a script trains with."""
    ((*words,),) = commands(script, "--dry-run")
    flags = behind(words, "megatron_trd.train")
    assert flags.pop() == "--dry-run"
    return parse_config(flags)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_are_sound(script: Path) -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    checker = shutil.which("shellcheck", path=places)
    command = [checker, "-x", str(script)] if checker else ["bash", "-n", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", TRAIN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_training_passes_its_dry_run_and_fits(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = training(script)
    for index, path in enumerate((*config.data.train_data, *config.data.eval_data)):
        row = {"schema": 1, "task": config.data.task, "id": f"x/{index}", "prompt": f"What is {index}?"}
        (tmp_path / Path(path).name).write_text(json.dumps(row | ROWS[config.data.task]) + "\n")
    ((*words,),) = commands(script, "--dry-run", DATA=str(tmp_path))
    for setting in (word for word in words if word.startswith("WORLD_SIZE=")):
        monkeypatch.setenv(*setting.split("="))
    train.main(behind(words, "megatron_trd.train"))
    shown = capsys.readouterr().out
    assert f"ranks: {os.environ['WORLD_SIZE']} = tensor" in shown and "verdict: fits" in shown

    ((*words,),) = commands(script, "--plan")
    report = tmp_path / "plan.json"
    PLAN["main"]([*behind(words, "plan_run.py"), "--json", str(report)])
    plan = json.loads(report.read_text())
    assert plan["fits"] and plan["resources"]["num_gpus"] == int(os.environ["WORLD_SIZE"])
    needed = max(stage["needed_gib"] for stage in plan["memory"])
    claim = re.search(
        rf"`{script.name}` .*?\| (\d+) GiB \|.*\| ([\d.]+) h \|", (script.parent / "README.md").read_text()
    )
    assert claim, f"{script.parent.name}/README.md says nothing of memory and hours of {script.name}"
    assert [float(claim[1]), float(claim[2])] == pytest.approx([needed, plan["hours"]], rel=0.1)


@pytest.mark.parametrize("script", TRAIN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_settings_are_the_papers(script: Path) -> None:
    """Tables 9, 10, 13 and 14 of arXiv 2606.08432."""
    config = training(script)
    rollout, optimizer = config.rollout, config.optimizer
    assert (config.method.trajectory, config.objective.divergence, config.objective.loss_normalization) == (
        "y_r",
        "forward-kl",
        "sequence",
    )
    assert (rollout.rollout_temperature, rollout.rollout_top_p, rollout.rollout_top_k) == (0.6, 0.95, 20)
    assert rollout.max_prompt_tokens == {"math": 4096, "code": 2048}[config.data.task]
    assert rollout.max_response_tokens == 16_384
    assert rollout.max_refine_prompt_tokens == {"opd": 18_432, "opsd": 22_528}[config.method.mode]
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad) == (5e-6, 0.005, 1.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.lr_warmup_fraction, optimizer.lr_decay_style, optimizer.min_lr) == (0.1, "cosine", None)
    assert config.data.global_batch_size == config.data.rollout_batch_size == 128
    if config.lora.lora_rank:
        assert (config.lora.lora_rank, config.lora.lora_alpha, config.lora.lora_dropout) == (64, 128.0, 0.05)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_servers_can_hold_what_training_asks(folder: Path, tmp_path: Path) -> None:
    config = training(folder / "train.sh")
    rollout = config.rollout
    shapes = {"STUDENT": config.model.hf_checkpoint, "TEACHER": config.model.teacher_hf_checkpoint or ""}
    key = tmp_path / "api-key"
    key.write_text("secret")
    gpus: list[str] = []
    for role, prompt in (("student", rollout.max_prompt_tokens), ("teacher", rollout.max_refine_prompt_tokens)):
        own = ("--mem-fraction-static", "0.8")
        ((*words,),) = commands(folder / "serve.sh", role, *own, **shapes, RUN_DIR=str(tmp_path))
        arguments, rest = LAUNCH["_parser"]().parse_known_args(behind(words, "launch_sglang.py"))
        flags = LAUNCH["_settings"](arguments, rest)["flags"]
        context = int(flags[flags.index("--context-length") + 1])
        longest = read_hf_model(arguments.model_path, "hf-checkpoint", 1).max_position_embeddings
        assert prompt + rollout.max_response_tokens < context <= longest
        assert tuple(flags[-2:]) == own
        assert arguments.urls_file == tmp_path / f"{role}.urls"
        (visible,) = (word for word in words if word.startswith("CUDA_VISIBLE_DEVICES="))
        gpus += visible.partition("=")[2].split(",")
        assert arguments.num_servers * arguments.tp == len(visible.split(","))
    if not rollout.server_api_key_file:  # one machine: servers and trainer share out its GPUs
        ((*words,),) = commands(folder / "train.sh", **shapes)
        (visible,) = (word for word in words if word.startswith("CUDA_VISIBLE_DEVICES="))
        assert sorted([*gpus, *visible.partition("=")[2].split(",")]) == [str(i) for i in range(8)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_evaluation_and_data(folder: Path) -> None:
    config = training(folder / "train.sh")
    made = {}
    for words in commands(folder / "prepare.sh", DATA="prepared"):
        arguments = PREPARE["_parser"]().parse_args(behind(words, "prepare_data.py"))
        made[arguments.output] = arguments
    *benchmarks, corpus = made.values()
    assert corpus.against == [benchmark.output for benchmark in benchmarks]
    assert {Path(path).name for path in (*config.data.train_data, *config.data.eval_data)} <= {
        Path(path).name for path in made
    }
    serve, before, _, _, compare = commands(folder / "eval.sh", STUDENT=config.model.hf_checkpoint, DATA="prepared")
    asked, extras = parse_config(
        ["--trajectory", "y_o", *behind(before, "megatron_trd.evaluate")], extra=evaluate._EXTRA
    )
    assert set(extras.benchmarks) == {benchmark.name for benchmark in benchmarks} <= CORPORA.keys()
    assert asked.eval.eval_num_samples == 16 and asked.eval.eval_sampling == "paper"
    budget = {"math": 38_912, "code": 16_384}[config.data.task]
    _, rest = LAUNCH["_parser"]().parse_known_args(behind(serve, "launch_sglang.py"))
    assert asked.rollout.max_prompt_tokens + budget <= int(rest[rest.index("--context-length") + 1])
    assert behind(compare, "megatron_trd.evaluate")[0] == "--compare"
    assert "amo_bench" not in extras.benchmarks or CONVENTIONS["amo_bench"].math_verifier_profile == "amo"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = EXAMPLES / "qwen3_1.7b_opd_math"
    done = bash(folder / "train.sh")
    assert done.returncode == 2 and "STUDENT is not set: give the Hugging Face directory of Qwen3-1.7B" in done.stderr
    done = bash(folder / "train.sh", STUDENT=str(tmp_path))
    assert done.returncode == 2 and f"STUDENT={tmp_path}: no config.json there" in done.stderr
    shapes = EXAMPLES / "shapes"
    known = {"STUDENT": str(shapes / "Qwen3-1.7B"), "TEACHER": str(shapes / "Qwen3-8B"), "RUN_DIR": str(tmp_path)}
    done = bash(folder / "train.sh", **known)
    assert done.returncode == 2 and "start 'bash serve.sh student' first" in done.stderr
    done = bash(folder / "serve.sh", "refiner", **known)
    assert done.returncode == 2 and "serve.sh refiner: use student or teacher" in done.stderr
    done = bash(folder / "eval.sh", "later", **known)
    assert done.returncode == 2 and "eval.sh later: use before, after, compare" in done.stderr


def test_a_plan_really_runs() -> None:
    done = bash(EXAMPLES / "qwen3_1.7b_opd_math" / "train.sh", "--plan", "--gpu", "h200")
    assert done.returncode == 0 and "of 140.4 GiB" in done.stdout, done.stderr


def test_the_image_has_the_sglang_that_is_tested() -> None:
    pinned = re.search(r"TRD_SGLANG_VERSION:-([\d.]+)", (ROOT / "tools" / "setup_sglang_cpu.sh").read_text())
    image = re.search(r"ARG SGLANG_VERSION=([\d.]+)", (ROOT / "docker" / "Dockerfile").read_text())
    assert pinned and image and pinned[1] == image[1]
