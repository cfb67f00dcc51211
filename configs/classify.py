"""Classification by generating the label: rows with a text and a label, in CSV, TSV or JSON lines.

    sftjax train --config=configs/classify.py --config.data.train=reviews.csv --workdir=runs/reviews
    sftjax train --config=configs/classify.py --config.data.train=reviews.csv \\
        --config.data.columns.text=review --config.data.columns.label=stars --workdir=runs/reviews

summary.json holds the accuracy on held-out rows, before and after, as exact_match, and macro-F1.
"""

from ml_collections import ConfigDict

from sftjax.config import default


def get_config() -> ConfigDict:
    c = default()
    c.task = "classify"
    c.model.path = "Qwen/Qwen3-0.6B"
    c.model.remat = "minimal"

    c.method = "lora"
    c.lora.rank = 16

    c.data.train = ("reviews.csv",)
    c.data.format = "label"
    c.data.label_prompt = "Answer with one of: {labels}.\n\n{text}"
    c.data.max_length = 512

    c.optim.lr = 2e-4
    c.train.epochs = 2.0
    c.train.batch_size = 16
    c.eval.generate = 200
    c.eval.max_new_tokens = 16
    return c
