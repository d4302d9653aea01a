#!/usr/bin/env bash
# Prepare the environment, check the style, run the tests:  bash tests/run.sh [pytest arguments]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$(bash "$root/tools/setup_env.sh")"
TRD_SGLANG_VENV="$(bash "$root/tools/setup_sglang_cpu.sh")"
export TRD_SGLANG_VENV
cd "$root"
export OMP_NUM_THREADS=1
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
if [ $# -gt 0 ]; then
  exec "$venv/bin/python" -m pytest "$@"
fi
"$venv/bin/python" -m pytest -n 2 --dist loadfile
PYTHONPATH="$venv/triton-3.6" "$venv/bin/python" -m pytest tests/unit/test_triton_rows.py tests/unit/test_triton_compiles.py
