"""An export is done when it has been read back and says what the run says: log-probs of given tokens, side by side.

Both sides compute in float32 at full matmul precision, so all that differs is how the exported tensors were rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.hf.load import load_config, load_params
from sftjax.hf.peft import load_adapter
from sftjax.hf.tensors import read_dir
from sftjax.losses.tokens import logprobs, shift
from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import Decoder, forward

# (mean, largest) difference of a token's log-prob that rounding to a dtype can explain, in nats.
BOUNDS = {"float32": (1e-4, 1e-3), "float16": (1e-2, 1e-1), "bfloat16": (5e-2, 5e-1)}


class ExportError(UserError):
    """The export does not say what the run says."""


def verify(
    out: Path,
    params: Any,
    config: DecoderConfig,
    rows: Sequence[Sequence[int]],
    *,
    adapter_of: Path | None = None,
    shardings: Any = None,
) -> float:
    """The largest difference between the run's log-probs of `rows` and the export's. Raises ExportError above the bound.

    `out` is a merged checkpoint, or an adapter over the checkpoint `adapter_of`; `shardings` are the base parameters'.
    """
    out = Path(out)
    base = out if adapter_of is None else Path(adapter_of)
    ours = score(params, config, rows)
    config = load_config(base)
    again = load_params(base, config, shardings=shardings)
    again = again if adapter_of is None else load_adapter(again, out)
    difference = np.abs(score(again, config, rows) - ours)
    kind = "float32" if adapter_of else _coarsest(out)
    mean, most = float(difference.mean()), float(difference.max())
    mean_bound, most_bound = BOUNDS[kind]
    if not (mean <= mean_bound and most <= most_bound):  # not: so that a nan fails
        raise ExportError(
            f"{out}: read back, its log-probs differ from the run's by {mean:.2g} on average and {most:.2g} at most, over "
            f"{difference.size} tokens; {kind} allows {mean_bound:g} and {most_bound:g}"
        )
    return most


def _coarsest(directory: Path) -> str:
    kinds = {stored.dtype.name for stored in read_dir(directory).values()}
    return max(kinds, key=list(BOUNDS).index)


def score(params: Any, config: DecoderConfig, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """log p of every token after the first of every row, end to end. One row at a time, so that memory stays small."""
    width = max(map(len, rows))
    out = []
    with jax.default_matmul_precision("highest"):
        for row in rows:
            tokens, segments = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
            tokens[0, : len(row)], segments[0, : len(row)] = row, 1
            out.append(np.asarray(_score_row(params, config, tokens, segments))[: len(row) - 1])
    return np.concatenate(out)


@partial(jax.jit, static_argnums=1)
def _score_row(params: Any, config: DecoderConfig, tokens: Array, segments: Array) -> Array:
    batch = Batch(tokens, segments.astype(jnp.float32), segments, jnp.arange(tokens.shape[1])[None])
    output = forward(Decoder(config))(params, batch)
    return logprobs(output.hidden, output.head, shift(batch)[0])[0]
