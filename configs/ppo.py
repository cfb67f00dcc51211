"""PPO: a policy earns a reward model's favour, a value learns what to expect of it. Here: stop when the question is answered.

    make quickstart                                           # the model, and with it the questions
    bash examples/preferences/ppo.sh                          # all of the following

FIGURES
"""

from ml_collections import ConfigDict

from sftjax.config import default


def get_config() -> ConfigDict:
    c = default()
    c.task = "ppo"
    c.model.path = "runs/preferences/undecided"
    c.method = "lora"  # the policy's, the value's and the reward model's LoRA lie over one base
    c.lora.rank = 16
    c.lora.alpha = 32.0

    c.data.train = ("runs/preferences/undecided.jsonl",)  # its questions
    c.data.split = (8, 1, 1)
    c.data.max_length = 256

    c.ppo.rewards = "model:runs/preferences/judge"
    c.ppo.max_completion_length = 48
    c.ppo.missing_eos_penalty = 1.0
    c.ppo.num_ppo_epochs = 2
    c.ppo.num_mini_batches = 2
    c.ppo.kl_coef = 0.2

    c.optim.lr = 5e-4
    c.optim.lr_width = 128

    c.train.steps = 30
    c.train.batch_size = 32  # answers a step
    c.train.log_every = 5
    c.train.eval_every = 10
    return c
