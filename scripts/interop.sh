#!/usr/bin/env bash
# Opens our exports with GPTQModel and with llm-compressor's loader, and compares weights bit for bit; then sets our GPTQ
# solver beside llm-compressor's, code by code. `bash scripts/interop.sh [arguments of interop.py]`. Environments are
# shared with scripts/reproduce/ptq.sh, by WORK.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup.sh"
source "$root/scripts/reproduce/peers/environments.sh"
setup serve,report "$root"
cd "$root"
work=${WORK:-$root/runs/peers}
mkdir -p "$work/venvs"
peers=()
for peer in llmcompressor gptqmodel; do
  if environment "$peer" "$work/venvs" "$root/.venv/bin/python"; then peers+=("$peer"); else echo "$peer does not install" >&2; fi
done
.venv/bin/python scripts/interop.py --venvs "$work/venvs" --work "$work/interop" "$@" -- "${peers[@]}"
if [[ " ${peers[*]} " == *" llmcompressor "* ]]; then
  .venv/bin/python scripts/solvers.py --venvs "$work/venvs" --work "$work/solvers"
fi
