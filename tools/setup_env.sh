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
log="$venv/install.log"
torch="torch==2.13.0"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "[setup] $*" >&2; }
fail() { echo "error: $*" >&2; exit 1; }

# Say what happens, run it quietly, show the end of the log if it fails.
step() {
  say "$1"
  shift
  "$@" >>"$log" 2>&1 || { tail -n 30 "$log" >&2; fail "\"$*\" failed; the whole log: $log"; }
}

# A Python from 3.10 to 3.12, 3.11 first. A candidate counts only if it runs: pyenv's shims may not.
find_python() {
  local version candidate
  for version in 3.11 3.12 3.10; do
    for candidate in "python$version" python3 python "$HOME/.pyenv/versions/$version".*/bin/python3; do
      if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ]; then
        echo "$candidate"
        return
      fi
    done
  done
}

may_install_packages() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install -y "$@"; }

stamp_of() {
  { cat "$root"/requirements/*.txt "$root/setup.py" "${BASH_SOURCE[0]}"; echo "$root $venv"; } | cksum
}

make_venv() {
  local python version output
  python="$(find_python)"
  if [ -z "$python" ] && may_install_packages; then
    step "reading the system's package lists" apt-get update
    step "installing the system's Python" apt_install python3 python3-venv
    python="$(find_python)"
  fi
  [ -n "$python" ] || fail "no Python 3.10, 3.11 or 3.12 found: install python3.11 and try again"
  version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # Debian ships them apart
    may_install_packages || fail "$python cannot make virtual environments: install python$version-venv and try again"
    step "reading the system's package lists" apt-get update
    step "installing python$version-venv" apt_install "python$version-venv"
  fi
  say "making $venv with Python $version"
  output="$("$python" -m venv --clear "$venv" 2>&1)" || fail "$output"
}

main() {
  local pip=("$venv/bin/python" -m pip)
  if [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$(stamp_of)" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    return
  fi
  mkdir -p "$venv"
  "${pip[@]}" --version >/dev/null 2>&1 || make_venv
  rm -f "$venv/.stamp"
  step "installing $torch (the largest download)" "${pip[@]}" install "$torch"
  step "installing requirements" "${pip[@]}" install "$torch" -r "$root/requirements/cpu.txt" -r "$root/requirements/dev.txt"
  step "installing megatron_trd" "${pip[@]}" install --no-deps --no-build-isolation -e "$root"
  rm -rf "$venv/triton-3.6"
  step "installing an older Triton beside" \
    "${pip[@]}" install --no-deps --target "$venv/triton-3.6" -r "$root/requirements/triton-3.6.txt"
  stamp_of >"$venv/.stamp"
  say "done"
}

# Two scripts that start together must not install into the same place.
mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then
  exec 9>"$venv.lock"
  flock 9
fi
main
echo "$venv"
