"""Rotary embeddings equal transformers' for every scaling, restart with every segment, and only see distances."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.models.config import Rope
from sftjax.models.families import rope as families_rope
from sftjax.models.layers import rope, rotate


def angles(positions, segments, head_dim, max_positions, c):
    cos, sin = rope(jnp.asarray(positions), jnp.asarray(segments), head_dim, max_positions, c)
    return np.asarray(cos)[:, :, 0], np.asarray(sin)[:, :, 0]


def scaling(rng, kind):
    """Random `rope_parameters` of a kind."""
    given = {"rope_type": kind, "rope_theta": rng.choice([1e4, 5e5, 1e6])}
    if kind != "default":
        given["factor"] = rng.choice([1.5, 4.0, 8.0])
    if kind in ("llama3", "yarn"):
        given["original_max_position_embeddings"] = rng.choice([32, 64, 2048])
    if kind == "llama3":
        given |= {"low_freq_factor": rng.choice([1.0, 2.0]), "high_freq_factor": rng.choice([4.0, 8.0])}
    if kind == "yarn":
        given |= rng.choice(
            [
                {},
                {"attention_factor": 1.3},
                {"mscale": 1.0, "mscale_all_dim": 0.7},
                {"mscale": 0.7, "mscale_all_dim": 0.7},
                {"mscale": 2.0},
            ]
        )
        given |= rng.choice([{}, {"beta_fast": 16.0, "beta_slow": 2.0}])
        given |= rng.choice([{}, {"truncate": False}])
    return given


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_cos_and_sin_equal_transformers(kind):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rng = random.Random(kind)
    for _ in range(12):
        given, head_dim, T = scaling(rng, kind), rng.choice([10, 64]), rng.choice([40, 200])
        c = LlamaConfig(head_dim=head_dim, max_position_embeddings=128, rope_parameters=dict(given))
        positions = np.arange(T, dtype=np.int32)[None]
        theirs = LlamaRotaryEmbedding(c)(torch.zeros(1), torch.from_numpy(positions))
        ours = angles(
            positions, np.ones_like(positions), head_dim, 128, families_rope.rope({"rope_parameters": given}, 128, head_dim)
        )
        for a, b in zip(ours, theirs):
            np.testing.assert_allclose(a, b.numpy(), atol=5e-5, err_msg=f"{given} head_dim={head_dim} T={T}")


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_positions_restart_with_every_segment(kind):
    c = Rope(kind=kind, factor=2.0, original_max_positions=8)
    positions = np.concatenate([np.arange(20), np.arange(6), np.arange(4)])[None].astype(np.int32)  # the last is padding
    segments = np.repeat([1, 2, 0], [20, 6, 4])[None].astype(np.int32)
    packed = angles(positions, segments, 12, 8, c)
    for where in (slice(0, 20), slice(20, 26)):
        alone = angles(positions[:, where], np.ones_like(positions[:, where]), 12, 8, c)
        for a, b in zip(packed, alone):
            np.testing.assert_array_equal(a[:, where], b)


def test_products_depend_on_distances_alone_and_norms_on_nothing():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 12))

    def product(m, n):
        at = lambda t: rope(jnp.full((1, 1), t), jnp.ones((1, 1), jnp.int32), 12, 64, Rope())  # noqa: E731
        return float((rotate(x, *at(m)) * rotate(y, *at(n))).sum())

    assert product(3, 1) == pytest.approx(product(40, 38), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(1, 3), abs=1e-3)
    assert product(5, 5) == pytest.approx(float((x * y).sum()), abs=1e-5)
