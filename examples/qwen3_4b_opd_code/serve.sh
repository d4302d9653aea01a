#!/usr/bin/env bash
# Servers for train.sh: bash serve.sh student|teacher [flags of SGLang]. They run until they are told to end.
role="${1:-}"
shift || true
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
RUN_DIR="${RUN_DIR:-$root/runs/qwen3_4b_opd_code}"
case "$role" in # room for the longest prompt and response
  student)
    model STUDENT Qwen3-4B-Instruct-2507
    serve student "$STUDENT" "${STUDENT_GPUS:-2,3,4,5}" --restart --context-length 18944 "$@"
    ;;
  teacher)
    model TEACHER Qwen3-8B
    serve teacher "$TEACHER" "${TEACHER_GPUS:-6,7}" --restart --context-length 35328 "$@"
    ;;
  *) fail "serve.sh $role: use student or teacher" ;;
esac
