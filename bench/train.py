"""Speed of a training step on an accelerator: tokens a second, model FLOP/s, MFU, memory. It has not been run on one yet.

    python bench/train.py                                    # six cases, in under ten minutes on an H200
    python bench/train.py --cases 8b-lora 8b-qlora --minutes=4
    python bench/train.py --peer --cases 8b-lora             # TRL and PEFT on the same shapes, in the same call
    python bench/train.py --cases 1b-full --trace=traces     # jax.profiler's trace of three steps, for xprof
    python bench/train.py --shapes tiny                      # any machine, seconds: that it runs

Each case is a process of its own. Weights are random and made on the device, frozen ones in bfloat16, what trains in float32;
the batch is rows of 4096 tokens packed without a gap from texts of some 600 (lognormal), of which two thirds of the tokens are
trained; the step is the run's own (train/step.py over the Decoder and masked cross entropy, AdamW, clipping, state donated).
A setting that does not fit gives way to the next of its case, which is said. Timed are steps after two that are not, one after
the other with the state handed on, and the clock stops when the last has ended. What one case's compiler finds out about matrix
products the next ones' know (JAX_COMPILATION_CACHE_DIR, by default a new folder for each call).

    tokens/s         of all tokens; trained tokens/s of those in the loss
    model FLOP/s     tokens/s * the model's own FLOPs a token (train/progress.py: 2 P forward, 2 P backward for dx, 2 for each
                     parameter that trains, attention over the keys a token sees in its text, the head); what
                     rematerialisation does twice, and what is masked, does not count
    MFU              model FLOP/s over the maker's dense bfloat16 peak of the device
    peak             the device's own count of bytes in use at most, making the weights included
    step             the compiler's sum for the step: what it is given and what it needs beside that

Nothing is imported but jax, flax (with the rich that it needs), optax and numpy; ml_collections, where missing, has a stand-in.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
PEER = REPO / "bench/peers/trl_train.py"
LENGTH, TEXT, TRAINED = 4096, 600, 2 / 3
LEAST = 60  # seconds that a case leaves to each one after it

LLAMA = {"model_type": "llama", "hidden_act": "silu", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
LLAMA |= {"max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {  # as a config.json has them
    "llama3-8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama3.2-1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64}
    | {"tie_word_embeddings": True},
    "llama3.2-3b": LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}
    | {"tie_word_embeddings": True},
    "qwen2.5-7b": {"model_type": "qwen2", "hidden_act": "silu", "vocab_size": 152064, "hidden_size": 3584}
    | {"intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "tiny": LLAMA
    | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2},
}
# case -> shape, method, length of a row, and (rows, remat) to be tried in turn: the first that fits is measured
FOUR = ((4, "minimal"), (2, "minimal"), (4, "block"), (1, "block"))
CASES: dict[str, tuple[str, str, int, tuple[tuple[int, str], ...]]] = {
    "8b-lora": ("llama3-8b", "lora", LENGTH, FOUR),
    "8b-qlora": ("llama3-8b", "qlora", LENGTH, FOUR),
    "7b-lora": ("qwen2.5-7b", "lora", LENGTH, FOUR),
    "1b-full": ("llama3.2-1b", "full", LENGTH, ((8, "minimal"), *FOUR)),
    "3b-full": ("llama3.2-3b", "full", LENGTH, FOUR),
    "8b-qlora-small": ("llama3-8b", "qlora", 2048, ((2, "offload"), (2, "block"))),  # in how little memory it goes
}
COLUMNS = {
    "rows": "rows x length",
    "remat": "remat",
    "step_s": "s a step",
    "tokens_per_s": "tokens/s",
    "trained_per_s": "trained tokens/s",
    "tflops": "model TFLOP/s",
    "mfu": "MFU",
    "peak_gib": "peak GiB",
    "step_gib": "step GiB",
    "compile_s": "compile s",
    "loss": "loss",
}
NO_ROOM = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OutOfMemory")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    p.add_argument("--shapes", choices=["tiny"], help="tiny: every case on a tiny model with rows of 256 tokens")
    p.add_argument("--rows", type=int, help="rows a step, in place of the case's own")
    p.add_argument("--remat", choices=["none", "minimal", "block", "offload"], help="in place of the case's own")
    p.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    p.add_argument(
        "--minutes", type=float, default=9.5, help="for all of it; what is not begun by then is left out (default 9.5)"
    )
    p.add_argument("--peer", action="store_true", help="TRL and PEFT too, case by case")
    p.add_argument("--peer-python", default=sys.executable, help="the interpreter that has them (default this one)")
    p.add_argument("--trace", type=Path, help="folder for a profile of three steps of each case")
    p.add_argument("--out", type=Path, help="markdown file for the table")
    p.add_argument("--one", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        print(json.dumps(measure(**json.loads(a.one))))
        return
    until, lines = time.monotonic() + 60 * a.minutes, []
    todo = [(case, who) for case in a.cases for who in ("sftjax", "TRL")[: 1 + a.peer]]
    with tempfile.TemporaryDirectory() as compiled:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
        for i, (case, who) in enumerate(todo, 1):
            left, after = until - time.monotonic(), len(todo) - i
            got = run(a, case, who, until - min(LEAST * after, left * after / (after + 1)))
            lines.append((case, who, got))
            print(f"{case} {who}: {json.dumps(got)}", file=sys.stderr, flush=True)
            if a.out:  # what is measured is kept, whatever becomes of the rest
                a.out.write_text(table(lines, a))
    print(table(lines, a))


def run(a: argparse.Namespace, case: str, who: str, until: float) -> dict[str, Any]:
    """The first of the case's settings that fits, measured in a process of its own; {"why": ...} where none was."""
    shape, method, length, settings = CASES[case]
    settings = tuple((a.rows or rows, a.remat or remat) for rows, remat in settings)
    refused: list[str] = []
    broken: set[str] = set()  # what failed for another reason than room is not tried with fewer rows
    for rows, remat in dict.fromkeys(settings):
        if remat in broken:
            continue
        left = until - time.monotonic()
        if left < 20:
            return {"why": "; ".join([*refused, "no time was left"])}
        size = {"raw": SHAPES[a.shapes or shape], "length": 256 if a.shapes else length}
        asked = {"method": method, "rows": rows, "remat": remat, "steps": a.steps, **size}
        if who == "TRL":
            command = [a.peer_python, str(PEER), json.dumps(asked)]
        else:
            trace = str(a.trace / case) if a.trace else None
            command = [sys.executable, __file__, f"--one={json.dumps(asked | {'trace': trace})}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=environment(who))
        except subprocess.TimeoutExpired:
            return {"why": "; ".join([*refused, f"{rows} rows, remat={remat}: the time ran out"])}
        if done.returncode == 0:
            tried = {"tried": refused} if refused else {}
            return {"rows": rows, "remat": remat} | json.loads(done.stdout.splitlines()[-1]) | tried
        if any(said in done.stderr for said in NO_ROOM):
            refused.append(f"{rows} rows, remat={remat}: no room")
            continue
        said = done.stderr.strip().splitlines() or ["it ended without a word"]
        print(*said[-30:], sep="\n", file=sys.stderr, flush=True)
        refused.append(f"{rows} rows, remat={remat}: {said[-1][:200]}")
        broken.add(remat)
    return {"why": "; ".join(refused)}


def environment(who: str) -> dict[str, str]:
    """Of a GPU's memory, all that is needed; jax takes three quarters of it unasked. Filtered, a traceback ends with a remark."""
    ours = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "JAX_TRACEBACK_FILTERING": "off"}
    return (ours if who == "sftjax" else {"HF_HUB_OFFLINE": "1"}) | os.environ


