#!/usr/bin/env bash
# Sets up a virtual environment in which mmorepa runs, or brings it up to date.
# What is already there is left alone; what was interrupted is taken up again.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REQUIREMENTS=$ROOT/requirements
readonly ROOT REQUIREMENTS

usage() {
  cat <<'END'
Usage: bash tools/setup_env.sh [--ops] [--tests]

  --ops      mmcv with its compiled operators (NMS, RoIAlign, …), which detection
             needs; compiled once, in 3 to 6 minutes on 2 cores, then kept in a cache
  --tests    what the tests, the style checks and the documentation site need
  --help     this text

Environment variables:
  STACK      openmmlab (default) or onedl, the maintained forks; one per environment
  VENV       folder of the environment (default: .venv in the repository root)
  PYTHON     interpreter to create it with (default: python3)
  MMOREPA_CACHE  where what was compiled is kept (default: ~/.cache/mmorepa)
END
}

fail() {
  printf 'setup_env: %s\n' "$*" >&2
  exit 1
}

parse_arguments() {
  with_ops=false
  with_tests=false
  local argument
  for argument in "$@"; do
    case $argument in
      --ops) with_ops=true ;;
      --tests) with_tests=true ;;
      -h | --help) usage && exit 0 ;;
      *) fail "unknown argument '$argument'; known are --ops, --tests and --help" ;;
    esac
  done

  stack=${STACK:-openmmlab}
  case $stack in
    openmmlab | onedl) ;;
    *) fail "STACK is '$stack'; it must be openmmlab or onedl" ;;
  esac

  venv=${VENV:-$ROOT/.venv}
  [[ $venv == /* ]] || venv=$PWD/$venv
  python=$venv/bin/python
  # One file per finished step. It holds the text of all that the step depends on, so
  # that a change of a requirements file makes the step run again.
  state=$venv/.mmorepa
  log=$state/setup.log
}

# ---- steps -------------------------------------------------------------------------

is_done() {
  local name=$1 key=$2
  [[ -f $state/$name && $(<"$state/$name") == "$key" ]]
}

# step NAME KEY DESCRIPTION COMMAND…: runs the command unless NAME was finished with KEY.
step() {
  local name=$1 key=$2 description=$3
  shift 3
  if is_done "$name" "$key"; then
    return
  fi
  rm -f "$state/$name"
  printf '==> %s\n' "$description"
  printf '\n==> %s\n' "$description" >>"$log"
  local started=$SECONDS
  if ! "$@" >>"$log" 2>&1; then
    tail -n 25 "$log" | cut -c -300 >&2
    fail "failed: $description. The lines above end the log, $log"
  fi
  printf '    done in %d s\n' $((SECONDS - started))
  printf '%s\n' "$key" >"$state/$name.part"
  mv "$state/$name.part" "$state/$name"
}

text_of() {
  local name
  for name in "$@"; do
    cat "$REQUIREMENTS/$name.txt"
  done
}

pip_install() {
  "$python" -m pip install --progress-bar off --disable-pip-version-check "$@"
}

# ---- the environment ---------------------------------------------------------------

check_python() {
  local interpreter=$1
  command -v "$interpreter" >/dev/null ||
    fail "no interpreter '$interpreter'; set PYTHON to a Python 3.10 or later"
  "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$interpreter" --version 2>&1) is too old for torch; set PYTHON to 3.10 or later"
}

open_environment() {
  if [[ -d $venv && ! -d $state && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
    fail "$venv exists and is not a virtual environment; set VENV to another folder"
  fi
  [[ -f $state/venv ]] || check_python "${PYTHON:-python3}"
  mkdir -p "$state"
  # Two runs at once would install over each other. Where flock is missing (macOS), the
  # user has to see to that.
  if command -v flock >/dev/null; then
    exec 9>"$state/lock"
    if ! flock --nonblock 9; then
      echo "Waiting for another set-up of $venv to finish"
      flock 9
    fi
  fi
}

site_packages() {
  local folder
  for folder in "$venv"/lib/python3*/site-packages; do
    if [[ -d $folder ]]; then
      printf '%s' "$folder"
    fi
  done
}

installed_stack() {
  if [[ -f $state/stack-name ]]; then
    cat "$state/stack-name"
  elif compgen -G "$(site_packages)/onedl_mm*.dist-info" >/dev/null; then
    echo onedl
  elif compgen -G "$(site_packages)/mmengine-*.dist-info" >/dev/null; then
    echo openmmlab
  fi
}

check_stack() {
  local found
  found=$(installed_stack)
  [[ -z $found || $found == "$stack" ]] ||
    fail "$venv holds the stack '$found', not '$stack'; remove it or set VENV to another folder"
}

create_venv() {
  # One that was made by hand stays as it is.
  "$python" -m pip --version 2>/dev/null || "${PYTHON:-python3}" -m venv "$venv"
}

# pip writes a package's RECORD last. Without it pip takes the package for installed,
# and can neither complete nor remove it.
drop_half_installed() {
  local folder
  for folder in "$(site_packages)"/*.dist-info; do
    if [[ -d $folder && ! -f $folder/RECORD ]]; then
      echo "Dropping the half-installed ${folder##*/}"
      rm -r "$folder"
    fi
  done
}

