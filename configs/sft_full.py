"""Full fine-tuning: every parameter trains, in float32 masters.

    sftjax train --config=configs/sft_full.py --config.data.train=mine.jsonl --workdir=runs/full

Hardware: parameters, gradients and two moments in float32 are 16 bytes a parameter: 0.6 B needs about 10 GB beside the
activations. `--config.mesh.fsdp=8` spreads all of it over 8 devices.
"""

from ml_collections import ConfigDict

from sftjax.config import default


def get_config() -> ConfigDict:
    c = default()
    c.model.path = "Qwen/Qwen3-0.6B"
    c.model.remat = "block"

    c.method = "full"

    c.data.train = ("mine.jsonl",)
    c.data.max_length = 2048

    c.optim.lr = 1e-5
    c.optim.weight_decay = 0.01
    c.optim.warmup = 0.03

    c.train.epochs = 2.0
    c.train.batch_size = 16
    c.train.micro_batch = 4  # four passes a step, summed by tokens
    c.loss.neftune_alpha = 5.0
    return c
