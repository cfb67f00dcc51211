"""Layers in pieces, some of their products together, are the same model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sftjax.generate import apart
from sftjax.generate.apart import put_together, take_apart
from sftjax.models.config import Clamp, Experts
from sftjax.models.decoder import Decoder, forward, init_cache
from sftjax.weights.lora import lora
from sftjax.weights.select import cut

MODELS = {
    "biases": tiny.config(qkv_bias=True, mlp_bias=True),
    "norms of whole q and k": tiny.config(qk_norm="all"),
    "fused as it comes": tiny.config(fused_qkv=True, fused_mlp=True),
    "experts": tiny.config(experts=Experts(4, 2, 16, shared=16)),
    "sinks, experts with biases": tiny.config(
        qkv_bias=True, sinks=True, experts=Experts(4, 2, 16, bias=True, fused=True, clamp=Clamp(1.7, 0.5))
    ),
}
BATCH = tiny.batch([[9], [5]], 9)


def hidden(model, params):
    return jax.jit(forward(model))(put_together(params), BATCH).hidden


@pytest.mark.parametrize("lower", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_taken_apart_it_is_the_same_model(name, lower):
    c = MODELS[name]
    params = tiny.params(c)
    model, params = Decoder(c, lower=lower), cut(params, c.layers - lower) if lower else params
    decoder, pieces = take_apart(model, params)
    assert not decoder.scan and len(pieces["layers"]) == c.layers - lower
    assert decoder.config == replace(c, fused_qkv=True, fused_mlp=not c.experts)
    np.testing.assert_allclose(hidden(decoder, pieces), jax.jit(forward(model))(params, BATCH).hidden, atol=2e-5)


def test_an_adapted_kernel_keeps_its_own_product(monkeypatch):
    c = tiny.config()
    params = lora(tiny.params(c), jax.random.key(0), rank=2, targets=["q_proj", "gate_proj"])
    decoder, pieces = take_apart(Decoder(c), params)
    assert not decoder.config.fused_qkv and not decoder.config.fused_mlp
    np.testing.assert_allclose(hidden(decoder, pieces), jax.jit(forward(Decoder(c)))(params, BATCH).hidden, atol=1e-5)

    monkeypatch.setattr(apart, "LARGEST", 0)
    decoder, pieces = take_apart(Decoder(c), params)
    assert decoder == Decoder(c) and jax.tree.all(jax.tree.map(lambda x, y: x is y, put_together(pieces), params))


def test_the_compiler_sees_through_to_the_pieces():
    c = tiny.config()
    decoder, params = take_apart(Decoder(c), tiny.params(c))
    tokens = jnp.zeros((2, 1), jnp.int32)
    cache = apart.split(init_cache(c, 2, 16, jnp.float32), c.layers)

    def passes(params, cache):
        def step(cache):
            hidden, whole, _ = decoder.apply({"params": put_together(params)}, tokens, tokens + 1, tokens, apart.join(cache))
            return apart.split(whole, c.layers), hidden

        return jax.lax.fori_loop(0, 4, lambda i, carry: step(carry[0]), step(cache))

    text = jax.jit(passes).lower(params, cache).compile().as_text()
    assert f"f32[1,{c.mlp_width},{c.width}]" in text and f"f32[1,2,{c.kv_heads},16,{c.head_dim}]" in text
    assert f"f32[{c.layers}," not in text
