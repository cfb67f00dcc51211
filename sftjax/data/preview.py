"""What `sftjax preview` prints: rows token by token as the model sees them, what is trained, what was dropped, how it packs.

<|im_start|>|user|⏎          a token each, parted by |; white space as ⏎ and ⇥
[[Paris|.|<|im_end|>]]       trained: green, or in [[ ]] where there is no colour; another weight than 1 is written there
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sftjax.config import UserError, opened
from sftjax.data.classes import Classes
from sftjax.data.pipeline import build
from sftjax.data.prompts import Prompts, stream
from sftjax.data.rows import OTHER, Rows
from sftjax.data.stream import Stream
from sftjax.data.tokenizer import chat_for, open_tokenizer
from sftjax.hf.load import check_length, load_config, resolve
from sftjax.models.config import DecoderConfig

HEAD, TAIL = 500, 200  # tokens shown of a long row: its beginning, and its end with the terminator
BAR = 40  # characters of the histogram's longest bar
VISIBLE = str.maketrans({"\n": "⏎\n", "\t": "⇥", "\r": "␍"})


def preview(config: ConfigDict, console: Console | None = None, rows: int = 3) -> None:
    """Prints the first `rows` training rows, of several sources in turn, and how all of them fit the config.

    Raises UserError as training would.
    """
    config, console = opened(config), console or Console()
    if not config.model.path:
        raise UserError("model.path is empty: the rows are seen through a model's tokenizer; set --config.model.path=DIR")
    if known := decoder_config(config.model.path):
        check_length(config.data.max_length, known, config.model.path)
    adapter = resolve(config.model.adapter, needs="adapter_config.json") if config.model.adapter else None
    tokenizer = open_tokenizer(config.model.path, adapter, config.model.trust_remote_code, config.model.revision)
    chat, new = chat_for(config, tokenizer)
    if new:
        console.print(Text(f"added to the tokenizer: {' '.join(new)}"))
    splits = build(config, chat, say=lambda line: console.print(Text(line), soft_wrap=True))
    asked = stream(splits.train, config)
    plain = console.no_color or console.color_system is None
    for i in spread(splits.train.store, rows):
        console.print()
        console.print(title(splits.train, i), soft_wrap=True)
        for ids, weights, slot in splits.train.parts(i):
            if splits.train.slots > 1:
                console.print(Text(slot_name(splits.train, slot), "bold"))
            if isinstance(chat, Classes):
                console.print(Text(f"label: {chat.labels[ids[-1]]}", "bold"))
                ids, weights = ids[:-1], weights[:-1]
            console.print(row_text(tokenizer, ids, weights, plain), soft_wrap=True)
        if isinstance(asked, Prompts):
            console.print(beside(splits.train, i), soft_wrap=True)
    console.print()
    console.print(counts(splits.report))
    console.print(histogram(splits.train.lengths), soft_wrap=True)
    console.print(Text(prompting(asked) if isinstance(asked, Prompts) else packing(asked)), soft_wrap=True)


def decoder_config(directory: str) -> DecoderConfig | None:
    """Of a model that could be trained; None of another, and of a tokenizer alone, which show rows all the same."""
    try:
        return load_config(Path(directory).expanduser())
    except UserError:
        return None


def spread(store: np.ndarray, n: int) -> list[int]:
    """The numbers of n rows: the first of each source, then the second of each; `store` says of which source each row is."""
    each = (np.flatnonzero(store == s)[:n].tolist() for s in np.unique(store))
    return [i for turn in zip_longest(*each) for i in turn if i is not None][:n]


def beside(rows: Rows, i: int) -> Text:
    """What reward functions are given with an answer to a prompt."""
    example = rows.example(i)
    ends = (example.messages or ())[len(example.asked()) :]
    expected = ends[0].content if ends else example.completion[1] if example.completion else None
    given = {"expected": expected} | (example.columns or {})
    lines = (f"{name}: {value}" for name, value in given.items() if value not in (None, ""))
    return Text("\n".join(line if len(line) <= 200 else f"{line[:200]} ..." for line in lines), "dim")


def title(rows: Rows, i: int) -> Text:
    about = f"{rows.lengths[i]:,} tokens" + (f", {rows.trained[i]:,} trained" if rows.trained[i] else "")
    return Text.assemble((rows.where(i), "bold"), f"  {about}")


def slot_name(rows: Rows, slot: int) -> str:
    """What the answer in a slot is."""
    if rows.other is not None:
        return {1: "good", 2: "bad", OTHER: "another row's answer, for the baseline"}[slot]
    if rows.slots == 2:
        return {1: "chosen", 2: "rejected"}[slot]
    return f"answer {(slot + 1) // 2}" + (", as good as the one before" if slot % 2 == 0 else "")


def row_text(tokenizer: Any, ids: np.ndarray, weights: np.ndarray, plain: bool) -> Text:
    """Every token of a row, trained ones marked; the middle of a long row left out."""
    hidden = len(ids) - HEAD - TAIL
    if hidden <= 0:
        return tokens_text(tokenizer, ids, weights, plain)
    gap = Text(f"\n... {hidden:,} tokens not shown ...\n", "dim")
    head, tail = slice(None, HEAD), slice(-TAIL, None)
    return Text.assemble(
        tokens_text(tokenizer, ids[head], weights[head], plain), gap, tokens_text(tokenizer, ids[tail], weights[tail], plain)
    )


def tokens_text(tokenizer: Any, ids: np.ndarray, weights: np.ndarray, plain: bool) -> Text:
    out = Text()
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for weight, run in groupby(pieces(tokenizer, ids, weights), key=lambda piece: piece[2]):
        colour = "green" if weight == 1 else "yellow" if weight else ""
        note = f"×{weight:g} " if weight not in (0, 1) else ""
        out.append(("[[" if plain and weight else "") + note, colour)
        for k, (text, first, _) in enumerate(run):
            out.append("|" if k or (out and not weight) else "", "dim")
            out.append(text.translate(VISIBLE), f"{colour} bold" if first in special else colour)
        out.append("]]" if plain and weight else "")
    out.rstrip()
    return out


def pieces(tokenizer: Any, ids: np.ndarray, weights: np.ndarray) -> Iterator[tuple[str, int, float]]:
    """(text, first id, weight) of each token, or of tokens together where one alone is only part of a character."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    before: list[int] = []  # the piece before: some tokenizers drop the space of a token that stands first
    held: list[int] = []
    for id, weight, following in zip(ids.tolist(), weights.tolist(), [*weights[1:].tolist(), None]):
        held.append(id)
        text = decode(before + held)[len(decode(before)) :]
        if "\ufffd" not in text or len(held) == 4 or following != weight:  # no character has more than four bytes
            yield text, held[0], weight
            before, held = held, []


