#!/usr/bin/env bash
# Runs the tests: all but the slow ones, or all with --all. Other arguments go to pytest (-m slow, a file, ...).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
select=(-m "not slow") # a later -m wins
if [ "${1:-}" = --all ]; then select=(-m ""); shift; fi
exec .venv/bin/python -m pytest "${select[@]}" "$@" # the folder comes from pyproject.toml