def measure(
    raw: dict[str, Any], method: str, rows: int, length: int, remat: str, steps: int, trace: str | None = None
) -> dict[str, Any]:
    """One case on this process's first device."""
    stand_in()
    import jax

    from sftjax import tree
    from sftjax.losses.tokens import masked_xent
    from sftjax.models.decoder import Decoder, forward
    from sftjax.train import optim
    from sftjax.train.progress import mfu, model_flops_per_token
    from sftjax.train.step import init_state, make_step
    from sftjax.weights.lora import rates

    c, shape = configure(method), read_shape(raw)
    dtype = jax.numpy.bfloat16
    trainable, frozen, mask = weights(c, shape)
    params = jax.eval_shape(tree.join, trainable, frozen)
    optimizer = optim.optimizer(c.optim, optim.schedule(c.optim, 1000), rates(trainable, 1.0))
    step = make_step(masked_xent(forward(Decoder(shape, dtype, True, remat))), optimizer, seed=0, clip=1.0)
    state = init_state(trainable, optimizer, dtype)
    del trainable
    packed, mean_length = batch(rows, length, shape.vocab)
    packed = jax.device_put(packed)

    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, packed).compile()
    compile_s = time.perf_counter() - began
    for _ in range(2):
        state, metrics = compiled(state, frozen, packed)
    first = float(metrics["loss"])
    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = compiled(state, frozen, packed)
    jax.block_until_ready(state)
    step_s = (time.perf_counter() - began) / steps
    if trace:
        with jax.profiler.trace(trace):
            for _ in range(3):
                state, metrics = compiled(state, frozen, packed)
            jax.block_until_ready(state)

    device, m = jax.devices()[0], compiled.memory_analysis()
    summed = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    flops = model_flops_per_token(shape, params, mask, mean_length)
    speed = int(metrics["tokens"]) / step_s
    return {
        "device": device.device_kind,
        "length": length,
        "step_s": step_s,
        "tokens_per_s": speed,
        "trained_per_s": int(metrics["trained_tokens"]) / step_s,
        "flops_per_token": flops,
        "tflops": speed * flops / 1e12,
        "mfu": mfu(speed, flops, device.device_kind, 1),
        "peak_gib": peak and peak / 2**30,
        "step_gib": summed / 2**30,
        "compile_s": compile_s,
        "first_loss": first,
        "loss": float(metrics["loss"]),
        "skipped": int(metrics["skipped"]),
    }


