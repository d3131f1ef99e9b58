#!/usr/bin/env bash
# Trains on several GPUs of one machine, or of several with NNODES, NODE_RANK and MASTER_ADDR.
# Usage: bash tools/dist_train.sh CONFIG GPUS [ARGUMENTS OF tools/train.py]
set -euo pipefail

if (($# < 2)); then
  echo "Usage: bash tools/dist_train.sh CONFIG GPUS [ARGUMENTS OF tools/train.py]" >&2
  exit 2
fi
config=$1 gpus=$2
shift 2

exec python -m torch.distributed.run \
  --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" \
  --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}" \
  --nproc-per-node="$gpus" \
  "$(dirname "${BASH_SOURCE[0]}")/train.py" "$config" --launcher pytorch "$@"
