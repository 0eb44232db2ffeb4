#!/usr/bin/env bash
# The table "ours against peers": `bash scripts/reproduce/ptq.sh [arguments of ptq_peers.py]`. Repeated, it goes on.
# On a GPU: --device cuda --samples 128 --steps 208 --json scripts/results/ptq_peers_gpu.json --tools qat llmcompressor autoround
# WORK is where environments and weights are kept. Every peer gets an environment of its own; one that does not install
# is said and left out. TORCH must be a build that the peers' pins allow: where the index has CUDA builds only under that
# name, a CPU build is TORCH=torch==2.13.0+cpu with PIP_EXTRA_INDEX_URL naming the index that has it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/scripts/setup.sh"
source "$root/scripts/reproduce/peers/environments.sh"
setup serve,report "$root"
cd "$root"
work=${WORK:-$root/runs/peers}
python=$root/.venv/bin/python
mkdir -p "$work"
tools=(qat)
for peer in llmcompressor autoround gptqmodel; do
  if environment "$peer" "$work/venvs" "$python"; then tools+=("$peer"); else echo "$peer does not install" >&2; fi
done
if [ ! -d "$work/tokens" ]; then
  $python -m qat run experiment=smoke dry_run=true logger=none resume=never runs="$work/runs"
  run=$(ls -d "$work"/runs/smoke/*/ | tail -1)  # a dry run is not the latest
  cp -r "$($python -c "import json, sys; print(json.load(open(sys.argv[1]))['data']['path'])" "$run/run.json")" "$work/tokens"
fi
$python scripts/reproduce/ptq_peers.py --json scripts/results/ptq_peers.json --tokens "$work/tokens" \
  --venvs "$work/venvs" --work "$work/weights" --tools "${tools[@]}" "$@"
