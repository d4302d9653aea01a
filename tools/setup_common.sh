# Sourced by the setup scripts, which set root, venv and pythons (versions of Python, the best first).
# shellcheck shell=bash disable=SC2154
set -euo pipefail
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

# A candidate counts only if it runs: pyenv's shims may not.
find_python() {
  local version candidate
  for version in $pythons; do
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

# What runs the programs of a model; without it --task code refuses to, and the tests of it are skipped.
install_bubblewrap() {
  if ! command -v bwrap >/dev/null && may_install_packages; then
    say "installing the system's bubblewrap"
    { apt-get update && apt_install bubblewrap; } >>"$log" 2>&1 || true
  fi
  command -v bwrap >/dev/null || say "bubblewrap is missing: no program of a model will run; apt-get install bubblewrap"
}

make_venv() {
  local python version output
  python="$(find_python)"
  if [ -z "$python" ] && may_install_packages; then
    step "reading the system's package lists" apt-get update
    step "installing the system's Python" apt_install python3 python3-venv
    python="$(find_python)"
  fi
  [ -n "$python" ] || fail "none of Python $pythons found: install python${pythons%% *} and try again"
  version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # Debian ships them apart
    may_install_packages || fail "$python cannot make virtual environments: install python$version-venv and try again"
    step "reading the system's package lists" apt-get update
    step "installing python$version-venv" apt_install "python$version-venv"
  fi
  say "making $venv with Python $version"
  output="$("$python" -m venv --clear "$venv" 2>&1)" || fail "$output"
}

pip() { "$venv/bin/python" -m pip "$@"; }

# set_up STAMP FUNCTION: make the environment, call FUNCTION to fill it, unless STAMP says that nothing has changed.
# Prints the environment's path. Two scripts that start together must not install into the same place.
set_up() {
  mkdir -p "$(dirname "$venv")"
  if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock 9
  fi
  if [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$1" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    mkdir -p "$venv"
    pip --version >/dev/null 2>&1 || make_venv
    rm -f "$venv/.stamp"
    "$2"
    echo "$1" >"$venv/.stamp"
    say "done"
  fi
  echo "$venv"
}
