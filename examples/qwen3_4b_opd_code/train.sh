#!/usr/bin/env bash
# shellcheck disable=SC2034,SC2154  # common.sh reads and sets them
# Qwen3-4B-Instruct-2507 learns programming from Qwen3-8B: OPD along y_r, LoRA.
#
#   bash train.sh --plan
#   STUDENT=/models/Qwen3-4B-Instruct-2507 TEACHER=/models/Qwen3-8B bash train.sh [flags]
#
# The first says what it needs and how long it takes, without weights. The second needs the servers of serve.sh, takes
# any flag of megatron_trd.train, and goes on where it was stopped.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
RUN_DIR="${RUN_DIR:-$root/runs/qwen3_4b_opd_code}" TRAIN_GPUS="${TRAIN_GPUS:-0,1}"
model STUDENT Qwen3-4B-Instruct-2507
model TEACHER Qwen3-8B
urls student
urls teacher
plan=(--gpu h100-80gb --student-server-gpus 4 --teacher-server-gpus 2
  --mean-prompt-tokens 500 --mean-y-o-tokens 2200 --mean-y-r-tokens 850)
train --run-dir "$RUN_DIR" --save-hf "$RUN_DIR/student-hf" --save-adapter "$RUN_DIR/adapter" \
  --save-interval 10 --keep-checkpoints 2 \
  --mode opd --hf-checkpoint "$STUDENT" --teacher-hf-checkpoint "$TEACHER" \
  --student-urls "${student_urls[@]}" --teacher-urls "${teacher_urls[@]}" \
  --task code --train-data "$DATA/taco.jsonl" --eval-data "$DATA/humaneval_plus.jsonl" \
  --num-iterations 195 --rollout-batch-size 128 --global-batch-size 128 --eval-interval 50 \
  --max-prompt-tokens 2048 --max-response-tokens 16384 --max-refine-prompt-tokens 18432 \
  --rollout-temperature 0.6 --rollout-top-p 0.95 --rollout-top-k 20 \
  --lora-rank 64 --lora-alpha 128 --lora-dropout 0.05 \
  --lr 5e-6 --lr-warmup-fraction 0.1 --lr-decay-style cosine --weight-decay 0.005 --clip-grad 1.0 \
  --use-distributed-optimizer --overlap-grad-reduce \
  --recompute-granularity full --max-tokens-per-micro-batch 36864 "$@"
