"""GRPO: several answers to each prompt, and those that a reward model likes more than the others become likelier.

    make reinforcement                                        # all of it, after the quickstart
    sftjax train  --config=configs/grpo.py --workdir=runs/preferences/grpo
    sftjax export --workdir=runs/preferences/grpo --to=hf --out=runs/preferences/grpo_model

The model says a sum and then, as often as not, says it again in a sentence of its own; the reward model, an adapter over the
very same base, likes it short. How many answers are short and right, word for word, is counted by a function of one's own
(examples/preferences/rewards.py), which has weight 0: it is watched, and nothing is learnt from it.

Two CPU cores: 25 s, compiling and evaluations included. 300 held-out questions, for seeds 0, 1 and 2: the reward rises from
-0.17, 0.07, 0.11 to 2.40, 2.37, 2.38; 45, 49, 51 % of the answers are short and right, then 91, 94, 97 %. KL to the reference,
the mean of the last ten steps: 0.11, 0.05, 0.07 nats a token, and in no step above 0.52.

On your own prompts: --config.model.path=Qwen/Qwen3-0.6B --config.data.train=prompts.jsonl --config.data.max_length=1024
--config.grpo.rewards=rewards.py:mine --config.grpo.reward_weights=1 --config.grpo.max_completion_length=512
--config.optim.lr=1e-5 --config.optim.lr_width=None: docs/reinforcement.md.
"""

from ml_collections import ConfigDict

from sftjax.config import default


def get_config() -> ConfigDict:
    c = default()
    c.task = "grpo"
    c.model.path = "runs/preferences/undecided"
    c.method = "lora"  # the reference is the model without it, and takes no memory
    c.lora.rank = 16
    c.lora.alpha = 32.0

    c.data.train = ("runs/preferences/pairs.jsonl",)  # its prompts; what it says of answers goes to the reward functions
    c.data.split = (8, 1, 1)
    c.data.max_length = 256

    c.grpo.rewards = ("model:runs/preferences/judge", "examples/preferences/rewards.py:short_and_right")
    c.grpo.reward_weights = (1.0, 0.0)
    c.grpo.num_generations = 8
    c.grpo.max_completion_length = 48
    c.grpo.beta = 0.04

    c.optim.lr = 5e-4
    c.optim.lr_width = 128

    c.train.steps = 30
    c.train.batch_size = 32  # answers a step: 4 prompts
    c.train.log_every = 5
    c.train.eval_every = 10
    return c