def counts(report: dict[str, Any]) -> Table:
    """Rows by what became of them, then the splits with their tokens."""
    table = Table("", "rows", "tokens", "trained", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ("train", "eval", "test"):
        table.add_row(name, *(f"{report[name][key]:,}" for key in ("rows", "tokens", "trained_tokens")))
    for reason, n in report["dropped"].items():
        table.add_row(f"dropped: {reason.replace('_', ' ')}", f"{n:,}")
    table.add_row("read", f"{report['read']:,}")
    return table


def histogram(lengths: np.ndarray, most: int = 8) -> Text:
    """Row lengths in at most `most` steps of 1, 2 or 5 times a power of ten."""
    top = int(lengths.max())
    width = next(w * 10**e for e in range(12) for w in (1, 2, 5) if w * 10**e * most > top)
    n = np.bincount(lengths // width)
    out = Text("tokens a row\n")
    for i, count in enumerate(n.tolist()):
        bar = "█" * round(BAR * count / n.max()) or ("▏" if count else "")
        out.append(f"{i * width:>8,}-{(i + 1) * width - 1:<8,} {bar} {count:,}\n")
    return out


def prompting(stream: Prompts) -> str:
    each = f"{stream.batch_size} prompts" + (f" x {stream.samples} answers" if stream.samples > 1 else "")
    return f"an epoch: {stream.bins / stream.batch_size:,.1f} steps of {each}; steps of the run: {stream.steps_total:,}"


def packing(stream: Stream) -> str:
    kind = "rows" if stream.packing else "rows (one example each)"
    few = f"\n{stream.few}" if stream.few else ""
    return (
        f"an epoch: {stream.bins:,} {kind} of {stream.length} tokens, {stream.fullness:.1%} full = "
        f"{stream.bins / stream.batch_size:,.1f} steps of {stream.batch_size}; steps of the run: {stream.steps_total:,}"
        f"{few}"
    )
