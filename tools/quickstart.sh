#!/usr/bin/env bash
# From nothing to a deployed network: sets up the environment, pretrains a slim
# OREPA-ResNet-18 on real handwritten digits, tests it, switches it to its plain
# form, and tests that. STACK=onedl in the environment picks the OneDL forks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly CONFIG=configs/digits/resnet18-slim-orepa_1xb64_digits.py
readonly DATA=data/digits
readonly WORK=work_dirs/quickstart
readonly EPOCHS=20
export VENV=${VENV:-$PWD/.venv}
readonly PYTHON=$VENV/bin/python

step() {
  printf '\n==> %s\n' "$*"
}

# Runs a command, all of its output in a log, only what matches on the screen.
run() {
  local log=$1 shown=$2
  shift 2
  set +e
  "$@" 2>&1 | tee "$log" | sed -u -n -E "/$shown/{s/^(.{160}).*/\\1/;p}"
  local status=${PIPESTATUS[0]}
  set -e
  if ((status != 0)); then
    tail -n 15 "$log" >&2
    echo "quickstart: this failed: $*" >&2
    echo "quickstart: all of its output is in $log" >&2
    exit "$status"
  fi
}

main() {
  SECONDS=0
  step 'Environment'
  bash tools/setup_env.sh

  step 'Data: handwritten digits'
  mkdir -p "$WORK"
  # A run that is broken off must not leave the results of an older one behind.
  rm -rf "$WORK"/train "$WORK"/summary.json
  "$PYTHON" tools/dataset_converters/digits.py --out "$DATA"

  step "Training a slim OREPA-ResNet-18 for $EPOCHS epochs (about a minute)"
  local training_from=$SECONDS
  run "$WORK/train.log" 'Epoch\((train|val)\)' \
    "$PYTHON" tools/train.py "$CONFIG" --work-dir "$WORK/train" \
    --cfg-options train_cfg.max_epochs="$EPOCHS"
  local training_seconds=$((SECONDS - training_from))

  step 'Testing the training form'
  run "$WORK/test.log" 'Epoch\(test\).*accuracy' \
    "$PYTHON" tools/test.py "$CONFIG" "$WORK/train/epoch_$EPOCHS.pth" \
    --work-dir "$WORK/test" --out "$WORK/test.json" --out-item metrics

  step 'Switching to the deployed form'
  "$PYTHON" tools/model_converters/switch_to_deploy.py "$CONFIG" \
    "$WORK/train/epoch_$EPOCHS.pth" "$WORK/deploy.pth" --json "$WORK/switch.json"

  step 'Testing the deployed form'
  run "$WORK/test_deploy.log" 'Epoch\(test\).*accuracy' \
    "$PYTHON" tools/test.py "$CONFIG" "$WORK/deploy.pth" \
    --work-dir "$WORK/test" --out "$WORK/test_deploy.json" --out-item metrics \
    --cfg-options model.backbone.deploy=True

  step 'Summary'
  "$PYTHON" tools/analysis_tools/quickstart_summary.py "$WORK" \
    --seconds "$SECONDS" --training-seconds "$training_seconds"
}

main
