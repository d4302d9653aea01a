#!/usr/bin/env bash
# Avg@16 and pass@16 of the student before and after, and their paired differences: bash eval.sh [before|after|compare].
# It starts and ends its own servers; end those of serve.sh first. A second start goes on where the first one stopped.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
RUN_DIR="${RUN_DIR:-$root/runs/qwen3_1.7b_opd_math}"
model STUDENT Qwen3-1.7B
# shellcheck disable=SC2034  # both are read by evaluate
EVAL_GPUS="${EVAL_GPUS:-0,1,2,3,4,5,6,7}" eval_server=(--context-length 40960)
evaluation "${1:-}" --benchmarks aime24 aime25 hmmt25_feb beyondaime amo_bench --max-prompt-tokens 2048
