#!/usr/bin/env bash
# Prepare a virtual environment with SGLang for the CPU and print its path; quick when nothing has changed.
#
#   venv="$(bash tools/setup_sglang_cpu.sh)" && .venv/bin/python tools/launch_sglang.py --python "$venv/bin/python" ...
#
# TRD_SGLANG_VENV=DIR puts it elsewhere than <checkout>/.venv-sglang, TRD_SGLANG_VERSION=0.5.23 takes another version.
# Apart from the trainer's environment because SGLang pins torch and transformers. Its CUDA packages are left out
# (4 GB that a CPU cannot use); tools/sglang_cpu stands in for the pieces that it imports nevertheless.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${TRD_SGLANG_VENV:-$root/.venv-sglang}"
version="${TRD_SGLANG_VERSION:-0.5.21}"
pythons="3.11 3.12"
source "$root/tools/setup_common.sh"
requirements="$root/requirements/sglang-cpu.txt"

# Where the chosen version pins one of the packages that requirements/sglang-cpu.txt has brought, its pin holds.
pins() {
  "$venv/bin/python" - <<'PYTHON'
import re
from importlib.metadata import distributions, requires
installed = {d.name.lower(): d.version for d in distributions()}
for line in requires("sglang"):
    match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
    if match and match[1] != "torch" and installed.get(match[1].lower(), match[2]) != match[2]:
        print(match[0])
PYTHON
}

fill() {
  local pinned
  step "installing $torch (the largest download)" pip install "$torch"
  step "installing what SGLang needs on a CPU" pip install "$torch" -r "$requirements"
  step "installing SGLang $version" pip install --no-deps "sglang==$version" "torchvision==0.28.0" "xgrammar==0.2.7"
  pinned="$(pins)"
  # shellcheck disable=SC2086
  [ -z "$pinned" ] || step "installing the versions that SGLang $version pins" pip install "$torch" $pinned
}

set_up "$({ cat "$requirements" "$root"/tools/setup_{sglang_cpu,common}.sh; echo "$version $venv"; } | cksum)" fill
