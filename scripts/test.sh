#!/usr/bin/env bash
# Lint, types, contracts and tests, from nothing but Python: `bash scripts/test.sh [arguments for pytest]`.
# Without arguments: the unit tests, then those that run whole commands.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup.sh"
setup serve,report,dev "$root"
cd "$root"
export PATH="$root/.venv/bin:$PATH"
export OMP_NUM_THREADS=1  # two workers on two cores, and the processes that they start
ruff check .
ruff format --check .
mypy
lint-imports
if (($#)); then
  python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" "$@"
else
  python -m pytest -n 2 --dist loadfile
  python -m pytest -n 2 --dist loadfile -m whole
fi
