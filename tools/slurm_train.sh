#!/usr/bin/env bash
# Trains on a Slurm cluster.
# Usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=...] \
#   bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [ARGUMENTS OF tools/train.py]
set -euo pipefail

if (($# < 4)); then
  echo 'Usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [...]' >&2
  exit 2
fi
partition=$1 job_name=$2 config=$3 work_dir=$4
shift 4
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}

# SRUN_ARGS is split into words on purpose: it holds several arguments.
# shellcheck disable=SC2086
exec srun --partition="$partition" --job-name="$job_name" \
  --gres="gpu:$gpus_per_node" --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" \
  --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  python -u "$(dirname "${BASH_SOURCE[0]}")/train.py" "$config" \
  --work-dir "$work_dir" --launcher slurm "$@"
