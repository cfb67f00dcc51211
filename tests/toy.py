"""A toy world to train in: a tiny random base with its own tokenizer, a file of questions, a config over both; and lives to end.

A life is the command line in a process of its own, forked from one that has imported everything: `live(argv, log, end)`
returns its exit code and what it printed. `end` names a function below, which ends the life at a chosen moment.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "a lemon": "yellow"}


class Toy:
    """`toy.config(**{"train.steps": 3})`, `toy.argv("train", workdir, "--config.seed=1")`."""

    def __init__(self, root: Path):
        self.root = root
        self.base = make_base(root / "base")
        self.rows = [
            {"messages": [{"role": "user", "content": f"{i}: what colour is {x}?"}, {"role": "assistant", "content": y}]}
            for i in range(12)
            for x, y in COLOURS.items()
        ]
        self.data = write_rows(root / "colours.jsonl", self.rows)
        self.settings: dict[str, Any] = {
            "model.path": str(self.base),
            "data.train": (str(self.data),),
            "data.cache_dir": str(root / "cache"),
            "data.max_length": 64,
            "data.workers": 1,
            "optim.lr": 2e-2,
            "train.steps": 12,
            "train.batch_size": 4,
            "train.tensorboard": False,
            "mesh.data": 1,
        }
        self.config_file = root / "config.py"
        self.config_file.write_text(
            '"""The toy."""\nfrom sftjax.config import default, override\n\n\ndef get_config():\n    c = default()\n'
            + "".join(f"    override(c, {key!r}, {str(shown(value))!r})\n" for key, value in self.settings.items())
            + "    return c\n"
        )

    def config(self, **changes: Any) -> Any:
        """The toy's config with dotted keys changed: `toy.config(**{"lora.rank": 2})`."""
        from sftjax import config

        c = config.default()
        for key, value in (self.settings | changes).items():
            *path, name = key.split(".")
            node = c
            for part in path:
                node = node[part]
            node[name] = value
        return c

    def argv(self, workdir: Path, changes: dict[str, Any], *flags: str) -> list[str]:
        """The command line of the same run."""
        keys = [f"--config.{key}={shown(value)}" for key, value in changes.items()]
        return ["train", f"--config={self.config_file}", f"--workdir={workdir}", *keys, *flags]


def shown(value: Any) -> str:
    return ",".join(value) + "," if isinstance(value, tuple) else str(value)


def make_base(directory: Path, family: str = "qwen3", **changes: Any) -> Path:
    """A random checkpoint with a byte-level tokenizer and ChatML.

    Norms and biases are no ones and zeros, and the head is large enough for a frozen one to say anything with certainty.
    """
    import jax
    import jax.numpy as jnp
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from sftjax import tree
    from sftjax.hf.load import load_config
    from sftjax.hf.save import save
    from sftjax.models.decoder import init
    from sftjax.models.families import FAMILIES

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_tokens(["<|im_end|>", "<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    source = directory.with_name(directory.name + "_config")
    tokenizer.save_pretrained(source)
    raw = SHAPE | {"model_type": family, "architectures": [FAMILIES[family].architecture], "vocab_size": len(tokenizer)} | changes
    (source / "config.json").write_text(json.dumps(raw | {"eos_token_id": tokenizer.eos_token_id}))

    def leaf(path: str, x: jax.Array) -> jax.Array:
        noise = jax.random.normal(tree.fold_path(jax.random.key(7), path), x.shape)
        return x + 0.2 * noise if path.endswith(("scale", "bias")) else x * (30.0 if path == "head/kernel" else 4.0)

    config = load_config(source)
    save(tree.map_leaves(leaf, init(config, jax.random.key(0))), config, source=source, out=directory, dtype=jnp.float32)
    return directory


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


# Lives


def collect_seldom() -> None:
    """Python's collector goes through what comes from here on, seldom, and no more through all that was imported."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def live(argv: list[str], log: Path, end: str = "", *at: Any, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Runs `sftjax argv` to its end, or to the end that `end(*at)` makes: (exit code, or minus the signal; what it printed)."""
    life = begin(argv, log, end, *at, env=env)
    life.join()
    return life.exitcode, log.read_text()


def begin(argv: list[str], log: Path, end: str = "", *at: Any, env: dict[str, str] | None = None) -> Any:
    """The process of a life."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy", "sftjax.tasks", "sftjax.tasks.export", "transformers.models.auto.tokenization_auto"])
    life = context.Process(target=_live, args=(argv, str(log), end, at, env or {}))
    life.start()
    return life


def _live(argv: list[str], log: str, end: str, at: tuple[Any, ...], env: dict[str, str]) -> None:
    collect_seldom()
    os.environ.update(env)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    import jax

    from sftjax.cli import main

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a life is short, and has a hundred small programs
    if end:
        globals()[end](*at)
    main(argv)


def at_step(step: int, signum: int) -> None:
    """The signal comes when `step` has been given to the device and nothing of it was read."""
    from sftjax.train.meter import Meter

    add = Meter.add

    def ending(self, now, metrics):
        add(self, now, metrics)
        if now == step:
            os.kill(os.getpid(), signum)

    Meter.add = ending


def while_saving(number: int) -> None:
    """Killed when the `number`-th checkpoint has files in its temporary directory and is not yet renamed."""
    from sftjax.train.checkpoint import Checkpoints

    save, saves = Checkpoints.save, []

    def ending(self, *args, **kwargs):
        self.manager.wait_until_finished()
        if len(saves) + 1 == number:
            threading.Thread(target=kill_when_part_written, args=(self.directory,), daemon=True).start()
        save(self, *args, **kwargs)
        saves.append(1)
        if len(saves) == number:
            self.manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)  # it was too quick: killed between two steps then

    Checkpoints.save = ending


def kill_when_part_written(directory: Path) -> None:
    while True:
        for part in directory.glob("*tmp*"):
            if any(f.is_file() for f in part.rglob("*")):
                os.kill(os.getpid(), signal.SIGKILL)


def sometime(within: float, seed: int) -> None:
    """Killed a random part of `within` seconds after the first step was compiled."""
    from sftjax.train.meter import Meter

    start = Meter.start

    def ending(self):
        start(self)
        delay = random.Random(seed).uniform(0, within)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        Meter.start = start

    Meter.start = ending


def twice_at_step(step: int, signum: int) -> None:
    """As `at_step`, and again while the loop is still in that step."""
    at_step(step, signum)
    at_step(step, signum)


def impatient() -> None:
    """Does not wait for a network's file system."""
    from sftjax import hosts

    hosts.SEEING = 0.0
