#!/usr/bin/env bash
# PPO and GRPO, once: a model that says short and long-winded answers alike learns from a reward model to say the short ones.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d runs/quickstart/model ] || bash examples/quickstart/run.sh
P=runs/preferences
rm -rf "$P"/undecided* "$P"/judge* "$P"/ppo* "$P"/grpo*

python examples/quickstart/make_data.py --documents=0 --seed=1 --out="$P"
python examples/preferences/make_data.py --data="$P"
sftjax train --config=configs/quickstart.py --workdir="$P/undecided_run" --config.model.path=runs/quickstart/model \
  --config.data.train="$P/undecided.jsonl" --config.train.steps=100 --config.eval.generate=0
sftjax export --workdir="$P/undecided_run" --to=hf --out="$P/undecided" # the policy to begin with
sftjax train --config=configs/reward.py --workdir="$P/judge_run" --config.model.path="$P/undecided"
sftjax export --workdir="$P/judge_run" --to=peft --out="$P/judge" # the reward model, an adapter over the same
for task in ppo grpo; do
  sftjax train --config="configs/$task.py" --workdir="$P/$task"
  sftjax export --workdir="$P/$task" --to=hf --out="$P/${task}_model"
done
question="Mei had eight white birds and sold four. How many are left?" # a held-out one
for model in "$P/undecided" "$P/ppo_model" "$P/grpo_model"; do
  echo "> $question"
  echo "$question" | sftjax chat --model="$model"
done
