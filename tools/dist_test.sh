#!/usr/bin/env bash
# Tests on several GPUs of one machine, or of several with NNODES, NODE_RANK and MASTER_ADDR.
# Usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [ARGUMENTS OF tools/test.py]
set -euo pipefail

if (($# < 3)); then
  echo "Usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [ARGUMENTS OF tools/test.py]" >&2
  exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3

exec python -m torch.distributed.run \
  --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" \
  --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}" \
  --nproc-per-node="$gpus" \
  "$(dirname "${BASH_SOURCE[0]}")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
