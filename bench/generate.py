"""Tokens a second of greedy generation, beside transformers' `generate`, in one process and in turn.

    python bench/generate.py --models CASE/model SHARED/data/hf_models/stories260K --out=bench/results/generate.md

Both are given the same prompts (beginnings of a text, of unequal lengths; transformers' padded on the left as its manual says),
make the same number of new tokens with no token ending an answer, and must make the same ones. Both are warmed up with the
very request that is then timed; a time is the whole call's, from lists of ids to lists of ids; medians of --runs, in turn.
transformers runs on one thread and on torch's own number, and the faster counts; XLA chooses for itself. Both also with
--draft-tokens guesses a pass: sftjax' draft_tokens, transformers' prompt_lookup_num_tokens, which takes one row alone.

The floor of a step is the larger of two times on this machine, both measured here: reading every weight once, and a row's
products (2 FLOPs a parameter of a matrix) at the speed of a large matrix product. Attention, norms and the choice of a token
are not in it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import torch
import transformers

import sftjax
from sftjax.generate.engine import Engine

sys.path.insert(0, str(Path(__file__).parent))
from sft import hardware

TEXT = "Once upon a time, there was a small dog. It had a red ball and it ran to the park, where the sun was warm. " * 2


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", required=True, nargs="+", type=Path, help="Hugging Face folders")
    p.add_argument("--rows", nargs="+", type=int, default=[1, 32])
    p.add_argument("--tokens", type=int, default=256, help="new ones, a row (default 256)")
    p.add_argument("--draft-tokens", type=int, default=4, help="guessed ones, a pass (default 4)")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--out", type=Path, help="markdown file for the table")
    a = p.parse_args()
    read, multiply = bandwidth(), flops()
    columns = "model|rows|transformers|sftjax|times|transformers, guessing|sftjax, guessing|times, guessing|ms a step|floor ms"
    lines = [f"|{columns}|", "|---" + "|---:" * columns.count("|") + "|"]
    for folder, rows in itertools.product(a.models, a.rows):
        lines.append(row(folder, rows, a.tokens, a.draft_tokens, a.runs, read, multiply))
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(
        [
            f"# Greedy generation, float32, on {hardware()}",
            "",
            f"`python bench/generate.py --models ... --rows {' '.join(map(str, a.rows))} --tokens={a.tokens} "
            f"--draft-tokens={a.draft_tokens} --runs={a.runs}`, "
            f"{time.strftime('%Y-%m-%d')}, load average at the end {os.getloadavg()[0]:.1f}. jax {jax.__version__}; "
            f"transformers {transformers.__version__}, torch {torch.__version__}, on one thread or on all, whichever is faster. "
            f"New tokens a second over all rows, {a.tokens} a row, the same in all; million parameters that a step reads. "
            f"Guessing is {a.draft_tokens} tokens a pass; its `times` are of the faster transformers.",
            f"The floor: {read / 1e9:.0f} GB/s read and {multiply / 1e9:.0f} GFLOP/s multiplied.",
            "",
            *lines,
            "",
        ]
    )
    print(text)
    if a.out:
        a.out.write_text(text)


def row(folder: Path, rows: int, tokens: int, guesses: int, runs: int, read: float, multiply: float) -> str:
    """One line of the table."""
    model = sftjax.load(folder)
    engine = Engine(model.module, model.params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)  # no end of a text
    ids = model.tokenizer(TEXT)["input_ids"]
    prompts = [ids[: 4 + i % 29] for i in range(rows)]

    def ours(draft_tokens: int) -> list[list[int]]:
        return [answer.ids for answer in engine.generate(prompts, max_new_tokens=tokens, draft_tokens=draft_tokens)]

    def transformers_on(threads: int, **options: int) -> list[list[int]]:
        torch.set_num_threads(threads)
        return generate(theirs, prompts, tokens, **options)

    threads = sorted({1, torch.get_num_threads()})
    plain = [functools.partial(transformers_on, n) for n in threads]
    lookup = [functools.partial(run, prompt_lookup_num_tokens=guesses) for run in plain] if rows == 1 else []
    mine, guessing, *others = timed([functools.partial(ours, n) for n in (0, guesses)] + plain + lookup, runs)
    theirs_plain, theirs_guessing = min(others[: len(plain)]), min(others[len(plain) :], default=None)
    c = model.module.config
    read_once = sum(x.size for x in jax.tree.leaves(model.params)) - (0 if c.tied else c.vocab * c.width)
    floor = max(4 * read_once / read, 2 * read_once * rows / multiply)
    cells = [f"{name(folder)}, {read_once / 1e6:.2f} M", str(rows)]
    for best, own in ((theirs_plain, mine), (theirs_guessing, guessing)):
        fastest_theirs = min(theirs_plain, best or theirs_plain)
        cells += [f"{rows * tokens / best:,.0f}" if best else "-", f"{rows * tokens / own:,.0f}", f"{fastest_theirs / own:.1f}"]
    return f"|{'|'.join(cells)}|{1e3 * mine / tokens:.3f}|{1e3 * floor:.3f}|"


def generate(model: transformers.PreTrainedModel, prompts: list[list[int]], tokens: int, **options: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **options)
    return out[:, longest:].tolist()


def timed(contenders: list[Callable[[], list[list[int]]]], runs: int) -> list[float]:
    """The median seconds of each, after one run that is not counted. Exits where they do not make the same tokens."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for run in range(runs + 1):
        made = []
        for contender, took in zip(contenders, seconds):
            began = time.perf_counter()
            made.append(contender())
            if run:
                took.append(time.perf_counter() - began)
        for other in made[1:]:
            for row, (x, y) in enumerate(zip(made[0], other)):
                if x != y:
                    at = next((t for t, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y)))
                    sys.exit(f"row {row} differs from its new token {at} on: {x[at:][:5]} and {y[at:][:5]}")
    return [statistics.median(took) for took in seconds]


def bandwidth(size: int = 2**26) -> float:
    """Bytes a second that all cores read."""
    x = jnp.ones(size, jnp.float32)
    total = jax.jit(jnp.sum)
    return 4 * size / fastest(lambda: total(x))


def flops(size: int = 1024) -> float:
    """Floating-point operations a second of a large product."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / fastest(lambda: product(x, x))


def fastest(run: Callable[[], jax.Array], runs: int = 10) -> float:
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        run().block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def name(folder: Path) -> str:
    return folder.parent.name if folder.name == "model" else folder.name


if __name__ == "__main__":
    main()
