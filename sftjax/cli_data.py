"""The verb `data`: rows are looked at, or others written from them; a function for each word that may follow it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from itertools import islice
from typing import Any

from sftjax.options import EXAMPLES

READ = ("data.format", "data.columns", "data.roles", "data.system")  # what says how rows are read
SAY, SKIP = ("data.label_prompt", "task"), "data.on_bad_row"
OF_ROWS = {  # what of a config has an effect on each
    "check": (*READ, *SAY),
    "clean": (*READ, *SAY),
    "split": (*READ, *SAY, SKIP, "data.split", "seed"),
    "select": (*READ, *SAY, SKIP, "seed"),
    "convert": (*READ, "task", SKIP),
    "pairs": (*READ, SKIP),
}
SUITED = {"pair": "dpo", "tree": "dpo", "ranking": "reward", "unpaired": "kto", "prompt": "grpo"}  # format -> config
SUITED |= {"label": "classify", "text": "pretrain"}
ASKED_TOO = "rows with a held-out question and another answer"
SHOWN = 3  # rows named where many are alike


def data(args: argparse.Namespace) -> None:
    from sftjax.check import check as check_config
    from sftjax.config import UserError, default, load, override

    if not args.what:
        raise UserError(f"needs a word after it, one of {', '.join(WHATS)}; for example\n  {EXAMPLES['data']}")
    config, of = load(args.config) if args.config else default(), OF_ROWS[args.what]
    for item in args.overrides:
        if not item.startswith(of):
            raise UserError(f"--config.{item}: has no effect on sftjax data {args.what}; leave it out. What has: {', '.join(of)}")
        override(config, *item.split("=", 1))
    check_config(config)
    args.task = config.task if args.config or any(item.startswith("task=") for item in args.overrides) else None
    config.data.train = (args.data,)  # whose labels a prompt with {labels} names
    WHATS[args.what](args, config)


def want(args: argparse.Namespace, config: Any) -> str:
    """What rows are to hold: what the task learns from, or "any" where none is named."""
    from sftjax.data.pipeline import wanted

    return wanted(config) if args.task else "any"


def check(args: argparse.Namespace, config: Any) -> None:
    import numpy as np

    from sftjax.config import UserError
    from sftjax.data.formats import fail_on
    from sftjax.data.ledger import rows_are
    from sftjax.data.survey import AGAIN, BAD, EQUALS, GOOD, HELD_OUT, asked_too, disputed, earlier, sift

    found, fate, held = sift(args.data, args.held_out, config.data, print, want(args, config))
    print(total(fate, "good", args.held_out))
    print("formats: " + (", ".join(f"{name} {n:,}" for name, n in found.formats.items()) or "none"))
    if found.roles:
        print("turns: " + ", ".join(f"{role} {n:,}" for role, n in found.roles.most_common()))

    def named(rows: np.ndarray) -> tuple[Iterable[str], int]:
        return map(found.where, rows.tolist()), len(rows)

    tell("rows whose answers are equally good or the same", *named(np.flatnonzero(fate == EQUALS)))
    tell("rows that stand in the held-out file too", *named(held_out := np.flatnonzero(fate == HELD_OUT)))
    if held is not None:
        tell(ASKED_TOO, *named(asked_too(found, fate, held)))
    again = (f"{found.where(i)} (as {found.where(j)})" for i, j in earlier(found, fate))
    tell("rows that say what an earlier one says", again, int((fate == AGAIN).sum()))
    several = disputed(found, fate)
    said = (" and ".join(map(found.where, rows[:SHOWN].tolist())) for rows in several)
    tell("questions with several answers", said, len(several))
    tell("rows with an empty answer", *named(np.flatnonzero(found.rows["silent"])))
    print()
    kept = f"sftjax data clean {shlex.join(again_with(args))} --out=clean.jsonl"
    mend = f"\nmend them, or leave them out: {kept}" if (fate == GOOD).any() else "\nmend them"
    fail_on(found.bad, mend=mend, total=int((fate == BAD).sum()))
    if len(held_out):
        raise UserError(f"{rows_are(len(held_out))} in {args.held_out} too; leave out what is: {kept}")
    print(f"next: {kept}" if fate.any() else look(args, found.formats, args.data))


def clean(args: argparse.Namespace, config: Any) -> None:
    from sftjax.data.pick import clean
    from sftjax.data.survey import asked_too

    found, fate, held = clean(args.data, args.out, config, held=args.held_out, want=want(args, config), force=args.force)
    print(total(fate, f"in {args.out}", args.held_out))
    if held is not None:
        asked = asked_too(found, fate, held)
        tell(ASKED_TOO, map(found.where, asked.tolist()), len(asked))
    for bad in found.bad[:SHOWN]:
        print(f"  {bad}")
    print(look(args, found.formats, args.out))


def split(args: argparse.Namespace, config: Any) -> None:
    from sftjax.data.formats import counted
    from sftjax.data.pick import PARTS, split

    found, part = split(args.data, args.out, config, want=want(args, config), force=args.force)
    sizes = {name: int((part == number).sum()) for number, name in enumerate(PARTS)}
    left = int((part < 0).sum())
    print(f"{counted(len(part))} = " + " + ".join(f"{n:,} {name}" for name, n in sizes.items()) + unusable(left))
    held = f" --config.data.eval={shlex.quote(f'{args.out}/eval.jsonl')}" if sizes["eval"] else ""
    print(look(args, found.formats, f"{args.out}/train.jsonl") + held)


def select(args: argparse.Namespace, config: Any) -> None:
    from sftjax.data.formats import counted
    from sftjax.data.pick import select
    from sftjax.data.survey import BAD

    found, taken = select(args.data, args.out, args.rows, config, want=want(args, config), force=args.force)
    bad = int((found.rows["fate"] == BAD).sum())
    rest = len(taken) - bad - int(taken.sum())
    print(f"{counted(len(taken))} = {taken.sum():,} in {args.out} + {rest:,} not taken{unusable(bad)}")
    print(look(args, found.formats, args.out))


def convert(args: argparse.Namespace, config: Any) -> None:
    from sftjax.data.convert import convert
    from sftjax.data.formats import counted

    done = convert(args.data, args.out, config, want=want(args, config), force=args.force)
    print(f"{counted(done['rows'])} = {done['written']:,} as {done['format']} in {args.out}{unusable(done['bad'])}")
    args.config, args.overrides = None, done["needs"]  # the rest is in the rows now
    print(look(args, (done["format"],), args.out))


def pairs(args: argparse.Namespace, config: Any) -> None:
    from sftjax.data.pairs import write

    counts = write(args.data, args.out, config.data, force=args.force)
    left = {
        "bad": "that cannot be used are left out",
        "without": "make no pair, all their answers being equally good or the same",
    }
    told = [f"{counts[name]:,} {why}" for name, why in left.items() if counts[name]]
    print(f"{counts['rows']:,} rows" + "".join(f", {part}" for part in told))
    print(f"{counts['pairs']:,} pairs in {args.out}, {counts['ties']:,} ties between two answers make none")
    print(f"next: sftjax preview --config=configs/dpo.py --config.data.train={shlex.quote(args.out)}")


def tell(what: str, rows: Iterable[str], n: int) -> None:
    """A line on the rows that are so, where there are any, with the first of them."""
    if n:
        print(f"{what}, {n:,}: {', '.join(islice(rows, SHOWN))}{', ...' if n > SHOWN else ''}")


def total(fate: Any, good: str, held: str | None) -> str:
    """The rows by what became of them, a sum."""
    from sftjax.data.formats import counted
    from sftjax.data.pick import tally

    words = {
        "good": good,
        "bad": "that cannot be used",
        "equals": "without a better answer",
        "held_out": f"that stand in {held} too",
        "again": "that say what an earlier one says",
    }
    parts = [f"{n:,} {words[name]}" for name, n in tally(fate).items() if n or name == "good"]
    return f"{counted(len(fate))} = {' + '.join(parts)}"


def unusable(bad: int) -> str:
    return f" + {bad:,} that cannot be used" if bad else ""


def again_with(args: argparse.Namespace) -> list[str]:
    """The options that say what is read and how, for a command that reads the same."""
    given = {"--data": args.data, "--held-out": args.held_out, "--config": args.config}
    return [f"{name}={held}" for name, held in given.items() if held] + [f"--config.{item}" for item in args.overrides]


def look(args: argparse.Namespace, formats: Iterable[str], out: str) -> str:
    """What to do next with the rows of `out`."""
    suited = SUITED.get(next(iter(formats), ""), "sft") if args.task is None else args.task
    config = args.config or f"configs/{'sft_lora' if suited == 'sft' else suited}.py"
    read = [item for item in args.overrides if item.startswith((*READ, "data.label_prompt"))]
    words = [f"--config={config}", f"--config.data.train={out}", *(f"--config.{item}" for item in read)]
    return f"next: sftjax preview {shlex.join(words)}"


WHATS = {"check": check, "clean": clean, "split": split, "select": select, "convert": convert, "pairs": pairs}
