"""Losses: `(params, batch, key) -> (sum, count, metrics)`, pure, composed by wrapping the forward."""

from sftjax.data.batch import Referred
from sftjax.losses.dpo import dpo, kto, token_logps
from sftjax.losses.neftune import neftune
from sftjax.losses.reward import bradley_terry, plackett_luce
from sftjax.losses.tokens import Forward, Loss, logprobs, masked_xent

__all__ = [
    "Forward",
    "Loss",
    "Referred",
    "bradley_terry",
    "dpo",
    "kto",
    "logprobs",
    "masked_xent",
    "neftune",
    "plackett_luce",
    "token_logps",
]
