#!/usr/bin/env bash
# Avg@16 and pass@16 of the student before and after, and their paired differences: bash eval.sh [before|after|compare].
# It starts and ends its own servers; end those of serve.sh first. A second start goes on where the first one stopped.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
RUN_DIR="${RUN_DIR:-$root/runs/qwen3_4b_opd_code}"
model STUDENT Qwen3-4B-Instruct-2507
# shellcheck disable=SC2034  # both are read by evaluate
EVAL_GPUS="${EVAL_GPUS:-0,1,2,3,4,5,6,7}" eval_server=(--context-length 20992)
evaluation "${1:-}" --benchmarks humaneval_plus mbpp_plus livecodebench_v6 --max-prompt-tokens 4096
