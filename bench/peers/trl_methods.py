"""TRL and PEFT on the benchmark's case: one epoch, printed as one line of JSON. Needs trl and peft, qlora bitsandbytes too.

    python bench/peers/trl_methods.py --case=CASE --method=qlora --packing=0

Weights that train are float32 and so is compute; `--bf16=1` is bfloat16 compute over them, for accelerators.
"""

import argparse
import json
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
from clock import Clock
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--case", required=True)
p.add_argument("--method", default="lora", choices=["lora", "dora", "qlora", "full"])
p.add_argument("--packing", type=int, default=0)
p.add_argument("--bf16", type=int, default=0)
a = p.parse_args()

gpu = torch.cuda.is_available()
dtype = torch.bfloat16 if a.bf16 else torch.float32
options = {}
if a.method == "qlora":
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
kept = dtype if a.method != "full" else torch.float32
model = AutoModelForCausalLM.from_pretrained(f"{a.case}/model", dtype=kept, device_map="cuda" if gpu else "cpu", **options)
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=a.method == "dora", task_type="CAUSAL_LM")

clock = Clock()
trainer = trl.SFTTrainer(
    model=model,
    args=trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        max_length=512,
        packing=bool(a.packing),
        learning_rate=1e-4,
        bf16=bool(a.bf16),
        use_cpu=not gpu,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=10**6,
        save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=load_dataset("json", data_files=f"{a.case}/train.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained(f"{a.case}/model"),
    peft_config=None if a.method == "full" else lora,
    callbacks=[clock],
)
for weight in trainer.model.parameters():
    if weight.requires_grad:
        weight.data = weight.data.float()  # TRL rounds LoRA's to bfloat16 over a quantised base
tokens = sum(map(len, trainer.train_dataset["input_ids"]))
trainer.train()

times = clock.times
steps, loop_s, steady_s = len(times) - 1, times[-1] - times[0], times[-1] - times[2]
print(
    json.dumps(
        {
            "tokens": tokens,
            "steps": steps,
            "loop_s": loop_s,
            "tokens_per_s": tokens / loop_s,
            "steady_tokens_per_s": tokens * (steps - 2) / steps / steady_s,
            "peak_gpu_mib": torch.cuda.max_memory_allocated() // 2**20 if gpu else None,
        }
    )
)
