# What the scripts of the GPU examples share; each sources it with its own arguments.
# shellcheck shell=bash disable=SC2154
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python}"
SGLANG_PYTHON="${SGLANG_PYTHON:-$PYTHON}"
DATA="${DATA:-$root/data}" PRINT="${PRINT:-}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# --plan and --dry-run need neither weights nor servers.
case " $* " in *" --plan "* | *" --dry-run "*) rehearsal=1 ;; *) rehearsal= ;; esac

fail() {
  echo "error: $*" >&2
  exit 2
}

# run COMMAND...: run it; with PRINT=1 print it instead, ready to paste.
run() {
  if [ -n "$PRINT" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# become COMMAND...: the same, in the place of this shell, so that signals reach it.
become() {
  if [ -n "$PRINT" ]; then run "$@"; else exec "$@"; fi
}

# model VARIABLE NAME: the variable must name a directory with the weights of NAME; a rehearsal takes its shape alone.
model() {
  if [ -n "${!1:-}" ]; then
    [ -f "${!1}/config.json" ] || fail "$1=${!1}: no config.json there; give the Hugging Face directory of $2"
  elif [ -n "$rehearsal" ]; then
    printf -v "$1" %s "$root/examples/shapes/$2"
  else
    fail "$1 is not set: give the Hugging Face directory of $2"
  fi
}

# serve ROLE MODEL GPUS FLAGS...: one server for every ${SERVER_TP:-1} of the GPUs, until told to end.
serve() {
  local role="$1" path="$2" gpus="$3" number
  shift 3
  number="$(tr ',' '\n' <<<"$gpus" | wc -l)"
  [ -n "$PRINT" ] || mkdir -p "$RUN_DIR"
  become env CUDA_VISIBLE_DEVICES="$gpus" "$PYTHON" "$root/tools/launch_sglang.py" --python "$SGLANG_PYTHON" \
    --model-path "$path" --role "$role" --num-servers "$((number / ${SERVER_TP:-1}))" --tp "${SERVER_TP:-1}" \
    --urls-file "$RUN_DIR/$role.urls" --log-dir "$RUN_DIR/logs/$role" "$@"
}

# urls ROLE: fill the array ROLE_urls with the servers that `serve` started.
urls() {
  if [ -f "$RUN_DIR/$1.urls" ]; then
    mapfile -t "$1_urls" <"$RUN_DIR/$1.urls"
  elif [ -n "$rehearsal$PRINT" ]; then
    mapfile -t "$1_urls" <<<"http://$1-server"
  else
    fail "$RUN_DIR/$1.urls is missing: start 'bash serve.sh $1' first, and wait until it prints URLs"
  fi
}

# train FLAGS...: the trainer on TRAIN_GPUS of NNODES machines, or its --dry-run, or with --plan tools/plan_run.py with
# the flags of the array `plan` besides.
train() {
  local per_node flags=() flag nodes="${NNODES:-1}"
  per_node="$(tr ',' '\n' <<<"$TRAIN_GPUS" | wc -l)"
  for flag in "$@"; do [ "$flag" = --plan ] || flags+=("$flag"); done
  if [ $# -gt ${#flags[@]} ]; then
    become "$PYTHON" "$root/tools/plan_run.py" --num-gpus "$((nodes * per_node))" "${plan[@]}" "${flags[@]}"
  elif [ -n "$rehearsal" ]; then
    become env WORLD_SIZE="$((nodes * per_node))" "$PYTHON" -m megatron_trd.train "${flags[@]}"
  else
    local where=(--standalone)
    if [ "$nodes" != 1 ]; then
      where=(--nnodes "$nodes" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}" --master-port 29500)
    fi
    become env CUDA_DEVICE_MAX_CONNECTIONS=1 CUDA_VISIBLE_DEVICES="$TRAIN_GPUS" \
      "$PYTHON" -m torch.distributed.run "${where[@]}" \
      --nproc-per-node "$per_node" -m megatron_trd.train "${flags[@]}"
  fi
}

# evaluate MODEL OUTPUT FLAGS...: start servers of the model on EVAL_GPUS, sample the benchmarks, end the servers.
evaluate() {
  local path="$1" output="$2" # not server: the trap outlives the function
  shift 2
  if [ -n "$PRINT" ]; then
    serve eval "$path" "$EVAL_GPUS" "${eval_server[@]}"
  else
    rm -f "$RUN_DIR/eval.urls" # of servers that were killed
    serve eval "$path" "$EVAL_GPUS" "${eval_server[@]}" >/dev/null &
    server=$!
    trap 'kill "$server" 2>/dev/null; wait "$server" || true' EXIT
    until [ -f "$RUN_DIR/eval.urls" ]; do
      kill -0 "$server" 2>/dev/null || fail "the servers of $path ended; see $RUN_DIR/logs/eval"
      sleep 5
    done
  fi
  urls eval
  run "$PYTHON" -m megatron_trd.evaluate --hf-checkpoint "$path" --student-urls "${eval_urls[@]}" --output "$output" \
    --benchmark-dir "$DATA" --eval-num-samples 16 --eval-sampling paper "$@"
  [ -n "$PRINT" ] && return
  kill "$server"
  wait "$server" || true
  trap - EXIT
}

# evaluation before|after|compare|"" FLAGS...: score the student, the trained one, and show paired differences.
evaluation() {
  local what="$1"
  shift
  case "$what" in
    "" | before | after | compare) ;;
    *) fail "eval.sh $what: use before, after, compare, or nothing for all three" ;;
  esac
  if [ -z "$what" ] || [ "$what" = before ]; then evaluate "$STUDENT" "$RUN_DIR/eval-before" "$@"; fi
  if [ -z "$what" ] || [ "$what" = after ]; then evaluate "$RUN_DIR/student-hf" "$RUN_DIR/eval-after" "$@"; fi
  if [ -z "$what" ] || [ "$what" = compare ]; then
    run "$PYTHON" -m megatron_trd.evaluate --compare "$RUN_DIR/eval-before" "$RUN_DIR/eval-after"
  fi
}

# prepare CORPUS "BENCHMARKS" FLAGS...: fetch the benchmarks, then the corpus without what is in one of them.
prepare() {
  local corpus="$1" names="$2" name benchmarks=()
  shift 2
  [ -n "$PRINT" ] || mkdir -p "$DATA"
  for name in $names; do
    [ -f "$DATA/$name.jsonl" ] ||
      run "$PYTHON" "$root/tools/prepare_data.py" "$name" --source hub --output "$DATA/$name.jsonl"
    benchmarks+=("$DATA/$name.jsonl")
  done
  [ -f "$DATA/$corpus.jsonl" ] ||
    run "$PYTHON" "$root/tools/prepare_data.py" "$corpus" --source hub --output "$DATA/$corpus.jsonl" \
      --against "${benchmarks[@]}" "$@"
}
