"""placeholder"""

from ml_collections import ConfigDict

from sftjax.config import default


def get_config() -> ConfigDict:
    c = default()
    c.task = "classify"
    c.classify.by = "head"
    c.classify.class_weights = "none"
    c.model.path = "Qwen/Qwen3-0.6B"

    c.method = "lora"
    c.lora.rank = 16

    c.data.train = ("reviews.csv",)
    c.data.format = "label"
    c.data.max_length = 512
    c.data.on_overlong = "truncate"

    c.optim.lr = 2e-4
    c.train.epochs = 2.0
    c.train.batch_size = 16
    return c
