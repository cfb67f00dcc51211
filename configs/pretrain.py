"""Pre-training on plain text: every row is filled, every token trained.

    python examples/quickstart/make_data.py && python examples/quickstart/make_base.py
    sftjax train  --config=configs/pretrain.py --workdir=runs/quickstart/pretrain
    sftjax export --workdir=runs/quickstart/pretrain --to=hf --out=runs/quickstart/base

As it stands it is the quickstart's: 0.9 M parameters from random weights, 600 steps of 1,024 tokens, under a minute on
two CPU cores; the eval loss goes from 7.13 to 0.436 (half a line is news; its translation is nearly free). To go on with a
model of one's own, give --config.model.path, --config.data.train=mine.txt, and what fits a larger one:
--config.optim.lr=1e-4 --config.data.max_length=2048 --config.model.remat=minimal.
"""

from ml_collections import ConfigDict

from sftjax.config import default


def get_config() -> ConfigDict:
    c = default()
    c.task = "pretrain"
    c.method = "full"
    c.model.path = "runs/quickstart/init"  # a Hugging Face directory whose weights are random

    c.data.train = ("runs/quickstart/text.txt",)
    c.data.split = (98, 1, 1)
    c.data.max_length = 128

    c.optim.lr = 3e-3
    c.optim.b2 = 0.95

    c.train.steps = 600
    c.train.batch_size = 8
    c.train.log_every = 50
    c.train.eval_every = 0
    c.train.save_every = 0
    return c
