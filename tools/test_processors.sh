#!/usr/bin/env bash
# Runs the tests as on other processors: on request PyTorch, oneDNN and MKL do without
# newer instructions, and add up in another order. Goes on after a failure, and prints a
# table at the end. Arguments go to pytest, as in:
#   bash tools/test_processors.sh -m 'not slow' tests/layers
# --quick, before them, leaves the tests that rounding touches most, on the oldest
# processor alone.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV=${VENV:-$PWD/.venv}
python=$VENV/bin/python

# What the machine has to have, and what PyTorch and its libraries are told.
SETTINGS=(
  'DEFAULT ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41'
  'AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2'
  'AVX512 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE'
  'DEFAULT MKL_ENABLE_INSTRUCTIONS=SSE4_2'
  'DEFAULT MKL_CBWR=COMPATIBLE'
  'DEFAULT OMP_NUM_THREADS=2'
)
case ${1:-} in
  --quick)
    shift
    SETTINGS=("${SETTINGS[0]}")
    set -- tests/{functional,layers,backbones,deployment,test_goldens.py} \
      -m 'not slow' "$@"
    ;;
esac

bash tools/setup_env.sh --ops --tests
capability=$("$python" -c \
  'import torch; print(torch.backends.cpu.get_cpu_capability())')
output=$(mktemp)
trap 'rm -f "$output"' EXIT

table=() status=0
for setting in "${SETTINGS[@]}"; do
  read -r needed variables <<<"$setting"
  case $needed-$capability in
    DEFAULT-* | AVX2-AVX2 | AVX2-AVX512 | AVX512-AVX512) ;;
    *) continue ;;
  esac
  printf '\n==> %s\n' "$variables"
  # shellcheck disable=SC2206 # One word for each variable.
  environment=(OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $variables)
  # Of these instructions. Without a compiler, what takes them is skipped.
  env "${environment[@]}" "$python" tools/build_fold.py || true
  env "${environment[@]}" "$python" -m pytest "$@" 2>&1 | tee "$output" || status=1
  # What pytest counts is in its last line.
  table+=("$(printf '%-58s %s' "$variables" "$(tail -n 1 "$output")")")
done

printf '\n%s\n' 'as another processor:' "${table[@]}"
exit $status
