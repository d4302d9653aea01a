from __future__ import annotations

import ast
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml

from megatron_trd.config import document, schema
from megatron_trd.config.cli import Flag, exit_on_value_error, flags, parse_config, save_resolved, sections, to_yaml
from megatron_trd.config.schema import Config, LoraConfig, ModelConfig, OptimizerConfig, RolloutConfig

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = ["--hf-checkpoint", "student", "--trajectories", "file.jsonl"]


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Parse what must fail; return the one line it says."""
    with pytest.raises(SystemExit) as stop:
        parse_config([*MINIMAL, *argv])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def test_every_kind_of_flag_arrives_with_its_type() -> None:
    line = (
        "--hf-checkpoint student --trajectories file.jsonl --mode opd --teacher-hf-checkpoint teacher --lr 1e-4 "
        "--lora-rank 8 --no-bf16 --token-clip 0.06 --student-urls http://a http://b --rollout-top-k -1"
    )
    config = parse_config(line.split())
    expected = dataclasses.replace(
        Config(model=ModelConfig(hf_checkpoint="student"), data=schema.DataConfig(trajectories="file.jsonl")),
        method=schema.MethodConfig(mode="opd"),
        model=ModelConfig(hf_checkpoint="student", teacher_hf_checkpoint="teacher", bf16=False),
        optimizer=OptimizerConfig(lr=1e-4),
        lora=LoraConfig(lora_rank=8),
        objective=schema.ObjectiveConfig(token_clip=0.06),
        rollout=RolloutConfig(student_urls=("http://a", "http://b"), rollout_top_k=-1),
    )
    assert config == expected


def test_flags_over_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer:\n  lr: 5e-4\n  min_lr: 1.0e-5\n  weight_decay: 0\nlora:\n")
    config = parse_config([*MINIMAL, "--config", str(path), "--min-lr", "2e-5"])
    assert config.optimizer == OptimizerConfig(lr=5e-4, min_lr=2e-5, weight_decay=0.0)
    assert type(config.optimizer.weight_decay) is float
    assert parse_config([*MINIMAL, "--config", str(path), "--min-lr", "none"]).optimizer.min_lr is None


def another_value(flag: Flag) -> object:
    """A valid value of a field that differs from its default, from the field's name and kind alone."""
    special = {
        "mode": "opd",
        "divergence": "reverse-kl",
        "entry_clip": None,
        "rollout_batch_size": 6,
        "global_batch_size": 3,
        "min_lr": 1e-7,
        "lr_warmup_fraction": 0.25,
        "lora_dropout": 0.25,
        "beta": 0.25,
        "top_k_mode": "tail_bucket",
        "rollout_top_p": 0.5,
        "student_urls": ("http://x:1", "http://y:2"),
        "teacher_urls": ("https://z",),
        "student_router_url": "http://r:1",
        "teacher_router_url": "http://r:2",
        "fp8_format": None,  # needs bf16 and Transformer Engine's layers
        "recompute_granularity": "full",
        "recompute_modules": ("mlp",),
        "cpu_offloading_num_layers": 0,  # does not go with recompute
        "optimizer_cpu_offload": False,  # needs bf16
        "optimizer_offload_fraction": 0.5,
        "rollout_staleness": 0,  # other values do not go with recorded trajectories, nor with colocate
        "save_trajectories": False,  # does not go with recorded ones
        "weight_sync": "disk",
        "hf_checkpoint": "none of your: #business\n'\"",
    }
    if flag.name in special:
        return special[flag.name]
    if flag.choices:
        return next(c for c in flag.choices if c != flag.default)
    if flag.kind is bool:
        return not flag.default
    if flag.kind is tuple:
        return ("ü x", "y")
    return "ü x" if flag.kind is str else flag.kind((flag.default or 0) + 3)


def test_a_tree_without_defaults_survives_the_round_trip(tmp_path: Path) -> None:
    values = {flag.name: another_value(flag) for flag in flags()}
    config = Config(
        **{
            name: cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
            for name, cls in sections().items()
        }
    )
    save_resolved(config, tmp_path / "deep" / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "deep" / "config.yaml")]) == config
    assert (tmp_path / "deep" / "config.yaml").read_text() == to_yaml(config)
    assert list(yaml.safe_load(to_yaml(config))) == [field.name for field in dataclasses.fields(Config)]
    assert parse_config(["--config", str(tmp_path / "deep" / "config.yaml"), "--seed", "7"]).data.seed == 7


