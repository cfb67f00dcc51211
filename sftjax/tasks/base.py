"""Base: what a run starts from, the checkpoint with the run's method applied to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sftjax import sharding, tree
from sftjax.config import UserError, parts
from sftjax.data.chat import Chat, load_tokenizer, prepare
from sftjax.hf.load import load_config, load_params, resize_embeddings, resolve
from sftjax.hf.model import compute_dtype
from sftjax.hf.peft import load_adapter
from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import Decoder, init
from sftjax.weights import lora as low_rank
from sftjax.weights import select


class Base:
    """A run's starting point, a function of its config alone: export builds the same again and puts a checkpoint into it."""

    def __init__(self, config: ConfigDict):
        if not config.model.path:
            raise UserError(
                "model.path is empty; give a Hugging Face directory or hub id, e.g. --config.model.path=Qwen/Qwen3-0.6B"
            )
        self.config = config
        self.directory: Path = resolve(config.model.path, config.model.revision)
        self.source_config: DecoderConfig = load_config(self.directory)
        self.adapter = resolve(config.model.adapter, needs="adapter_config.json") if config.model.adapter else None
        tokenizer = load_tokenizer(self.directory, config.model.trust_remote_code, config.model.revision)
        self.chat: Chat
        self.new_tokens: list[str]
        if config.task == "pretrain":
            self.chat, self.new_tokens = Chat(tokenizer, loss_on="all"), []
        else:
            self.chat, self.new_tokens = prepare(tokenizer, config.data.template, loss_on=config.data.loss_on)

    def build(self, mesh: Any) -> tuple[Decoder, Any, Any]:
        """(decoder, params, mask): the checkpoint in place on `mesh` with the method applied, and what of it trains."""
        c = self.config
        trained_whole = jnp.float32 if c.method == "full" else None  # masters; what is frozen keeps the checkpoint's dtype
        shapes = jax.eval_shape(lambda: init(self.source_config, jax.random.key(0)))
        params = load_params(self.directory, self.source_config, shardings=sharding.shardings(shapes, mesh), dtype=trained_whole)
        new = self.chat.tokenizer.convert_tokens_to_ids(self.new_tokens)
        params, decoder_config = resize_embeddings(params, self.source_config, len(self.chat.tokenizer), new)
        # what new tokens are read and written by trains with them, whatever the method
        grown = [path for path in ("embed/embedding", "head/kernel") if self.new_tokens and path in tree.flatten(params)]
        lower = 0
        match c.method:
            case "full":
                mask = select.everything(params)
            case "lora":
                if self.adapter:
                    params = load_adapter(params, self.adapter)
                else:
                    key = jax.random.key(c.seed)
                    params = low_rank.lora(params, key, c.lora.rank, c.lora.alpha, c.lora.dropout, c.lora.targets, c.lora.rslora)
                mask = select.low_rank(params, also=grown)
            case "freeze":
                if c.freeze.last_n_layers:
                    lower = decoder_config.layers - c.freeze.last_n_layers
                    params = select.cut(params, c.freeze.last_n_layers)
                mask = select.named(params, (*parts(c.freeze.train), *grown), c.freeze.last_n_layers)
        params = jax.tree.map(lambda x, trains: x.astype(jnp.float32) if trains else x, params, mask)
        params = jax.tree.map(jax.device_put, params, sharding.shardings(params, mesh))
        decoder = Decoder(decoder_config, compute_dtype(c.model.dtype), c.model.scan, c.model.remat, lower)
        return decoder, params, mask
