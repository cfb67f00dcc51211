"""Model: a checkpoint opened, with everything one needs to look at it. `sftjax.load("Qwen/Qwen3-0.6B")`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from sftjax import sharding
from sftjax.data.batch import Batch
from sftjax.data.tokenizer import open_tokenizer
from sftjax.hf.load import load_config, load_params, resize_embeddings, resolve
from sftjax.hf.peft import load_adapter, with_head
from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import Decoder, Output, forward, shapes
from sftjax.weights.kinds import matmul
from sftjax.weights.quantize import quantisers


@dataclass(frozen=True)
class Model:
    """A decoder, its parameters and its tokenizer, and the directory they came from."""

    module: Decoder
    params: Any
    tokenizer: Any
    config: DecoderConfig
    directory: Path

    @property
    def forward(self) -> Callable[..., Output]:
        """`(params, batch, key=None) -> Output(hidden, head, routed)`: what losses are made from."""
        return forward(self.module)

    def logits(self, tokens: Any) -> Array:
        """tokens [B, T], or one text as a str -> [B, T, V] float32. For looking, not for training: the logits are whole.

        With a score head [B, T, C]: of a sequence the last token's count.
        """
        ids = self.tokenizer(tokens)["input_ids"] if isinstance(tokens, str) else tokens
        ids = jnp.atleast_2d(jnp.asarray(ids, jnp.int32))
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        ones = jnp.ones_like(ids)
        hidden, head, _ = self.forward(self.params, Batch(ids, ones, ones, positions))
        return matmul(hidden, head).astype(jnp.float32)


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
    return Model(Decoder(config, compute_dtype(dtype)), params, tokenizer, config, directory)


def compute_dtype(name: Any) -> Any:
    if name is not None:
        return jnp.dtype(name)
    if jax.default_backend() == "cpu":
        return jnp.dtype(jnp.float32)
    before_ampere = float(getattr(jax.devices()[0], "compute_capability", 8)) < 8  # of a GPU: without bfloat16
    return jnp.dtype(jnp.float16 if before_ampere else jnp.bfloat16)
