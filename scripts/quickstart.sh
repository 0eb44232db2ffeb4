#!/usr/bin/env bash
# From nothing but Python to a verified 4-bit checkpoint: `bash scripts/quickstart.sh [overrides]`.
# EXPERIMENT=smoke takes the shortest road. Repeating it goes on where an interrupted run stopped.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup.sh"
setup serve,report "$root"
cd "$root"
echo "qat run experiment=${EXPERIMENT:-quickstart} $*"
.venv/bin/python -m qat run experiment="${EXPERIMENT:-quickstart}" "$@"
echo "Before these, in your shell:"
echo "  cd $root && . .venv/bin/activate"
