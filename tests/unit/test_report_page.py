"""The page: complete, self-contained, hostile text escaped, and nothing wrong in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_trd import report
from megatron_trd.objectives.token_audit import TokenAudit
from megatron_trd.reporting.audit_file import AuditedResponse
from megatron_trd.reporting.theme import COLOURS

HOSTILE = "</i><script>alert('x')</script>\"&"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations with an audit, none of it harmless."""
    path = tmp_path_factory.mktemp("runs") / "run<b>&"
    path.mkdir()
    evaluation = {"problem_ids": ["a", "b"], "correct": [[True, False], [False, None]], "avg@2": 0.25, "pass@2": 0.5}
    summary = {"method": HOSTILE, "iterations": 2, "before": evaluation, "after": evaluation}
    (path / "summary.json").write_text(json.dumps(summary))
    lines = [
        {
            "iteration": i,
            "step": i,
            **{f"rollout/{name}": 2.0 for name in ("pass_pass", "pass_fail", "fail_pass", "fail_fail")},
            **{"train/loss": 1 / i, "train/grad_norm": 0.0, "audit/y_o/epistemic_mass": 0.01, "time/train_s": 3.0},
        }
        for i in (1, 2)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    audited = AuditedResponse(
        problem_id=HOSTILE,
        along="y_o",
        y_o_verdict="wrong",
        y_r_verdict=None,
        token_ids=(1, 2, 3),
        token_texts=(HOSTILE, "\n", "é"),
        tokens=TokenAudit(
            teacher_logprob=(-1.0,) * 3, epistemic_mass=(0.0, 0.5, 1.0), best_continuation=(0.9, 0.5, 0.0)
        ),
        turn=1,
        turn_threshold=0.1,
    )
    (path / "audit.jsonl").write_text(json.dumps(audited.as_json()) + "\n")
    return path


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Path:
    report.main([str(run_dir)])
    return run_dir / "report" / "report.html"


class Elements(HTMLParser):
    """Collects tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_all_that_there_is_and_no_more(page: Path) -> None:
    charts = {"pass_at_k", "improvement", "pass_by_iteration", "diagnostics", "stage_times", "audit_positions"}
    assert {file.stem for file in page.parent.glob("*.png")} == charts
    text = page.read_text()
    assert text.count("<svg") == len(charts)
    (numbers,) = json.loads((page.parent / "report.json").read_text())
    assert numbers["outcomes"]["n"] == 16 and numbers["outcomes"]["ratio"]["value"] == 1.0
    assert "16 trajectories with both responses graded" in text
    assert "Length of responses" not in text and "KL(teacher" not in text  # there are no trajectories, and no student


def test_nothing_is_requested_and_nothing_escapes(page: Path) -> None:
    text = page.read_text()
    elements = Elements(text).found
    assert not {tag for tag, _ in elements} & {"script", "b<", "img", "iframe", "object", "embed"}
    links = [attrs[name] for _, attrs in elements for name in ("href", "src", "xlink:href") if name in attrs]
    assert links and all(link and link.startswith(("#", "data:,")) for link in links)
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    titles = [attrs["title"] for tag, attrs in elements if tag == "i" and "title" in attrs]
    texts = [f"{i}: {text!r}" for i, text in ((1, HOSTILE), (2, "\n"), (3, "é"))]
    assert [title.split("  ")[0] for title in titles if title] == texts


def test_charts_follow_the_page_from_light_to_dark(page: Path) -> None:
    text = page.read_text()
    charts = text.partition("<body>")[2]
    assert not re.findall(r"#[0-9a-f]{6}\b", charts)  # every colour is a variable
    used = set(re.findall(r"var\(--([a-z]+)\)", text)) - {"v", "hot"}
    assert used <= COLOURS.keys()
    ids = re.findall(r' id="([^"]+)"', charts)
    assert len(ids) == len(set(ids))


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, as the WCAG defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_every_colour_can_be_read(side: int) -> None:
    def contrast(a: str, b: str) -> float:
        low, high = sorted(luminance(COLOURS[name][side]) for name in (a, b))
        return (high + 0.05) / (low + 0.05)

    for ground in ("paper", "card"):
        assert contrast("ink", ground) > 7
        for name in COLOURS.keys() - {"ink", "line", "paper", "card"}:
            assert contrast(name, ground) > (4.5 if name == "muted" else 3), (name, ground)


def test_a_browser_has_nothing_to_complain_about(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine: apt-get install chromium-headless-shell")
    log = tmp_path / "net.json"
    flags = [f"--log-net-log={log}", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "Token by token" in done.stdout
    started = [event["params"] for event in json.loads(log.read_text())["events"] if "params" in event]
    asked = {params["url"] for params in started if str(params.get("url", "")).startswith(("http", "ftp", "ws"))}
    assert not {url for url in asked if "google" not in url}, asked  # what the browser itself asks of its maker


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "RUN (none): give a directory"),
        (["--outputs", "x"], "--outputs: unknown flag"),
        (["x", "--output"], "--output (unset): give a directory"),
        (["nowhere"], "nowhere: nothing to report there"),
    ],
)
def test_what_is_refused(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        report.main(words)
    assert message in capsys.readouterr().err