def test_extras_of_a_main() -> None:
    extra = {
        "dry_run": (bool, False, "Stop early."),
        "num_problems": (int, 5, "How many."),
        "out": (str | None, None, ""),
    }
    config, extras = parse_config([*MINIMAL, "--dry-run", "--num-problems", "9"], extra=extra)
    assert vars(extras) == {"dry_run": True, "num_problems": 9, "out": None}
    assert config.model.hf_checkpoint == "student"
    assert parse_config(MINIMAL, extra=extra)[1].num_problems == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--weight-dcay", "1"], "--weight-dcay: unknown flag; did you mean --weight-decay?"),
        (["--lora-ran", "4"], "--lora-ran: unknown flag; did you mean --lora-rank?"),  # no abbreviations
        (["--zzz=1"], "--zzz: unknown flag; --help lists them"),
        (["stray"], "stray: there are no positional arguments; flags start with --"),
        (["--lr", "abc"], "--lr abc: give a number"),
        (["--lora-rank", "1.5"], "--lora-rank 1.5: give an integer"),
        (["--seed", "none"], "--seed none: give an integer"),
        (["--min-lr", "x"], "--min-lr x: give a number, or none for unset"),
        (["--mode", "sft"], "--mode sft: use one of opd, opsd"),
        (["--lr"], "--lr: expected one argument"),
        (["--config", "absent.yaml"], "--config absent.yaml: No such file or directory; give a readable YAML file"),
        (["--lora-dropout", "1"], "--lora-dropout 1.0: must lie in [0, 1)"),
        (["--global-batch-size", "3"], "--global-batch-size 3: must divide --rollout-batch-size 128"),
    ],
)
def test_a_bad_flag_is_one_line_with_a_remedy(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert error_of(capsys, *argv) == message


def test_the_schema_refuses_with_flag_value_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "--divergence", "jsd", "--beta", "1.5")
    assert message.startswith("--beta 1.5: jsd needs a value strictly between 0 and 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer:\n  lrr: 1\n", "{file}: optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("optimizer:\n  seed: 1\n", "{file}: optimizer.seed: unknown key; did you mean data.seed?"),
        ("optimiser:\n  lr: 1\n", "{file}: optimiser: unknown section; did you mean optimizer?"),
        ("seed: 1\n", "{file}: seed: unknown section; did you mean data.seed?"),
        ("optimizer:\n  lr: true\n", "{file}: optimizer.lr True: give a number"),
        ("model:\n  bf16: 1\n", "{file}: model.bf16 1: give true or false"),
        ("model:\n  hf_checkpoint: 7\n", "{file}: model.hf_checkpoint 7: give a string"),
        ("lora:\n  lora_rank: 1.5\n", "{file}: lora.lora_rank 1.5: give an integer"),
        ("rollout:\n  student_urls: http://a\n", "{file}: rollout.student_urls http://a: give a list of strings"),
        ("method:\n  mode: [opd]\n", "{file}: method.mode ['opd']: use one of opd, opsd"),
        ("lora: 3\n", "{file}: lora: 3 is not a mapping; nest `name: value` lines by section"),
        ("lora:\n  lora_rank: -1\n", "--lora-rank -1: give 0 (full fine-tuning) or more (set in {file})"),
    ],
)
def test_a_bad_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert error_of(capsys, "--config", str(path)) == message.format(file=path)


def test_malformed_yaml_names_file_and_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lora:\n  lora_rank: [1\n")
    message = error_of(capsys, "--config", str(path))
    assert message.startswith(f"--config {path}: not valid YAML") and "line 3" in message


def test_an_error_of_a_library_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="Expecting value"), exit_on_value_error():
        json.loads("no json")


def test_help_shows_every_flag_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"], description="Trains.")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    tree = ast.parse(Path(schema.__file__).read_text())
    fields = [
        node.target.id
        for cls in tree.body
        if isinstance(cls, ast.ClassDef) and cls.name != "Config"
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
    ]
    assert len(fields) == len(flags()) > 60
    for name in fields:
        assert "--" + name.replace("_", "-") in shown
    assert "Peak learning rate." in shown and "Trains." in shown


def test_the_reference_in_docs_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == document.render(), (
        f"run: {Path(sys.executable).name} -m megatron_trd.config.document > docs/configuration.md"
    )
