#!/usr/bin/env bash
# Would a better prompt have done? The quickstart's base and its tuned model, three prompts, 200 translations that neither
# has seen. `make compare` runs it; run again, it asks only what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d runs/quickstart/model ] || bash examples/quickstart/run.sh
C=runs/compare

python examples/quickstart/make_data.py --documents=0 --seed=2 --out="$C"
python examples/compare/make_data.py --data="$C" --without=runs/quickstart
sftjax compare --model=runs/quickstart/base --model=tuned=runs/quickstart/model \
  --prompts=examples/compare/prompts.yaml --data="$C/questions.jsonl" --rows=200 --max-new-tokens=48 --out="$C/out"
