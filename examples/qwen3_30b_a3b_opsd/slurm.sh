#!/usr/bin/env bash
# Four machines with eight GPUs: two train, one serves the student, one its first weights, which refine.
#
#   STUDENT=/models/Qwen3-30B-A3B sbatch examples/qwen3_30b_a3b_opsd/slurm.sh    in the repository; again = resume
#SBATCH --job-name=trd-30b-a3b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
set -euo pipefail
example="${SLURM_SUBMIT_DIR:-$PWD}/examples/qwen3_30b_a3b_opsd"
export RUN_DIR="${RUN_DIR:-${SLURM_SUBMIT_DIR:-$PWD}/runs/qwen3_30b_a3b_opsd}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
mkdir -p "$RUN_DIR"
rm -f "$RUN_DIR"/{student,teacher}.urls # a job that was killed leaves them behind
[ -f "$RUN_DIR/api-key" ] || (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RUN_DIR/api-key")

servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true' EXIT
for index in 2 3; do
  role="$([ "$index" = 2 ] && echo student || echo teacher)"
  srun --nodes 1 --ntasks 1 --nodelist "${nodes[index]}" bash "$example/serve.sh" "$role" &
  servers+=($!)
done
for role in student teacher; do
  until [ -f "$RUN_DIR/$role.urls" ]; do
    for server in "${servers[@]}"; do
      kill -0 "$server" 2>/dev/null || { echo "error: servers ended; see $RUN_DIR/logs" >&2; exit 1; }
    done
    sleep 5
  done
done

export NNODES=2 MASTER_ADDR="${nodes[0]}"
srun --nodes 2 --ntasks 2 --nodelist "${nodes[0]},${nodes[1]}" \
  bash -c "NODE_RANK=\$SLURM_NODEID exec bash '$example/train.sh' \"\$@\"" train "$@"
