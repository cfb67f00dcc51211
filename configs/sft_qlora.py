"""QLoRA: LoRA over a base in four bits, for a model that would not fit otherwise. arXiv:2305.14314.

    sftjax train  --config=configs/sft_qlora.py --config.data.train=mine.jsonl --workdir=runs/qlora
    sftjax export --workdir=runs/qlora --to=hf --out=mine
    sftjax export --workdir=runs/qlora --to=peft --out=mine-adapter

Hardware: a frozen kernel takes 4.13 bits a parameter and is quantised while it is read. For Llama 3's 8 B shape at rank 8 and
two rows of 2048 tokens the TPU's compiler lays out 7.52 GiB in all, of which 5.55 are parameters and moments, embedding and
head in bfloat16 among them; 6.57 GiB with `--config.model.remat=offload` (bench/results/memory.md):

    python bench/memory.py --shapes llama3-8b --methods qlora --rows=2 --chip=v5e:1x1
    python bench/memory.py --shapes llama3-8b --methods qlora --rows=2 --remat=offload --chip=v5p:1x1x1

That is a layout and no run: no accelerator has been timed yet, and the loss to expect depends on the data; the report of the
run shows it before and after. Merging needs the model in 16 bits: `JAX_PLATFORMS=cpu sftjax export ...` does it in the host's
memory. `--config.lora.dora=true` makes it QDoRA, `--config.model.quantize=int8` takes 8 bits.
"""

from ml_collections import ConfigDict

from sftjax.config import default


def get_config() -> ConfigDict:
    c = default()
    c.model.path = "Qwen/Qwen3-8B"
    c.model.quantize = "nf4"
    c.model.remat = "block"  # each layer again in the backward pass: its input is all that is kept

    c.method = "lora"
    c.lora.rank = 16
    c.lora.alpha = 32.0
    c.lora.targets = "all-linear"

    c.data.train = ("mine.jsonl",)
    c.data.max_length = 2048

    c.optim.lr = 2e-4
    c.optim.warmup = 0.03

    c.train.epochs = 3.0
    c.train.batch_size = 16
    c.train.micro_batch = 2  # rows on the device at a time
    c.eval.generate = 20
    return c
