"""NEFTune: noise of the published size, drawn anew with every key, absent without one."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import batch, config, params

from sftjax.losses import neftune
from sftjax.models.decoder import Decoder, forward

ALPHA, WIDTH = 5.0, 24
BATCH = batch([[30], [20, 5, 4]], 32)
KEY = jax.random.key(0)


def noise(key):
    """What is added to the embeddings, [B, T, D]."""

    def spy(params, b, key=None, *, on_embed=None):
        return on_embed(jnp.zeros((2, 32, WIDTH)))

    return np.asarray(neftune(spy, alpha=ALPHA)(None, BATCH, key))


def test_noise_is_uniform_within_alpha_over_the_root_of_the_segments_own_length_times_width():
    added = np.stack([noise(key) for key in jax.random.split(KEY, 30)])
    for row, start, length in [(0, 0, 30), (1, 0, 20), (1, 20, 5), (1, 25, 4)]:
        bound = ALPHA / (length * WIDTH) ** 0.5
        part = added[:, row, start : start + length]
        assert 0.98 * bound < np.abs(part).max() <= bound
        np.testing.assert_allclose(part.std(), bound / 3**0.5, rtol=0.05)
        assert abs(part.mean()) < 0.05 * bound


def test_every_key_draws_its_own_and_none_draws_nothing():
    p, model = params(config()), forward(Decoder(config()))
    noisy = jax.jit(neftune(model, alpha=ALPHA))
    plain = jax.jit(model)(p, BATCH).hidden
    np.testing.assert_array_equal(noisy(p, BATCH).hidden, plain)
    np.testing.assert_array_equal(noisy(p, BATCH, KEY).hidden, noisy(p, BATCH, KEY).hidden)
    other = noisy(p, BATCH, jax.random.key(1)).hidden
    assert np.abs(noisy(p, BATCH, KEY).hidden - other).max() > 0.01 and np.abs(other - plain).max() > 0.01
