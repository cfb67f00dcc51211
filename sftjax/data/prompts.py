"""Prompts: which rows a step asks, a pure function of the step number, as `stream` has it for batches.

Every epoch is a shuffle of all prompts, named by the seed and the epoch's number; step s takes numbers s*P to (s+1)*P of the
epochs end to end, so none comes again before all the others have come. The run's last step is filled from the next epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax.check import ROLLOUTS
from sftjax.config import UserError
from sftjax.data.pack import Piece
from sftjax.data.rows import Rows
from sftjax.data.stream import Stream


def stream(rows: Rows, config: ConfigDict, *, mine: Sequence[int] | None = None) -> Stream:
    """What the task takes a step from: batches of rows, or prompts."""
    return Prompts(rows, config) if config.task in ROLLOUTS else Stream(rows, config, mine=mine)


def samples(config: ConfigDict) -> int:
    """Answers to each prompt."""
    return config.grpo.num_generations if config.task == "grpo" else 1


class Prompts(Stream):
    """The rows of `rows` that each step asks. train.batch_size counts answers, so P is that by the answers to a prompt."""

    def __init__(self, rows: Rows, config: ConfigDict):
        G, own = samples(config), config.copy_and_resolve_references()
        if config.train.batch_size % G:
            raise UserError(
                f"train.batch_size={config.train.batch_size} counts answers, and is no multiple of grpo.num_generations={G}"
            )
        own.data.packing, own.train.batch_size = False, config.train.batch_size // G
        self.samples = G
        super().__init__(rows, own)

    def batch(self, step: int) -> Any:
        """Numbers of the rows that step `step` (from 0) asks, int [P]."""
        asked = [self.pieces(step * self.batch_size + i)[0] for i in range(self.batch_size)]
        return np.array([row for row, _, _ in asked], np.int64)

    def pieces(self, bin: int) -> list[Piece]:
        epoch, i = self.locate(bin)
        return self.plan(epoch)[i]
