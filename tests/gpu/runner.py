"""A script of checks: its command line, its run from check to check, its report."""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu.harness import Check, Context, Outcome, device_works, run_check

# A kernel or a collective that hangs outlasts any check of the clock between checks; this long after the deadline the
# process ends.
GRACE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One script, `run_NAME.py`, which writes `NAME.json`."""

    path: Path
    description: str
    groups: Mapping[str, Mapping[str, Check]]

    @property
    def checks(self) -> dict[str, Check]:
        """`group/name` -> check, in order."""
        return {f"{group}/{name}": check for group, of in self.groups.items() for name, check in of.items()}

    @property
    def report_name(self) -> str:
        """File that all results are written to."""
        return f"{self.path.stem.removeprefix('run_')}.json"

    def selected(self, only: str | None) -> list[str]:
        """Return the checks whose name or group is listed, in order."""
        checks, wanted = self.checks, only.split(",") if only is not None else list(self.groups)
        unknown = [w for w in wanted if w not in checks and w not in self.groups]
        if unknown:
            raise SystemExit(f"--only {', '.join(unknown)}: choose from {', '.join([*self.groups, *checks])}")
        return [name for name in checks if name in wanted or name.split("/")[0] in wanted]

    def arguments(self) -> argparse.Namespace:
        """Read the command line."""
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--out", type=Path, help=f"directory for {self.report_name}")
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        parser.add_argument("--scale", choices=("full", "small"), default="full", help="sizes of a GPU, or toy ones")
        parser.add_argument("--only", help="names of checks or groups, with commas")
        parser.add_argument("--deadline", type=float, default=480.0, help="seconds; checks not begun by then fail")
        return parser.parse_args()

    def run(self, args: argparse.Namespace, context: Context, about: Mapping[str, str]) -> int:
        """Run the selected checks and return the exit code."""
        names, checks = self.selected(args.only), self.checks
        faulthandler.dump_traceback_later(args.deadline + GRACE_SECONDS, exit=True)
        print(*(f"{key} {value}" for key, value in about.items()), sep=", ")
        outcomes: list[Outcome] = []
        for i, name in enumerate(names):
            outcomes.append(run_check(name, checks[name], context))
            print(outcomes[-1], flush=True)
            if args.device == "cuda" and not device_works():
                print("the device is lost to this process: the rest runs in a new one", flush=True)
                outcomes += self.in_a_new_process(names[i + 1 :], args, context.seconds_left())
                break
            self._write(args.out, about, outcomes)
        self._write(args.out, about, outcomes)
        print("\n" + "\n".join(map(str, outcomes)))
        bad = [outcome.name for outcome in outcomes if not outcome.good]
        print(f"{len(outcomes) - len(bad)} of {len(outcomes)} good" + (f"; not: {', '.join(bad)}" if bad else ""))
        return 1 if bad else 0

    def in_a_new_process(self, names: list[str], args: argparse.Namespace, seconds_left: float) -> list[Outcome]:
        """Run checks where no earlier one has broken the device."""
        with tempfile.TemporaryDirectory() as scratch:
            options = {"--out": scratch, "--device": args.device, "--scale": args.scale, "--only": ",".join(names)}
            flags = [word for pair in options.items() for word in pair]
            command = [sys.executable, str(self.path), *flags, "--deadline", str(max(seconds_left, 0.0))]
            subprocess.run(command, check=False)
            report = Path(scratch, self.report_name)
            done = json.loads(report.read_text())["checks"] if report.exists() else []
        found = {entry["name"]: Outcome(**entry) for entry in done}
        return [found.get(name) or Outcome(name=name, verdict="not run", key="its process died") for name in names]

    def _write(self, out: Path | None, about: Mapping[str, Any], outcomes: list[Outcome]) -> None:
        """Write all results so far, so that a crash later on loses none."""
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            report = {"about": dict(about), "checks": [asdict(outcome) for outcome in outcomes]}
            (out / self.report_name).write_text(json.dumps(report, indent=1))