def configure(method: str) -> Any:
    from sftjax.config import default

    c = default()
    c.method = "full" if method == "full" else "lora"
    c.model.quantize = "nf4" if method == "qlora" else None
    c.lora.rank, c.lora.alpha, c.optim.lr = 16, 32.0, 1e-5
    return c


def read_shape(raw: dict[str, Any]) -> Any:
    from sftjax.models.families import config_from_hf

    return config_from_hf(raw)


def weights(c: Any, shape: Any) -> tuple[Any, Any, Any]:
    """(trainable, frozen, mask), random, on the device: bfloat16, quantised kernel by kernel, and what trains in float32."""
    import jax
    import jax.numpy as jnp

    from sftjax import tree
    from sftjax.models.decoder import shapes
    from sftjax.weights import method

    kept = jnp.float32 if c.method == "full" else jnp.bfloat16
    quantisers = method.quantiser(shapes(shape), c)

    def make(path: str, like: Any) -> Any:
        """As init does, but a layer of a leaf at a time, or some rows: a GPU draws a number by way of four words of 32 bits."""

        def leaf() -> Any:
            if path.endswith("scale"):
                return jnp.full(like.shape, 0.0 if shape.norm_offset else 1.0, kept)
            if path.endswith("bias"):
                return jnp.zeros(like.shape, kept)
            n = like.shape[0] if like.ndim > 2 else math.gcd(like.shape[0], 64)

            def part(key: Any) -> Any:
                w = shape.init_std * jax.random.normal(key, (like.size // n // like.shape[-1], like.shape[-1]), jnp.bfloat16)
                return quantisers[path](w) if path in quantisers else w.astype(kept)

            made = jax.lax.map(part, jax.random.split(tree.fold_path(jax.random.key(0), path), n))
            return made if like.ndim > 2 else made.reshape(like.shape)

        return jax.jit(leaf)()

    params = method.apply(tree.map_leaves(make, shapes(shape)), c)
    mask = method.mask(params, c)
    params = jax.tree.map(lambda x, trains: x.astype(jnp.float32) if trains else x, params, mask)
    return *tree.split(params, mask), mask


def texts(rows: int, length: int) -> list[list[int]]:
    """Lengths of the texts in each row, which they fill."""
    import numpy as np

    rng, out = np.random.default_rng(0), []
    for _ in range(rows):
        lengths: list[int] = []
        while sum(lengths) < length:
            drawn = int(np.clip(rng.lognormal(np.log(TEXT), 0.8), 32, length))
            lengths.append(min(drawn, length - sum(lengths)))
        out.append(lengths)
    return out


def batch(rows: int, length: int, vocab: int) -> tuple[Any, float]:
    """(a Batch of packed texts, the mean length of the text that a token is in)."""
    import numpy as np

    from sftjax.data.batch import Batch

    found, rng = texts(rows, length), np.random.default_rng(1)
    segments = np.stack([np.repeat(np.arange(1, len(row) + 1, dtype=np.int32), row) for row in found])
    positions = np.stack([np.concatenate([np.arange(n, dtype=np.int32) for n in row]) for row in found])
    starts = np.stack([np.repeat(np.asarray(row), row) for row in found]) * (1 - TRAINED)  # a prompt before each answer
    trained = (positions >= np.maximum(starts, 1)).astype(np.float32)
    tokens = rng.integers(0, vocab, segments.shape, dtype=np.int32)
    squares = sum(n * n for row in found for n in row)
    return Batch(tokens, trained, segments, positions), squares / segments.size


def stand_in() -> None:
    """ml_collections where it is not installed: as much of it as a default config asks for."""
    try:
        import ml_collections  # noqa: F401
    except ImportError:
        made, inner = types.ModuleType("ml_collections"), types.ModuleType("ml_collections.config_dict")

        class ConfigDict(dict):  # type: ignore[type-arg]
            __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__

            def lock(self) -> None:
                pass

            unlock = lock

        made.ConfigDict, made.FieldReference = ConfigDict, lambda value, **_: value  # type: ignore[attr-defined]
        made.config_dict, inner.placeholder = inner, lambda _: None  # type: ignore[attr-defined]
        sys.modules |= {"ml_collections": made, "ml_collections.config_dict": inner}


def table(lines: list[tuple[str, str, dict[str, Any]]], a: argparse.Namespace) -> str:
    from importlib.metadata import PackageNotFoundError, version

    def found(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"no {name}"

    device = next((got["device"] for *_, got in lines if "device" in got), "no device")
    names = ["jax", "jaxlib", "flax", "optax", *(("torch", "trl", "peft", "transformers") if a.peer else ())]
    out = [f"{device}; {', '.join(map(found, names))}; {time.strftime('%Y-%m-%d')}", ""]
    out += [f"    python {' '.join([str(Path(__file__).relative_to(REPO)), *sys.argv[1:]])}", ""]
    out += ["|case|by|" + "|".join(COLUMNS.values()) + "|", "|---|---|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for case, who, got in lines:
        if "why" in got:
            out.append(f"|{case}|{who}|{got['why'].replace('|', '/')}|" + "|" * (len(COLUMNS) - 1))
            continue
        shown = got | {"rows": f"{got['rows']} x {got['length']}"}
        out.append(f"|{case}|{who}|" + "|".join(cell(name, shown.get(name)) for name in COLUMNS) + "|")
    out += [f"{case}: {text}" for case, _, got in lines for text in got.get("tried", ())]
    return "\n".join(out) + "\n"


def cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    forms = {"step_s": ".3f", "mfu": ".1%", "tokens_per_s": ",.0f", "trained_per_s": ",.0f", "tflops": ",.1f", "compile_s": ".0f"}
    return format(value, forms.get(name, ".2f"))


if __name__ == "__main__":
    main()
