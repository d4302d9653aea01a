#!/usr/bin/env bash
# Prepare the virtual environment of this checkout and print its path; quick when nothing has changed.
#
#   venv="$(bash tools/setup_env.sh)" && "$venv/bin/python" ...
#
# TRD_VENV=DIR puts it elsewhere than <checkout>/.venv. pip's own settings (pip.conf, PIP_*) decide where packages and
# which build of torch come from; pip's default is the CUDA build, which also runs without a GPU.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${TRD_VENV:-$root/.venv}"
pythons="3.11 3.12 3.10"
source "$root/tools/setup_common.sh"
requirements=("$root"/requirements/{cpu,dev,triton-3.6}.txt)

fill() {
  step "installing $torch (the largest download)" pip install "$torch"
  step "installing requirements" pip install "$torch" -r "${requirements[0]}" -r "${requirements[1]}"
  step "installing megatron_trd" pip install --no-deps --no-build-isolation -e "$root"
  rm -rf "$venv/triton-3.6"
  step "installing an older Triton beside" pip install --no-deps --target "$venv/triton-3.6" -r "${requirements[2]}"
}

set_up "$({ cat "${requirements[@]}" "$root"/{setup.py,tools/setup_env.sh,tools/setup_common.sh}; echo "$root $venv"; } | cksum)" fill
install_bubblewrap
