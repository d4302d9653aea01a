#!/usr/bin/env bash
# TRD end to end on a bare CPU machine: servers, rollouts, Megatron training, weight resync, evaluation.
#
#   bash examples/quickstart_cpu/run.sh                          # OPSD along y_r: the method
#   bash examples/quickstart_cpu/run.sh --compare                # TRD, forward KL and reverse KL side by side
#   bash examples/quickstart_cpu/run.sh --mode opd --divergence jsd   # any flag of the trainer
#   ENGINE=sglang bash examples/quickstart_cpu/run.sh            # served by SGLang instead of the embedded server
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="$(bash "$root/tools/setup_env.sh")"
if [ "${ENGINE:-embedded}" = sglang ]; then
  TRD_SGLANG_VENV="$(bash "$root/tools/setup_sglang_cpu.sh")"
  export TRD_SGLANG_VENV
fi
# CUDA_VISIBLE_DEVICES: on the CPU also where there is a GPU, which two ranks could not share.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false CUDA_DEVICE_MAX_CONNECTIONS=1 CUDA_VISIBLE_DEVICES=
exec "$venv/bin/python" "$root/examples/quickstart_cpu/quickstart.py" --engine "${ENGINE:-embedded}" "$@"
