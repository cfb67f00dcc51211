"""Base: what a run starts from, the checkpoint with the run's method applied to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sftjax import sharding, tree
from sftjax.config import UserError, parts
from sftjax.data.classes import Classes
from sftjax.data.tokenizer import chat_for, open_tokenizer, tokenizer_place
from sftjax.hf.load import load_config, load_params, resize_embeddings, resolve
from sftjax.hf.model import compute_dtype
from sftjax.hf.peft_read import adapter_labels, held, load_adapter, saved_modules
from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import Decoder, shapes
from sftjax.models.heads import scored
from sftjax.weights import method
from sftjax.weights.targets import ENDS

REWARD = ("reward",)  # the one number of a reward model's head
NOTHING = {
    "freeze": "freeze: nothing trains; set --config.freeze.last_n_layers or --config.freeze.train",
    "tokens": "method=tokens: nothing trains; name tokens, e.g. --config.tokens.train='<tool>,</tool>'",
}


class Base:
    """A run's starting point, a function of its config alone: export builds the same again and puts a checkpoint into it."""

    def __init__(self, config: ConfigDict, labels: Sequence[str] = ()):
        if not config.model.path:
            raise UserError(
                "model.path is empty; give a Hugging Face directory or hub id, e.g. --config.model.path=Qwen/Qwen3-0.6B"
            )
        self.config = config
        self.directory: Path = resolve(config.model.path, config.model.revision)
        self.source_config: DecoderConfig = load_config(self.directory)
        self.adapter = resolve(config.model.adapter, needs="adapter_config.json") if config.model.adapter else None
        self.refuse_an_adapter_of_another_method()
        # what trains as a whole beside an adapter: the config's modules to save, or those of the adapter one goes on from
        self.modules = saved_modules(self.adapter) if self.adapter else config.lora.modules_to_save
        self.tokenizer_directory = Path(tokenizer_place(self.directory, self.adapter))
        tokenizer = open_tokenizer(self.directory, self.adapter, config.model.trust_remote_code)
        had, wanted = tokenizer.get_vocab(), parts(config.tokens.train)
        known = labels or (adapter_labels(self.adapter) if self.adapter else ()) or named(self.source_config.labels)
        self.chat, self.new_tokens = chat_for(config, tokenizer, known)
        self.labels = self.head_labels()
        self.trained_tokens: list[int] = sorted({*tokenizer.convert_tokens_to_ids([*wanted, *self.new_tokens])})
        self.shapes = jax.eval_shape(lambda params: self.headed(params)[0], shapes(self.source_config))
        self.refuse_rows_of_what_trains_whole([token for token in wanted if token in had])
        mask = method.plan(self.shapes, config, self.modules, self.trained_tokens)
        if not self.adapter and not any(jax.tree.leaves(mask)):
            raise UserError(NOTHING[config.method])

    def head_labels(self) -> tuple[str, ...]:
        """What the numbers of the score head mean that the task trains; () where it has none. Raises UserError."""
        has, task = self.source_config.labels, self.config.task
        wants = self.chat.labels if isinstance(self.chat, Classes) else (has or REWARD) if task == "reward" else ()
        check_head(self.directory, has, wants, task)
        if self.adapter and (brought := adapter_labels(self.adapter)):
            check_head(self.adapter, brought, wants, task)
        return wants

    def headed(self, params: Any) -> tuple[Any, DecoderConfig]:
        """The checkpoint's parameters and config with the head that the task trains."""
        if not self.labels or self.source_config.labels:
            return params, replace(self.source_config, labels=self.labels)
        return scored(params, self.source_config, self.labels)

    def refuse_an_adapter_of_another_method(self) -> None:
        c = self.config
        if not self.adapter:
            return
        what = held(self.adapter)
        if not what:
            raise UserError(f"--config.model.adapter={c.model.adapter}: holds nothing that trains; leave it out")
        own = "adapter" if "adapter" in what else "tokens" if what == {"tokens"} else "lora"
        if c.method != own:
            raise UserError(
                f"--config.method={c.method}: --config.model.adapter={c.model.adapter} is of method {own}, and goes on as that; "
                f"use --config.method={own}, or leave the adapter out"
            )
        if c.lora.lr_ratio != 1.0 and "lora" not in what:
            raise UserError(
                f"--config.lora.lr_ratio={c.lora.lr_ratio}: --config.model.adapter={c.model.adapter} holds no LoRA to speed up; "
                "leave --config.lora.lr_ratio=1.0"
            )

    def refuse_rows_of_what_trains_whole(self, known: list[str]) -> None:
        c = self.config
        ends = {path for path in ENDS if path in tree.flatten(self.shapes)}
        if known and (c.method == "full" or ends <= method.whole(self.shapes, c, self.modules)):
            by = {"full": "--config.method=full", "freeze": "freeze.train"}.get(c.method, "lora.modules_to_save")
            raise UserError(f"tokens.train: {known[0]} is known, and {by} trains every token; leave it out")

    def build(self, mesh: Any) -> tuple[Decoder, Any, Any]:
        """(decoder, params, mask): the checkpoint in place on `mesh` with the method applied, and what of it trains."""
        c = self.config
        trained_whole = jnp.float32 if c.method == "full" else None  # masters; what is frozen keeps the checkpoint's dtype
        params = load_params(
            self.directory,
            self.source_config,
            shardings=sharding.shardings(shapes(self.source_config), mesh),
            dtype=trained_whole,
            quantisers=method.quantiser(self.shapes, c, self.modules),
        )
        params, decoder_config = self.headed(params)
        new = self.chat.tokenizer.convert_tokens_to_ids(self.new_tokens)
        params, decoder_config = resize_embeddings(params, decoder_config, len(self.chat.tokenizer), new)
        if self.adapter:
            params = load_adapter(params, self.adapter)
        params = method.apply(params, c, self.modules, self.trained_tokens)
        mask = method.mask(params, c, self.modules)
        params = jax.tree.map(lambda x, trains: x.astype(jnp.float32) if trains else x, params, mask)
        params = sharding.placed(params, mesh)
        lower = decoder_config.layers - c.freeze.last_n_layers if c.freeze.last_n_layers else 0
        decoder = Decoder(decoder_config, compute_dtype(c.model.dtype), c.model.scan, c.model.remat, lower)
        return decoder, params, mask


def check_head(directory: Path, has: Sequence[str], wants: Sequence[str], task: str) -> None:
    """Raises UserError where a checkpoint ends with a score head that is not the one that the task trains."""
    if has and not wants:
        raise UserError(
            f"{directory}: ends with a score head of {count_of(has)}, and --config.task={task} trains one over the "
            "vocabulary; use a language model, or --config.task=reward or --config.classify.by=head"
        )
    if has and (len(has) != len(wants) or (task == "reward" and len(has) > 1)):
        raise UserError(
            f"{directory}: its score head has {count_of(has)}, the task needs "
            f"{count_of(REWARD if task == 'reward' else wants)}; start from the language model it was made of"
        )


def named(labels: Sequence[str]) -> Sequence[str]:
    """The labels of a checkpoint's head; () where LABEL_0 and so on stand for names it never had."""
    return () if all(label == f"LABEL_{i}" for i, label in enumerate(labels)) else labels


def count_of(labels: Sequence[str]) -> str:
    return f"{len(labels)} number{'s' if len(labels) > 1 else ''} ({', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''})"
