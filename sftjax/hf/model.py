"""Model: a checkpoint opened, with everything one needs to look at it. `sftjax.load("Qwen/Qwen3-0.6B")`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from sftjax import sharding
from sftjax.check import CHOICES
from sftjax.config import UserError, near
from sftjax.data.batch import Batch
from sftjax.data.tokenizer import open_tokenizer
from sftjax.hf.load import load_config, load_params, resize_embeddings, resolve
from sftjax.hf.peft import load_adapter, with_head
from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import Decoder, Output, forward, shapes
from sftjax.weights.kinds import count, logits
from sftjax.weights.quantize import quantisers


@dataclass(frozen=True, repr=False)
class Model:
    """A decoder, its parameters and its tokenizer, and the directory they came from."""

    module: Decoder
    params: Any
    tokenizer: Any
    config: DecoderConfig
    directory: Path

    def __repr__(self) -> str:
        c = self.config
        ends = f", scores {', '.join(c.labels[:5])}" if c.labels else ""
        return f"Model({self.directory}: {count(self.params):,} parameters, {c.layers} layers, {c.vocab:,} tokens{ends})"

    @property
    def forward(self) -> Callable[..., Output]:
        """`(params, batch, key=None) -> Output(hidden, head, routed)`: what losses are made from."""
        return forward(self.module)

    def using(self, params: Any) -> Model:
        """The same model with other parameters, such as a loop has trained."""
        return replace(self, params=params)

    def logits(self, tokens: Any) -> Array:
        """tokens [B, T], or one text as a str -> [B, T, V] float32. For looking, not for training: the logits are whole.

        With a score head [B, T, C]: of a sequence the last token's count. Raises UserError for tokens it does not have.
        """
        ids = token_ids(self.tokenizer(tokens)["input_ids"] if isinstance(tokens, str) else tokens, self.config.vocab)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        ones = jnp.ones_like(ids)
        hidden, head, _ = self.forward(self.params, Batch(ids, ones, ones, positions))
        return logits(hidden, head)


def load(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    dtype: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    mesh: Mesh | None = None,
) -> Model:
    """Opens a local Hugging Face directory or a hub id, with a PEFT adapter over it where one is given. Raises UserError.

    `quantize` (nf4 or int8) keeps the layers' kernels in so few bits, as they are read. `dtype` is the compute dtype: None is
    bfloat16 on accelerators (float16 on GPUs that have none) and float32 on a CPU. A tokenizer and a chat template that lie
    with the adapter are what it was trained with, and go before the base's. The parameters lie on the first device, or are
    spread over `mesh`.
    """
    computes = compute_dtype(dtype)
    directory = resolve(path, revision)
    config = load_config(directory)
    beside = resolve(adapter, needs="adapter_config.json") if adapter else None
    homes = sharding.shardings(shapes(config), mesh) if mesh else None
    few_bits = quantisers(shapes(config), quantize) if quantize else None
    params = load_params(directory, config, shardings=homes, quantisers=few_bits)
    tokenizer = open_tokenizer(directory, beside, trust_remote_code)
    if beside:
        params, config = with_head(params, config, beside)
        params, config = resize_embeddings(params, config, len(tokenizer))  # for the tokens that it adds
        params = load_adapter(params, beside)
        params = sharding.placed(params, mesh) if mesh else params
    return Model(Decoder(config, computes), params, tokenizer, config, directory)


def token_ids(tokens: Any, vocab: int) -> Array:
    """[B, T] int32 of one row of tokens or several. Raises UserError for what is no such thing."""
    try:
        ids = np.atleast_2d(np.asarray(tokens))
    except ValueError:  # rows of several lengths
        ids = np.zeros(0)
    if ids.dtype.kind not in "iu" or ids.ndim != 2:
        raise UserError("logits: needs one text, or whole numbers [B, T], every row as long as the others and none of them empty")
    if len(wrong := ids[(ids < 0) | (ids >= vocab)]):
        raise UserError(f"logits: there is token {wrong[0]}, but the model knows only {vocab}")
    return jnp.asarray(ids, jnp.int32)


def compute_dtype(given: Any) -> Any:
    """The dtype that was asked for, or what the device computes in. Raises UserError for one that no model computes in."""
    if given is not None:
        return jnp.dtype(dtype_name(given))
    if jax.default_backend() == "cpu":
        return jnp.dtype(jnp.float32)
    before_ampere = float(getattr(jax.devices()[0], "compute_capability", 8)) < 8  # of a GPU: without bfloat16
    return jnp.dtype(jnp.float16 if before_ampere else jnp.bfloat16)


def dtype_name(given: Any) -> str:
    """float32, bfloat16 or float16, of its name or of a dtype. Raises UserError for any other."""
    try:
        name = given if isinstance(given, str) else jnp.dtype(given).name
    except TypeError:
        name = str(given)
    known = [dtype for dtype in CHOICES["model.dtype"] if dtype]
    if name not in known:
        close = near(name, known)
        raise UserError(f"dtype={name}: needs one of {', '.join(known)}" + (f"; did you mean {close}?" if close else ""))
    return name
