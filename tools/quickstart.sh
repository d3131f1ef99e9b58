#!/usr/bin/env bash
# From nothing to a deployed network: sets up the environment, pretrains a slim
# OREPA-ResNet-18 on real handwritten digits, tests it, switches it to its plain
# form, and tests that, beside a plain network that was trained as such. STACK=onedl in
# the environment picks the OneDL forks.
#
#   bash tools/quickstart.sh            the above
#   bash tools/quickstart.sh transfer   goes on from it: fine-tunes a detector and a
#                                       segmenter with that backbone, and deploys them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly CONFIG=configs/digits/resnet18-slim-orepa_1xb64_digits.py
readonly PLAIN_CONFIG=configs/digits/resnet18-slim_1xb64_digits.py
readonly DATA=data/digits
readonly WORK=work_dirs/quickstart
readonly EPOCHS=20
readonly DETECTOR=configs/digits/faster-rcnn_r18-slim-orepa_fpn_1xb2-10e_digits.py
readonly SEGMENTER=configs/digits/deeplabv3plus_r18-slim-orepa-d8_1xb8-2500_digits.py
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

# train_and_test CONFIG FOLDER: also leaves the time of the training, in the variable
# training_seconds.
train_and_test() {
  local config=$1 folder=$2 from=$SECONDS
  run "$folder/train.log" 'Epoch\((train|val)\)' \
    "$PYTHON" tools/train.py "$config" --work-dir "$folder/train" \
    --cfg-options train_cfg.max_epochs="$EPOCHS"
  training_seconds=$((SECONDS - from))

  step 'Testing the training form'
  run "$folder/test.log" 'Epoch\(test\).*accuracy' \
    "$PYTHON" tools/test.py "$config" "$folder/train/epoch_$EPOCHS.pth" \
    --work-dir "$folder/test" --out "$folder/test.json" --out-item metrics

  step 'Switching to the deployed form'
  "$PYTHON" tools/model_converters/switch_to_deploy.py "$config" \
    "$folder/train/epoch_$EPOCHS.pth" "$folder/deploy.pth" --json "$folder/switch.json"
}

pretrain() {
  local training_seconds
  SECONDS=0
  step 'Environment'
  bash tools/setup_env.sh

  step 'Data: handwritten digits'
  mkdir -p "$WORK/plain"
  # A run that is broken off must not leave the results of an older one behind.
  rm -rf "$WORK"/train "$WORK"/plain/train "$WORK"/summary.json
  "$PYTHON" tools/dataset_converters/digits.py --out "$DATA"

  step "Training a slim plain ResNet-18 for $EPOCHS epochs, to compare with"
  train_and_test "$PLAIN_CONFIG" "$WORK/plain"
  local plain_seconds=$training_seconds

  step "Training a slim OREPA-ResNet-18 for $EPOCHS epochs (about a minute)"
  train_and_test "$CONFIG" "$WORK"

  step 'Testing the deployed form'
  run "$WORK/test_deploy.log" 'Epoch\(test\).*accuracy' \
    "$PYTHON" tools/test.py "$CONFIG" "$WORK/deploy.pth" \
    --work-dir "$WORK/test" --out "$WORK/test_deploy.json" --out-item metrics \
    --cfg-options model.backbone.deploy=True

  step 'Summary'
  "$PYTHON" tools/analysis_tools/quickstart_summary.py "$WORK" \
    --seconds "$SECONDS" --training-seconds "$training_seconds" \
    --plain-training-seconds "$plain_seconds"
}

# fine_tune TASK CONFIG: trains, tests, switches, tests again and draws, all in
# $WORK/TASK.
fine_tune() {
  local task=$1 config=$2 folder=$WORK/$1 checkpoint
  local shown='mAP: |mIoU: |(Epoch|Iter)\(train\)'
  rm -rf "$folder"
  mkdir -p "$folder"
  run "$folder/train.log" "$shown" \
    "$PYTHON" tools/train.py "$config" --work-dir "$folder/train" \
    --cfg-options model.backbone.init_cfg.checkpoint="$WORK/train/epoch_$EPOCHS.pth"
  checkpoint=$(<"$folder/train/last_checkpoint")

  step 'Testing the training form'
  run "$folder/test.log" "$shown" \
    "$PYTHON" tools/test.py "$config" "$checkpoint" --work-dir "$folder/test" \
    --out "$folder/test.json" --out-item metrics

  step 'Switching to the deployed form'
  "$PYTHON" tools/model_converters/switch_to_deploy.py "$config" "$checkpoint" \
    "$folder/deploy.pth" --json "$folder/switch.json"

  step 'Testing the deployed form'
  run "$folder/test_deploy.log" "$shown" \
    "$PYTHON" tools/test.py "$config" "$folder/deploy.pth" --work-dir "$folder/test" \
    --out "$folder/test_deploy.json" --out-item metrics \
    --cfg-options model.backbone.deploy=True

  run "$folder/draw.log" '^Wrote' \
    "$PYTHON" tools/analysis_tools/draw_predictions.py "$config" "$checkpoint" \
    "$folder/deploy.pth" "$folder/predictions.png"
}

transfer() {
  if [[ ! -f $WORK/train/epoch_$EPOCHS.pth || ! -f $WORK/summary.json ]]; then
    pretrain
  fi
  step 'Environment, with the compiled operators that detection needs'
  bash tools/setup_env.sh --ops
  "$PYTHON" tools/dataset_converters/digits.py --out "$DATA"

  SECONDS=0
  step 'Fine-tuning a Faster R-CNN on scenes of several digits (minutes)'
  fine_tune det "$DETECTOR"
  local det_seconds=$SECONDS

  SECONDS=0
  step 'Fine-tuning a DeepLabV3+ on scenes of several digits (minutes)'
  fine_tune seg "$SEGMENTER"

  step 'Summary'
  "$PYTHON" tools/analysis_tools/transfer_summary.py "$WORK" \
    --det-seconds "$det_seconds" --seg-seconds "$SECONDS"
}

case ${1:-} in
  '') pretrain ;;
  transfer) transfer ;;
  *)
    echo "quickstart: unknown argument '$1'; known is 'transfer'" >&2
    exit 2
    ;;
esac
