"""TRL and PEFT on one case of bench/train.py, as one line of JSON. Needs torch with CUDA, trl, peft; for qlora bitsandbytes.

    python bench/peers/trl_train.py '{"raw": {...}, "method": "lora", "rows": 4, "length": 4096, "remat": "minimal", "steps": 10}'

The model is made on the device with random weights, in bfloat16; for qlora it is written to a temporary folder and read again in
NF4 with double quantisation, as bitsandbytes has it. The texts have the lengths of bench/train.py's, and TRL packs them.
Attention is FlashAttention 2 where it is installed, else SDPA. Activations are recomputed: kept, these shapes have no room.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(raw, method, rows, length, remat, steps):
    import importlib.util

    import torch

    missing = [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not measured: {', '.join(missing)} not installed")
    if length > 256 and not torch.cuda.is_available():
        sys.exit("not measured: torch has no CUDA device here")
    import trl
    from clock import Clock
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from train import TRAINED, texts
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

    gpu = torch.cuda.is_available()
    flash = gpu and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    config = AutoConfig.for_model(**raw)
    kept = torch.float32 if method == "full" else torch.bfloat16
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=kept, attn_implementation=attention)
    if method == "qlora":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            torch.cuda.empty_cache()
            small = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=kept, attn_implementation=attention, quantization_config=small, device_map="cuda"
            )
    if method != "full":
        model.enable_input_require_grads()
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    lengths = [n for row in texts(rows, length) for n in row]
    once = [{"input_ids": [3] * n, "completion_mask": [int(i >= n * (1 - TRAINED)) for i in range(n)]} for n in lengths]
    clock = Clock()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=rows,
            max_steps=steps + 2,
            max_length=length,
            packing=True,
            padding_free=flash,
            learning_rate=1e-5,
            bf16=True,
            use_cpu=not gpu,
            gradient_checkpointing=remat != "none",
            report_to=[],
            logging_steps=10**6,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(once * (steps + 2)),
        processing_class=tokenizer(PreTrainedTokenizerFast, config.vocab_size),
        callbacks=[clock],
    )
    per_step = sum(map(len, trainer.train_dataset["input_ids"])) / len(trainer.train_dataset) * rows
    trainer.train()
    times = clock.times
    step_s = (times[-1] - times[2]) / steps
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if gpu else "cpu",
                "length": length,
                "step_s": step_s,
                "tokens_per_s": per_step / step_s,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
                "compile_s": times[2] - times[0] - 2 * step_s,
                "attention": attention,
            }
        )
    )


def tokenizer(kind, vocab):
    """One that is asked nothing: the rows are ids already."""
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({str(i): i for i in range(min(vocab, 64))}, unk_token="0"))
    return kind(tokenizer_object=made, eos_token="1", pad_token="2", unk_token="0")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
