#!/usr/bin/env bash
# The main job, once: text and instructions -> a base model -> a fine-tuned model in Hugging Face format -> a chat.
# `make quickstart` runs it; each line is what one would type. Starts afresh: removes what an earlier one left.
set -euo pipefail
cd "$(dirname "$0")/../.."
Q=runs/quickstart
rm -rf "$Q"

say() { printf '\n\033[1m%s\033[0m  (%d s)\n' "$1" "$SECONDS"; }

say "1. A small bilingual world: prose to learn the words from, conversations to learn the work from"
python examples/quickstart/make_data.py --out="$Q"
python examples/quickstart/make_base.py --data="$Q" --out="$Q/init"

say "2. Pre-train a Qwen3 of 0.9 M parameters on the prose"
sftjax train --config=configs/pretrain.py --workdir="$Q/pretrain"
sftjax export --workdir="$Q/pretrain" --to=hf --out="$Q/base"

say "3. What the model will see: trained tokens in colour"
sftjax preview --config=configs/quickstart.py

say "4. Fine-tune it with LoRA; held-out questions are answered before and after"
sftjax train --config=configs/quickstart.py --workdir="$Q/sft"

say "5. Merge, write in Hugging Face format, load again and compare"
sftjax export --workdir="$Q/sft" --to=hf --out="$Q/model"

say "6. Chat with it"
questions=(
  "Translate into Chinese: Yesterday Mei bought three red apples at the market."
  "翻译成英文：去年爷爷在河边看见了五条大鱼。"
  "My sister had nine yellow hats and lost four. How many are left?"
)
printf '> %s\n' "${questions[@]}"
printf '%s\n/reset\n' "${questions[@]}" | sftjax chat --model="$Q/model" # it has learnt to answer one question at a time

say "Done. Open $Q/sft/report.html; the same config takes any model: --config.model.path=Qwen/Qwen3-0.6B"
