"""A reward function of one's own: 1 for the short right answer, which the row has as `chosen`, word for word.

--config.grpo.rewards=examples/preferences/rewards.py:short_and_right     (or ppo.rewards)
"""

from __future__ import annotations

from typing import Any


def short_and_right(completions: list[str], chosen: list[Any], **columns: Any) -> list[float]:
    """`completions` and `chosen` have an entry an answer, as in TRL."""
    return [float(said.strip() == wanted[-1]["content"]) for said, wanted in zip(completions, chosen)]
