"""A reward model: a score head that says how good an answer is, learnt from pairs. Here: stop when the question is answered.

    make quickstart                                           # the base, and with it the questions
    python examples/quickstart/make_data.py --documents=0 --seed=1 --out=runs/preferences
    python examples/preferences/make_data.py --data=runs/preferences
    sftjax train  --config=configs/reward.py --workdir=runs/preferences/reward
    sftjax export --workdir=runs/preferences/reward --to=hf --out=runs/preferences/reward_model
    sftjax eval   --model=runs/preferences/reward_model --data=runs/preferences/pairs.jsonl

The last line shows how it is asked and no more: eight in ten of those pairs were trained on. What the model is worth on pairs
that it never saw, below, is in the run's report.

Two CPU cores: 100 steps in some 50 seconds of processor time. 300 held-out pairs: accuracy 50 % (nothing learnt) to 97.7 % after
20 steps and 100 % after 40, the margin of rewards 0 to 4.7, the loss 0.693 to 0.009, the expected calibration error 0.009;
300 test pairs: 100 %.

What comes out is a Qwen3ForSequenceClassification of one number, which transformers reads, and so TRL;
`sftjax.rewards(model, conversations)` gives its rewards. A public reward model goes on training, or is measured, as any other
--config.model.path or --model. For rankings of several answers: --config.reward.loss=plackett_luce (docs/rewards.md).
"""

from ml_collections import ConfigDict

from sftjax.config import default


def get_config() -> ConfigDict:
    c = default()
    c.task = "reward"
    c.model.path = "runs/quickstart/model"
    c.method = "lora"
    c.lora.rank = 16
    c.lora.alpha = 32.0

    c.data.train = ("runs/preferences/pairs.jsonl",)
    c.data.split = (8, 1, 1)
    c.data.max_length = 512

    c.reward.loss = "bradley_terry"  # or plackett_luce, for whole rankings
    c.reward.centring = 0.01  # only differences of rewards are learnt: this holds their mean at 0

    c.optim.lr = 5e-4
    c.optim.lr_width = 128

    c.train.steps = 100
    c.train.batch_size = 4
    c.train.log_every = 20
    c.train.eval_every = 20
    return c
