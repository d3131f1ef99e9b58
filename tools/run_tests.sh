#!/usr/bin/env bash
# Sets up the environment, checks style and types, and runs the test suite.
# Arguments go to pytest, as in: bash tools/run_tests.sh -m 'not slow' -x
# A process for each core shares the tests out; with -n0 one process runs them all.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV=${VENV:-$PWD/.venv}

bash tools/setup_env.sh --ops --tests
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
# What uses the GPU by itself where there is one is compared with a CPU in these tests.
# Neighbours stay together, and share what fixtures made, until a process is done and
# takes over half of what another has left.
workers=(-n logical --maxprocesses 8 --dist worksteal)
CUDA_VISIBLE_DEVICES='' "$VENV/bin/python" -m pytest "${workers[@]}" --durations=15 "$@"
if (($# == 0)) && nvidia-smi >/dev/null 2>&1; then
  "$VENV/bin/python" -m pytest tests/test_gpu.py
fi
