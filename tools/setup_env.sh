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
  site=$venv/lib/python3*/site-packages
  # One file per finished step. It holds the text of all that the step depends on, so
  # that a change of a requirements file makes the step run again.
  state=$venv/.mmorepa
  log=$state/setup.log
}

# ---- steps -------------------------------------------------------------------------

# step NAME KEY DESCRIPTION COMMAND…: runs the command unless NAME was finished with KEY.
step() {
  local name=$1 key=$2 description=$3
  shift 3
  if [[ -f $state/$name && $(<"$state/$name") == "$key" ]]; then
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

open_environment() {
  if [[ -d $venv && ! -d $state && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
    fail "$venv exists and is not a virtual environment; set VENV to another folder"
  fi
  if [[ ! -f $state/venv ]]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
      fail "'${PYTHON:-python3}' is no Python 3.10 or later; set PYTHON to one"
  fi
  mkdir -p "$state"
  # Two runs at once would install over each other. Where flock is missing (macOS), the
  # user has to see to that.
  if command -v flock >/dev/null; then
    exec 9>"$state/lock"
    flock --nonblock 9 || { echo "Waiting for another set-up of $venv" && flock 9; }
  fi
}

# Both stacks have the same import names.
check_stack() {
  local other
  case $stack in
    openmmlab) other=onedl_mm* ;;
    onedl) other=mmengine-* ;;
  esac
  ! compgen -G "$site/$other.dist-info" >/dev/null ||
    fail "$venv holds another stack than '$stack'; remove it or set VENV to another folder"
}

create_venv() {
  # One that was made by hand stays as it is.
  "$python" -m pip --version 2>/dev/null || "${PYTHON:-python3}" -m venv "$venv"
}

# pip writes a package's RECORD last. Without it pip takes the package for installed,
# and can neither complete nor remove it.
drop_half_installed() {
  local folder
  for folder in "$venv"/lib/python3*/site-packages/*.dist-info; do
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
  compgen -G "$site/mmcv/_ext*.so" >/dev/null &&
    compgen -G "$site/*mmcv-*.dist-info/RECORD" >/dev/null
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
  if [[ $with_ops == true || -f $state/mmcv-ops ]]; then
    rm -f "$state/mmcv-lite"
    has_ops || rm -f "$state/mmcv-ops"
    step mmcv-ops "$(text_of torch "$stack-ops")" \
      'Compile and install mmcv with operators (3 to 6 minutes)' install_mmcv_with_ops
  elif ! has_ops; then
    step mmcv-lite "$(text_of "$stack-lite")" 'Install mmcv without operators (15 s)' \
      install_mmcv_without_ops
  fi
}

# ---- all of it ---------------------------------------------------------------------

install_package() {
  pip_install --no-build-isolation --no-deps --editable "$ROOT"
}

# Without a compiler everything works, training on a CPU more slowly.
set_up_fold() {
  echo '==> Compile the folds for this CPU (30 s, unless they are in the cache)'
  "$python" "$ROOT/tools/build_fold.py" >>"$log" 2>&1 ||
    echo '    Not compiled: folds run as operations of PyTorch'
}

main() {
  parse_arguments "$@"
  trap 'exit 130' INT TERM
  open_environment
  check_stack
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
