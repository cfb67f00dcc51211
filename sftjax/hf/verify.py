"""An export is done when it has been read back and says what the run says: log-probs of given tokens, side by side.

Both sides compute in float32 at full matmul precision, so all that differs is how the exported tensors were rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.hf.load import load_config, load_params, resize_embeddings
from sftjax.hf.peft import load_adapter, with_head
from sftjax.hf.tensors import read_dir
from sftjax.losses.tokens import logprobs, shift
from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import Decoder, forward
from sftjax.models.heads import token_scores
from sftjax.weights.quantize import Quantised

# (mean, largest) difference of a token's log-prob that rounding to a dtype can explain, in nats.
BOUNDS = {"float32": (1e-4, 1e-3), "float16": (1e-2, 1e-1), "bfloat16": (5e-2, 5e-1)}


class ExportError(UserError):
    """The export does not say what the run says."""


class Verified(NamedTuple):
    """What an export says of the rows, as `score` does, and how far that is from the run, in nats."""

    scores: np.ndarray
    mean: float
    most: float


def verify(
    out: Path,
    ours: np.ndarray,
    config: DecoderConfig,
    rows: Sequence[Sequence[int]],
    *,
    adapter_of: Path | None = None,
    quantisers: Mapping[str, Callable[[Array], Quantised]] | None = None,
) -> Verified:
    """Reads the export back and compares its log-probs of `rows` with the run's, `ours`. Raises ExportError above the bound.

    The run's come as numbers, so that its weights can be gone before a second model is read. `out` is a merged checkpoint,
    or an adapter over the checkpoint `adapter_of`, which is then quantised as the run's was.
    """
    out = Path(out)
    place = adapter_of or out
    theirs_config = load_config(place)
    again = load_params(place, theirs_config, quantisers=quantisers if adapter_of else None)
    if adapter_of:
        again, theirs_config = with_head(again, theirs_config, out)
        again, theirs_config = resize_embeddings(again, theirs_config, config.vocab)
        again = load_adapter(again, out)
    theirs = score(again, theirs_config, rows)
    mean, most = distance(ours, theirs)
    kind = "float32" if adapter_of else _coarsest(out)
    mean_bound, most_bound = BOUNDS[kind]
    if theirs_config.labels != config.labels:
        raise ExportError(f"{out}: read back, its labels are {theirs_config.labels}, the run's {config.labels}")
    if not (mean <= mean_bound and most <= most_bound):  # not: so that a nan fails
        raise ExportError(
            f"{out}: read back, its {'scores' if config.labels else 'log-probs'} differ from the run's by {mean:.2g} on average "
            f"and {most:.2g} at most, over {ours.size} tokens; {kind} allows {mean_bound:g} and {most_bound:g}"
        )
    return Verified(theirs, mean, most)


def distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """(mean, largest) difference of two scores."""
    apart = np.abs(theirs - ours)
    return float(apart.mean()), float(apart.max())


def _coarsest(directory: Path) -> str:
    kinds = {stored.dtype.name for stored in read_dir(directory).values()}
    return max(kinds, key=list(BOUNDS).index)


def score(params: Any, config: DecoderConfig, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """log p of every token after the first of every row, end to end. One row at a time, so that memory stays small.

    With a score head, what the sequence would score that ended at each of those tokens.
    """
    width = max(map(len, rows))
    out = []
    with jax.default_matmul_precision("highest"):
        for row in rows:
            tokens, segments = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
            tokens[0, : len(row)], segments[0, : len(row)] = row, 1
            scores = np.asarray(_score_row(params, config, tokens, segments))
            out.append((scores[1 : len(row)] if config.labels else scores[: len(row) - 1]).ravel())
    return np.concatenate(out)


@partial(jax.jit, static_argnums=1)
def _score_row(params: Any, config: DecoderConfig, tokens: Array, segments: Array) -> Array:
    batch = Batch(tokens, segments.astype(jnp.float32), segments, jnp.arange(tokens.shape[1])[None])
    output = forward(Decoder(config))(params, batch)
    if config.labels:
        return token_scores(output)[0]
    return logprobs(output.hidden, output.head, shift(batch)[0])[0]
