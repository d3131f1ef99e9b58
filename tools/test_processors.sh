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

# Adds up what pytest counts of these kinds in its last line.
count() {
  awk -v kind="^($1),?$" '
    / in [0-9.]+s/ { n = 0; for (i = 2; i <= NF; i++) if ($i ~ kind) n += $(i - 1) }
    END { print n + 0 }' "$output"
}

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
  started=$SECONDS result=passed
  env "${environment[@]}" "$python" -m pytest "$@" 2>&1 | tee "$output" ||
    { result=FAILED status=1; }
  table+=("$(printf '%-58s %7d %7d %7d %7d  %s' "$variables" "$(count passed)" \
    "$(count 'failed|errors?')" "$(count skipped)" $((SECONDS - started)) $result)")
done

printf '\n%-58s %7s %7s %7s %7s\n' 'as another processor' passed failed skipped seconds
printf '%s\n' "${table[@]}"
exit $status
