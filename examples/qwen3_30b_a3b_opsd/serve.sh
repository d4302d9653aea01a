#!/usr/bin/env bash
# Servers for train.sh, one machine for each role: bash serve.sh student|teacher [flags of SGLang].
# RUN_DIR lies where all machines see it; other machines may ask these servers, so they want the key in it.
role="${1:-}"
shift || true
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
RUN_DIR="${RUN_DIR:-$root/runs/qwen3_30b_a3b_opsd}" GPUS="${GPUS:-0,1,2,3,4,5,6,7}" SERVER_TP=2
[ -n "$PRINT" ] || [ -f "$RUN_DIR/api-key" ] || fail "$RUN_DIR/api-key is missing: write a random key on its only line"
open=(--host 0.0.0.0 --api-key-file "$RUN_DIR/api-key" --restart)
model STUDENT Qwen3-30B-A3B
case "$role" in # room for the longest prompt and response
  student) serve student "$STUDENT" "$GPUS" "${open[@]}" --context-length 20992 "$@" ;;
  teacher) serve teacher "$STUDENT" "$GPUS" "${open[@]}" --context-length 39424 "$@" ;;
  *) fail "serve.sh $role: use student or teacher" ;;
esac
