#!/usr/bin/env bash
# Makes <repo>/.venv with everything the project needs. A second run changes nothing.
#   scripts/setup.sh             Detectron2 as a ready wheel from PyPI (no compiler needed)
#   scripts/setup.sh --official  Detectron2 built from its own repository (needs git and g++)
# Environment: PYTHON (python3.11), RETHINK_D2_MIN_FREE_GB (8).
set -euo pipefail

# Detectron2's main branch of 2024-04-17, and a re-publication of it on PyPI.
detectron2_url=https://github.com/facebookresearch/detectron2.git
detectron2_commit=a59f0563
wheel="sal-detectron2==0.7.2"
wheel_sha256=491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$here")
venv=$root/.venv
py=$venv/bin/python
log=$venv/setup.log
stamp=$venv/setup.stamp
tmp=$venv/setup.tmp

die() { echo "setup.sh: $*" >&2; exit 1; }

# Whether the venv has all these modules; isolated, so that the current directory does not count.
has() {
  [ -x "$py" ] && "$py" -I -c 'import importlib.util as u, sys
sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))' "$@" 2>/dev/null
}

# One line on why the stage that began after line $1 of the log failed.
explain() {
  local text; text=$(tail -n +"$(($1 + 1))" "$log")
  says() { grep -qE "$1" <<<"$text"; }
  if says "DO NOT MATCH THE HASHES"; then echo "the download is not the expected file (sha256 differs)"
  elif says "No space left"; then echo "the disk is full"
  elif says "Permission denied|Read-only file system"; then echo "no permission to write"
  elif says "Connection|Name or service|name resolution|resolve host|timed out"; then echo "no network"
  elif says "require a different python|requires a different Python"; then
    echo "a pinned version does not exist for this Python, set PYTHON=python3.11"
  elif says "Could not find a version|ResolutionImpossible"; then echo "no network, or the package index lacks a pinned version"
  elif says "Failed building|Failed to build|error: command"; then echo "compiling failed, is g++ installed?"
  else echo "unknown cause"; fi
}

# stage TEXT COMMAND...: one line of progress; the command's own output goes to the log.
stage() {
  local before; before=$(wc -l <"$log")
  echo "setup.sh: $1"; shift
  "$@" >>"$log" 2>&1 </dev/null || die "failed: $(explain "$before"); see $log"
}

flavour=default
case "$#:${1:-}" in
  0:) ;;
  1:--official) flavour=official ;;
  *) die "usage: scripts/setup.sh [--official]" ;;
esac

# The path counts too: an editable install of a moved checkout points nowhere.
# A hash by cksum is enough against forgetting, and it is on every machine.
state=$( (echo "$root"; cat "$here/requirements.txt" "$here/setup.sh" "$root/setup.py") | cksum | tr ' ' '-')
case "$(cat "$stamp" 2>/dev/null || true)" in
  "$state $flavour" | "$state official") # an official build also serves who did not ask for it
    if has detectron2 rethink_d2 torch; then echo "setup.sh: $venv is up to date"; exit 0; fi ;;
esac

unset PYTHONPATH PYTHONHOME # else pip takes packages of another Python for installed ones
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 GIT_TERMINAL_PROMPT=0

python=$py
if ! "$py" -m pip --version >/dev/null 2>&1; then python=${PYTHON:-python3.11}; fi
command -v "$python" >/dev/null || die "$python not found: install Python 3.11 or set PYTHON"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || die "$python does not run"
[[ $version == 3.* ]] && ((${version#3.} >= 11)) || die "$python is Python $version, 3.11 or newer is needed"
[ "$python" = "$py" ] || "$python" -c 'import ensurepip, venv' 2>/dev/null ||
  die "$python has no venv or pip: install them (Debian, Ubuntu: apt-get install python$version-venv)"

# Nearly all of the space is torch's.
need=${RETHINK_D2_MIN_FREE_GB:-8}
free=$(($(df -Pk "$root" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
has torch || ((free >= need)) ||
  die "only $free GB free at $root, $need are needed (RETHINK_D2_MIN_FREE_GB changes the limit)"

mkdir -p "$venv" 2>/dev/null || die "cannot write to $root"
rm -f "$stamp"
: >"$log"
# Temporary files lie on the disk that was checked, and moving them into place is atomic.
rm -rf "$tmp"; mkdir "$tmp"; trap 'rm -rf "$tmp"' EXIT
export TMPDIR=$tmp

if [ "$python" != "$py" ]; then
  stage "making $venv with Python $version" "$python" -m venv "$venv"
  "$py" -m pip --version >/dev/null 2>&1 || die "no pip in $venv: remove that folder and try again"
fi
pip() { "$py" -m pip "$@"; }

stage "installing requirements.txt (minutes, 6 GB)" pip install -r "$here/requirements.txt"

if [ $flavour = official ]; then
  command -v git >/dev/null || die "git not found, --official needs it"
  stage "fetching Detectron2 $detectron2_commit" git clone --quiet "$detectron2_url" "$tmp/detectron2"
  stage "checking it out" git -C "$tmp/detectron2" checkout --quiet "$detectron2_commit"
  # Built before the other one is removed: a failed build leaves what there was.
  stage "building it (minutes)" pip wheel --no-deps --no-build-isolation -w "$tmp/wheels" "$tmp/detectron2"
  stage "removing the other Detectron2" pip uninstall -y "${wheel%%==*}"
  stage "installing it" pip install --no-deps --force-reinstall "$tmp"/wheels/*.whl
elif ! has detectron2; then
  # The wheel is tagged cp310 for one compiled file that Detectron2 does without; --target makes pip take it.
  echo "$wheel --hash=sha256:$wheel_sha256" >"$tmp/detectron2.txt"
  site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  stage "installing Detectron2 ($wheel)" pip install --require-hashes -r "$tmp/detectron2.txt" --no-deps \
    --only-binary=:all: --implementation cp --python-version 3.10 --upgrade --target "$site"
fi

stage "installing rethink_d2" pip install --no-deps --no-build-isolation -e "$root"
has detectron2 rethink_d2 torch || die "failed: packages are missing after the installation; see $log"
echo "$state $flavour" >"$stamp"
echo "setup.sh: done, use $py"
