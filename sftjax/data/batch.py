"""Batch: the fixed-shape arrays every model and loss sees, each [B, T]. Referred: with a reference's log-probs beside them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Four arrays [B, T]. Where `segments` is 0 there is nothing: the token there never counts.

    tokens     int32   token ids; anything where segments is 0
    weights    float32 how much the loss counts *this* token as a target (predicted from the one before it
                       in the same segment); 0 on a segment's first token
    segments   int32   1, 2, ... per document in a row; attention never crosses them; 0 = padding. A row of several answers
                       takes a fixed count of numbers, whose place says what each is (data/pairs.py); some may be absent
    positions  int32   restart at 0 with every segment
    """

    tokens: Any
    weights: Any
    segments: Any
    positions: Any


class Referred(NamedTuple):
    """A Batch that carries its reference: `reference` [B, T] float32, each token's log-prob as `losses.token_logps` gives it."""

    tokens: Any
    weights: Any
    segments: Any
    positions: Any
    reference: Any