install_requirements() {
  local arguments=() name
  for name in "$@"; do
    arguments+=(-r "$REQUIREMENTS/$name.txt")
  done
  drop_half_installed &&
    pip_install "${arguments[@]}" -c "$REQUIREMENTS/torch.txt" -c "$REQUIREMENTS/build.txt"
}

# ---- mmcv --------------------------------------------------------------------------

# The RECORD tells a finished installation from an interrupted one.
has_ops() {
  compgen -G "$(site_packages)/mmcv/_ext*.so" >/dev/null &&
    compgen -G "$(site_packages)/*mmcv-*.dist-info/RECORD" >/dev/null
}

# The distributions share one folder: whichever is there has to go first.
replace_mmcv() {
  drop_half_installed &&
    "$python" -m pip uninstall -y mmcv mmcv-lite onedl-mmcv &&
    pip_install "$@"
}

# What was compiled before is taken from a cache.
install_mmcv_with_ops() {
  local wheel
  wheel=$("$python" "$ROOT/tools/build_mmcv.py" --stack "$stack") &&
    replace_mmcv "$wheel" -c "$REQUIREMENTS/torch.txt" -c "$REQUIREMENTS/build.txt" &&
    "$python" -c 'import mmcv.ops'
}

install_mmcv_without_ops() {
  # The cache may hold a wheel that somebody compiled against another torch.
  replace_mmcv --no-cache-dir -r "$REQUIREMENTS/$stack-lite.txt" \
    -c "$REQUIREMENTS/torch.txt" -c "$REQUIREMENTS/build.txt"
}

set_up_mmcv() {
  local ops_key lite_key
  ops_key=$(text_of torch "$stack-ops")
  lite_key=$(text_of "$stack-lite")
  if is_done mmcv-ops "$ops_key" && has_ops; then
    return
  fi
  if [[ $with_ops == true || -f $state/mmcv-ops ]]; then
    rm -f "$state/mmcv-lite" "$state/mmcv-ops"
    step mmcv-ops "$ops_key" 'Compile and install mmcv with operators (3 to 6 minutes)' \
      install_mmcv_with_ops
  elif ! has_ops; then
    step mmcv-lite "$lite_key" 'Install mmcv without operators (15 s)' \
      install_mmcv_without_ops
  fi
}

# ---- all of it ---------------------------------------------------------------------

install_package() {
  pip_install --no-build-isolation --no-deps --editable "$ROOT"
}

# Without a compiler everything works, training on a CPU more slowly.
build_fold() {
  rm -f "$state/fold-library"
  if "$python" "$ROOT/tools/build_fold.py" >"$state/fold-library.part"; then
    mv "$state/fold-library.part" "$state/fold-library"
  else
    echo 'Not compiled: folds run as operations of PyTorch'
  fi
}

set_up_fold() {
  local sources=("$ROOT"/mmorepa/functional/{csrc/fold.cpp,compiled.py})
  if [[ ! -f $state/fold-library || ! -f $(<"$state/fold-library") ]]; then
    rm -f "$state/fold"
  fi
  # By ATEN_CPU_CAPABILITY, PyTorch and the folds take another CPU's instructions.
  local place="${MMOREPA_CACHE:-} ${ATEN_CPU_CAPABILITY:-}"
  step fold "$(text_of torch && cat "${sources[@]}" && uname -n && echo "$place")" \
    'Compile the folds for this CPU (30 s)' build_fold
}

main() {
  parse_arguments "$@"
  trap 'exit 130' INT TERM
  open_environment
  check_stack
  printf '%s\n' "$stack" >"$state/stack-name"
  echo "Environment: $venv, log: $log"

  step venv '' "Create the environment in $venv (5 s)" create_venv
  step build "$(text_of build)" 'Install pip, setuptools and ninja (10 s)' \
    install_requirements build
  step torch "$(text_of torch)" 'Install torch (2 minutes, 5.5 GB)' \
    install_requirements torch
  step "$stack" "$(text_of torch build "$stack" optional)" \
    "Install the $stack stack (1 minute)" install_requirements "$stack" optional
  set_up_mmcv
  if [[ $with_tests == true ]]; then
    step tests "$(text_of tests docs)" 'Install what the tests need (15 s)' \
      install_requirements tests docs
  fi
  step package "$(cat "$ROOT"/{setup.py,pyproject.toml,mmorepa/version.py} && echo "$ROOT")" \
    'Install mmorepa from this folder (5 s)' install_package
  set_up_fold
  echo "Ready. To use it: source $venv/bin/activate"
}

main "$@"
