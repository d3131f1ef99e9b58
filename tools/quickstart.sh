#!/usr/bin/env bash
# From nothing to a deployed network: sets up the environment, and runs quickstart.py
# in it. STACK=onedl in the environment picks the OneDL forks.
#
#   bash tools/quickstart.sh            pretrains, tests, deploys and tests again
#   bash tools/quickstart.sh transfer   goes on from it: fine-tunes a detector and a
#                                       segmenter with that backbone, and deploys them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export VENV=${VENV:-$PWD/.venv}

# Detection needs mmcv with its operators.
case ${1:-} in
  '') operators=() ;;
  transfer) operators=(--ops) ;;
  *)
    echo "quickstart: unknown argument '$1'; known is 'transfer'" >&2
    exit 2
    ;;
esac

printf '\n==> Environment\n'
# What is empty counts as unset in Bash 4.3 and before.
bash tools/setup_env.sh ${operators[@]+"${operators[@]}"}
exec "$VENV/bin/python" tools/quickstart.py "$@" --seconds-before "$SECONDS"
