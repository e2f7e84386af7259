#!/usr/bin/env bash
# Installs if needed, then runs the breakdown with few images in miniature; relative paths are the caller's.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" -m rethink_d2.quickstart --figure 8 "$@"
