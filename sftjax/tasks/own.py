"""What a training loop of one's own needs beside a model and a loss: what trains, batches of rows in memory, the way out.

docs/python.md is such a loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sftjax import tree
from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.data.chat import Chat, Encoded
from sftjax.data.example import Example, RowError
from sftjax.data.fields import Wishes
from sftjax.data.formats import to_examples
from sftjax.data.layouts import detect
from sftjax.data.pack import assemble, plan
from sftjax.data.pairs import SLOTS, sides
from sftjax.hf.load import load_config
from sftjax.hf.model import Model
from sftjax.hf.ollama import put
from sftjax.hf.peft import save_adapter
from sftjax.hf.save import save as save_whole
from sftjax.hf.verify import score, verify
from sftjax.tasks.export import FORMS, WHOLE, ollama, probe_rows
from sftjax.weights import select
from sftjax.weights.kinds import Kind
from sftjax.weights.quantize import Int8, Nf4, Quantised, int8, nf4

Parts = list[tuple[Encoded, int]]  # a row's answers, each with its segment in the row's group


def split(params: Any) -> tuple[Any, Any]:
    """(what trains, in float32; the rest): two trees of one shape with None in the holes, which `sftjax.tree.join` fills.

    Of LoRA and its kin their own parts train; where there are none, everything does. Raises UserError where nothing can.
    """
    leaves = tree.flatten(params).values()
    if not any(isinstance(w, Kind) for w in leaves):
        if any(isinstance(w, Quantised) for w in leaves):
            raise UserError("split: kernels in few bits do not train; put LoRA over them, sftjax.lora(params, key)")
        mask = select.everything(params)
    else:
        mask = select.added(params)
    trainable, frozen = tree.split(params, mask)
    return jax.tree.map(lambda x: x.astype(jnp.float32), trainable), frozen


def batches(
    model: Model,
    rows: Iterable[dict[str, Any]],
    *,
    max_length: int,
    batch_size: int,
    want: str = "answers",
    loss_on: str = "answers",
    seed: int = 0,
) -> list[Batch]:
    """An epoch of `rows` as batches [batch_size, max_length], each row rendered by the model's own template and packed best-fit.

    `rows` are dicts in any layout that training reads (docs/data.md). `want` is answers, or pairs for `losses.dpo` and
    `losses.bradley_terry`. Another `seed` is another order; the last batch may end with empty rows. Raises UserError for a row
    that cannot be used or is longer than `max_length`.
    """
    if want not in ("answers", "pairs"):
        raise UserError(f"want={want}: needs answers or pairs")
    if not 2 <= max_length <= (most := model.config.reach):
        raise UserError(f"max_length={max_length}: needs 2 to {most}, the positions of {model.directory}")
    rows = list(rows)
    layout = detect(rows, "rows", want=want)
    chat = Chat(model.tokenizer, loss_on=loss_on)
    found: list[Parts] = []
    for i, row in enumerate(rows):
        try:
            made = [e for one in to_examples(row, layout, Wishes(), source="rows", line=i) for e in encoded(chat, one, want)]
        except RowError as e:
            raise UserError(f"rows[{i}]: {str(e).partition('; choose one')[0]}") from e
        if (n := max(map(length, made), default=0)) > max_length:
            raise UserError(f"rows[{i}] has {n} tokens, more than max_length={max_length}; leave it out, or make max_length more")
        found += made
    if not found:
        raise UserError(f"rows: there are no {want} in them")
    bins = plan([length(parts) for parts in found], seed=seed, epoch=0, max_length=max_length)  # type: ignore[arg-type]
    filled = [
        [(*part, n * SLOTS[want] + slot) for n, (row, _, _) in enumerate(bins[b]) for part, slot in found[row]]
        for b in range(len(bins))
    ]
    filled += [[]] * (-len(filled) % batch_size)
    return [assemble(filled[at : at + batch_size], max_length) for at in range(0, len(filled), batch_size)]


def encoded(chat: Chat, example: Example, want: str) -> list[Parts]:
    """What a batch holds of an example: itself, or every pair that its answers make."""
    if want == "answers":
        return [[(chat.encode(example), 1)]]
    alone = [chat.encode(one) for one in example.alone()]
    return [[(alone[k], slot) for k, slot in side.items()] for side in sides(example.answers or (), want)]


def length(parts: Parts) -> int:
    return sum(len(one.ids) for one, _ in parts)


def save(model: Model, out: str | Path, *, to: str = "hf", base: str | None = None) -> float:
    """Writes the model as a merged Hugging Face checkpoint (hf; with a Modelfile beside it, ollama), or what stands over its
    checkpoint as an adapter: peft, vllm, or sftjax for bottleneck adapters. Reads it back and returns the largest difference of
    log-probs.

    `base` is what users load an adapter's base by; None is the directory that the model came from. Raises UserError, and
    ExportError where what was read back says something else; `out` is then as it was.
    """
    forms = sorted({form for each in FORMS.values() for form in each})
    if to not in forms:
        raise UserError(f"to={to}: needs one of {', '.join(forms)}")
    whole = to in WHOLE
    if whole and base:
        raise UserError(f"base={base}: a merged checkpoint has none; leave it out, or use to='peft'")
    rows = probe_rows(model.tokenizer, model.config.vocab, ())
    ours, chat, found = score(model.params, model.config, rows), Chat(model.tokenizer), []
    asked = ollama(chat, model.directory, model.config.labels) if to == "ollama" else None

    def check(directory: Path, **adapter: Any) -> None:
        found.append(verify(directory, ours, model.config, rows, **adapter).most)
        if asked:
            put(asked, directory)

    grown = model.config.vocab != load_config(model.directory).vocab
    shared: dict[str, Any] = {"source": model.directory, "out": out, "template": chat.template}
    shared |= {"tokenizer": model.tokenizer if grown else None}
    if whole:
        save_whole(model.params, model.config, stop_ids=chat.stop_ids, check=check, **shared)
    else:
        again = partial(check, adapter_of=model.directory, quantisers=in_few_bits(model.params))
        save_adapter(model.params, model.config, form=to, base_name=base, check=again, **shared)
    return found[0]


def in_few_bits(params: Any) -> dict[str, Any]:
    """{path: how it was quantised} of every kernel in few bits, whatever stands over it."""
    found = {}
    for path, w in tree.flatten(params).items():
        while isinstance(w, Kind):
            w = w.base
        if isinstance(w, Quantised):
            found[path] = {Nf4: nf4, Int8: int8}[type(w)]
    return found
