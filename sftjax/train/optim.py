"""Optimiser and schedule from the config. Everything is optax's; the choice of what decays is ours."""

from __future__ import annotations

import operator
import re
from typing import Any

import jax
import optax
from jax.sharding import Sharding
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from sftjax import tree
from sftjax.train.eight_bit import blocked, scale_by_adam_8bit

EMBED = re.compile(r"(^|/)embed/")
LAYERS = re.compile(r"(^|/)(layers|lower)/")  # of a model that stands beside the one that trains too


def schedule(c: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate of a step: linear warm-up from lr / n, then the named decay, which would reach `final_lr * lr` one step after
    the last, as transformers' do; wsd reaches it at the last."""
    warmup = round(c.warmup * steps) if c.warmup < 1 else int(c.warmup)
    warmup = min(warmup, max(steps - 1, 0))
    rest, end = max(steps - warmup, 1), c.final_lr * c.lr
    match c.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(c.lr, rest, alpha=c.final_lr)
        case "linear":
            after = optax.linear_schedule(c.lr, end, rest)
        case "constant":
            after = optax.constant_schedule(c.lr)
        case "wsd":  # warm-up, stable, decay: arXiv:2404.06395
            begin = max(rest - 1 - max(1, round(c.decay * steps)), 0)
            falls = optax.linear_schedule(c.lr, end, max(rest - 1 - begin, 1))
            after = optax.join_schedules([optax.constant_schedule(c.lr), falls], [begin])
    # the first step already moves: a warm-up of n steps takes lr / n, 2 lr / n, ...
    return optax.join_schedules([optax.linear_schedule(c.lr / max(warmup, 1), c.lr, max(warmup - 1, 1)), after], [warmup])


def rank(path: str) -> int:
    """Axes of a matrix at `path`: two, the layers' and the experts'."""
    return 2 + bool(LAYERS.search(path)) + ("/experts/" in path)


def decays(trainable: Any) -> Any:
    """True for matrices; False for norms and biases, and for a kind's vectors (magnitudes, an adapter's biases)."""

    def leaf(path: str, w: Any) -> Any:
        return jax.tree.map(lambda x: not path.endswith(("scale", "bias")) and x.ndim == rank(path), w)

    return tree.map_leaves(leaf, trainable)


def optimizer(c: ConfigDict, rate: optax.Schedule, rates: Any = None) -> optax.GradientTransformation:
    """The named optimiser with decoupled weight decay. Clipping is the step's, which knows the norm already.

    `rates`, a number for every array that trains, multiply its learning rate; None is 1 for all.
    """
    decay = optax.add_decayed_weights(c.weight_decay, decays)
    match c.name:
        case "adamw":
            core = [optax.scale_by_adam(c.b1, c.b2, c.eps), decay]
        case "adamw_8bit":
            core = [_adam_8bit(c), decay]
        case "adam":  # L2: the decay passes through the moments
            core = [decay, optax.scale_by_adam(c.b1, c.b2, c.eps)]
        case "lion":
            core = [optax.scale_by_lion(c.b1, c.b2), decay]
        case "sgd":
            core = [decay, optax.trace(c.b1)] if c.b1 else [decay]
        case "adafactor":
            core = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), decay]
        case "muon":
            core = [_muon(c), decay]
    if rates is not None:
        core.append(optax.stateless(lambda updates, _: jax.tree.map(operator.mul, updates, rates)))
    chain = optax.chain(*core, optax.scale_by_learning_rate(rate))
    return offloaded(chain) if c.offload else chain


def offloaded(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with its arrays in the host's memory. They come to the device for the update, after the backward pass has let its
    activations go. The step's caller says where they lie between steps: `host`.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def moved(state: Any, to: Any) -> Any:
            return jax.tree.map(lambda x: jax.device_put(x, to) if x.ndim else x, state)

        updates, state = inner.update(grads, moved(state, jax.memory.Space.Device), params)
        return updates, moved(state, jax.memory.Space.Host)

    return optax.GradientTransformation(inner.init, update)


def host(x: Any, home: Sharding) -> Sharding:
    """Where an offloaded optimiser's `x` lies, which would lie at `home`; counters stay on the device."""
    return home.with_memory_kind("pinned_host") if x.ndim else home


def _adam_8bit(c: ConfigDict) -> optax.GradientTransformation:
    """Moments in 8 bits, but for small arrays and the embedding, whose gradients are uneven: arXiv:2110.02861, section 2.3."""
    transforms = {"8bit": scale_by_adam_8bit(c.b1, c.b2, c.eps), "float32": optax.scale_by_adam(c.b1, c.b2, c.eps)}

    def label(path: str, w: Any) -> Any:
        return jax.tree.map(lambda x: "8bit" if blocked(x) and not EMBED.search(path) else "float32", w)

    return optax.partition(transforms, lambda trainable: tree.map_leaves(label, trainable))


def _muon(c: ConfigDict) -> optax.GradientTransformation:
    """Muon on the layers' matrices (stacked layers are separate matrices), Adam on the rest; updates of Adam's size.

    optax's `muon` is given only the matrices: what it does with the rest is Nesterov's Adam, and decays norms and biases.
    """

    def label(path: str, w: Any) -> Any:
        matrix = bool(LAYERS.search(path)) and path.endswith("kernel")
        return jax.tree.map(lambda x: "muon" if matrix and x.ndim == rank(path) else "adam", w)

    def matrices(trainable: Any) -> Any:
        return jax.tree.map(lambda _: MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), trainable)

    transforms = {
        # a rate of -1: the chain's own rate follows, with its sign
        "muon": muon(-1.0, consistent_rms=0.2, muon_weight_dimension_numbers=matrices),
        "adam": optax.scale_by_adam(c.b1, c.b2, c.eps),
    }
    return optax.partition(transforms, lambda trainable: tree.map_leaves(label, trainable))
