#!/usr/bin/env bash
# shellcheck disable=SC2034,SC2154  # common.sh reads and sets them
# Qwen3-8B learns mathematics from itself with the solution in sight: OPSD along y_r, LoRA.
#
#   bash train.sh --plan
#   STUDENT=/models/Qwen3-8B bash train.sh [flags]
#
# The first says what it needs and how long it takes, without weights. The second needs the servers of serve.sh, takes
# any flag of megatron_trd.train, and goes on where it was stopped.
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
RUN_DIR="${RUN_DIR:-$root/runs/qwen3_8b_opsd_math}" TRAIN_GPUS="${TRAIN_GPUS:-0,1}"
model STUDENT Qwen3-8B
urls student
urls teacher
plan=(--gpu h100-80gb --student-server-gpus 4 --teacher-server-gpus 2
  --mean-prompt-tokens 150 --mean-y-o-tokens 7700 --mean-y-r-tokens 880 --mean-reference-tokens 500)
train --run-dir "$RUN_DIR" --save-hf "$RUN_DIR/student-hf" --save-adapter "$RUN_DIR/adapter" \
  --save-interval 10 --keep-checkpoints 2 \
  --mode opsd --opsd-teacher initial --hf-checkpoint "$STUDENT" \
  --student-urls "${student_urls[@]}" --teacher-urls "${teacher_urls[@]}" \
  --task math --train-data "$DATA/deepscaler.jsonl" --eval-data "$DATA/aime24.jsonl" "$DATA/aime25.jsonl" \
  --num-iterations 34 --rollout-batch-size 128 --global-batch-size 128 --eval-interval 10 \
  --max-prompt-tokens 4096 --max-response-tokens 16384 --max-refine-prompt-tokens 22528 \
  --rollout-temperature 0.6 --rollout-top-p 0.95 --rollout-top-k 20 \
  --lora-rank 64 --lora-alpha 128 --lora-dropout 0.05 \
  --lr 5e-6 --lr-warmup-fraction 0.1 --lr-decay-style cosine --weight-decay 0.005 --clip-grad 1.0 \
  --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce \
  --recompute-granularity full --max-tokens-per-micro-batch 40960 "$@"
