"""TRL's DPOTrainer with PEFT's LoRA on the benchmark's pairs: one epoch, printed as one line of JSON. Needs trl and peft.

    python bench/peers/trl_dpo.py --model=DIR --data=pairs.jsonl --precompute=0

A token counts once for each answer that it is read with: a prompt twice. Weights and compute are float32.
"""

import argparse
import json
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import trl
from clock import Clock
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--model", required=True)
p.add_argument("--data", required=True)
p.add_argument("--precompute", type=int, default=0)
a = p.parse_args()

clock = Clock()
trainer = trl.DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(a.model, dtype="float32"),
    args=trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        max_length=512,
        learning_rate=1e-4,
        precompute_ref_log_probs=bool(a.precompute),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=10**6,
        save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=load_dataset("json", data_files=a.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(a.model),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[clock],
)
held = trainer.train_dataset
tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in held)
trainer.train()

times = clock.times
steps, loop_s, steady_s = len(times) - 1, times[-1] - times[0], times[-1] - times[2]
print(
    json.dumps(
        {
            "tokens": tokens,
            "steps": steps,
            "tokens_per_s": tokens / loop_s,
            "steady_tokens_per_s": tokens * (steps - 2) / steps / steady_s,
        }
    )
)
