"""LoRA on a chat model: the config to start from.

    sftjax preview --config=configs/sft_lora.py --config.data.train=mine.jsonl
    sftjax train   --config=configs/sft_lora.py --config.data.train=mine.jsonl --workdir=runs/mine
    sftjax export  --workdir=runs/mine --to=hf --out=mine

Hardware: `sftjax plan --config=configs/sft_lora.py --topology=v5e-1` (or v6e-8, h100, ... as you have it) puts Qwen3-0.6B at 14.6
of a TPU v5e's 15.75 GiB, at 3.5 with --config.model.remat=block, which computes more twice. A model of a few million parameters
trains on a CPU. A checkpoint of any family in the README takes its place.
"""

from ml_collections import ConfigDict

from sftjax.config import default


def get_config() -> ConfigDict:
    c = default()
    c.model.path = "Qwen/Qwen3-0.6B"
    c.model.remat = "minimal"

    c.method = "lora"
    c.lora.rank = 16
    c.lora.alpha = 32.0
    c.lora.targets = "all-linear"

    c.data.train = ("mine.jsonl",)  # Alpaca, ShareGPT, messages, prompt + completion, text + label: found out by itself
    c.data.max_length = 2048

    c.optim.lr = 2e-4
    c.optim.schedule = "cosine"
    c.optim.warmup = 0.03

    c.train.epochs = 3.0
    c.train.batch_size = 8
    c.eval.generate = 20  # held-out prompts answered before and after, side by side in the report
    return c
