#!/usr/bin/env bash
# The quality table of the README: `bash scripts/reproduce/quality.sh [arguments of quality.py]`. Repeated, it goes on.
# WORK is where texts and tokens are kept; ARGS after `--` are overrides, such as model.path=FILE.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/scripts/setup.sh"
setup serve,report "$root"
cd "$root"
work=${WORK:-$root/runs/quality}
python=.venv/bin/python
mkdir -p "$work"
[ -d "$work/prose/wives" ] || $python scripts/reproduce/texts.py "$work/prose"
if [ ! -d "$work/tokens" ]; then
  $python -m qat run experiment=smoke dry_run=true logger=none resume=never runs="$work/runs"
  run=$(ls -d "$work"/runs/smoke/*/ | tail -1)  # a dry run is not the latest
  cp -r "$($python -c "import json, sys; print(json.load(open(sys.argv[1]))['data']['path'])" "$run/run.json")" "$work/tokens"
fi
[ -f "$work/generated/manifest.json" ] \
  || $python -m qat generate out="$work/generated" tokens=6000000 sequences=4096 seed=77
[ -f "$work/domain/manifest.json" ] \
  || $python -m qat generate out="$work/domain" tokens=6000000 sequences=4096 seed=78 prompt.path="$work/tokens"
$python scripts/reproduce/quality.py --json scripts/results/quality.json --tokens "$work/tokens" \
  --generated "$work/generated" --more "$work/domain" --prose "$work/prose" --work "$work/cells" "$@"
$python scripts/reproduce/quality_table.py scripts/results/quality.json scripts/results/quality_ct.json
