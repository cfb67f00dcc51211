#!/usr/bin/env bash
# Preferences, once: the quickstart's model learns to stop when the question is answered. `make preferences` runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d runs/quickstart/model ] || bash examples/quickstart/run.sh
P=runs/preferences
rm -rf "$P"

python examples/quickstart/make_data.py --documents=0 --seed=1 --out="$P"
python examples/preferences/make_data.py --data="$P"
sftjax preview --config=configs/dpo.py
sftjax train --config=configs/dpo.py --workdir="$P/dpo"
sftjax export --workdir="$P/dpo" --to=hf --out="$P/model"
sftjax train --config=configs/reward.py --workdir="$P/reward" # the same pairs as a reward model
sftjax export --workdir="$P/reward" --to=hf --out="$P/reward_model"
sftjax eval --model="$P/reward_model" --data="$P/pairs.jsonl"
question="My sister had nine yellow hats and lost four. How many are left?"
for model in runs/quickstart/model "$P/model"; do
  echo "> $question"
  echo "$question" | sftjax chat --model="$model"
done
