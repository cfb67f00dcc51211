"""LoRA on the quickstart's conversations: translate between English and Chinese, or do a small sum in words.

    make quickstart                                           # all of it, from nothing
    sftjax train --config=configs/quickstart.py --workdir=runs/quickstart/sft
    sftjax train --config=configs/quickstart.py --workdir=runs/qwen --config.model.path=Qwen/Qwen3-0.6B

The second needs runs/quickstart/base (the first makes it), the third only the conversations:
python examples/quickstart/make_data.py.

Two CPU cores: about half a minute of training. The eval loss goes from 4.03 to 0.06; of 100 held-out conversations the
base answers none word for word, the tuned model 97.
"""

from ml_collections import ConfigDict

from sftjax.config import default


def get_config() -> ConfigDict:
    c = default()
    c.model.path = "runs/quickstart/base"
    c.method = "lora"
    c.lora.rank = 16
    c.lora.alpha = 32.0
    c.lora.targets = "all-linear"

    c.data.train = ("runs/quickstart/instructions.jsonl",)
    c.data.split = (8, 1, 1)
    c.data.max_length = 256

    c.optim.lr = 2e-3
    c.optim.lr_width = 128  # a model of width 1,024 trains with an eighth of it

    c.train.steps = 300
    c.train.batch_size = 4
    c.train.log_every = 50
    c.train.eval_every = 50
    c.eval.generate = 100
    c.eval.max_new_tokens = 48
    return c
