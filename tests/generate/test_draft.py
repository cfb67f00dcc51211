"""Guesses save forward passes and change no token, chosen greedily or drawn, whoever goes on beside a row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sftjax.generate import draft
from sftjax.generate.engine import Engine
from sftjax.models.config import Rope
from sftjax.models.decoder import Decoder

CONFIG = tiny.config(max_positions=128)
PARAMS = tiny.params(CONFIG)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CONFIG.vocab, n).tolist() for n in (3, 41, 1, 17, 8)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "seed": 5},
        {"repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "drawn", "greedy, penalised", "drawn, penalised"],
)
def test_the_same_answers(options):
    free = Engine(Decoder(CONFIG), PARAMS).generate(PROMPTS, max_new_tokens=60, **options)
    stop = free[1].ids[20]
    engine = Engine(Decoder(CONFIG), PARAMS, stop_ids=[stop])
    plain = engine.generate(PROMPTS, max_new_tokens=60, **options)
    assert plain[1].stopped
    for batch_size in (2, 8):
        assert engine.generate(PROMPTS, max_new_tokens=60, batch_size=batch_size, draft_tokens=3, **options) == plain
    for n in (1, 2):  # less than is guessed at a time
        short = engine.generate(PROMPTS, max_new_tokens=n, draft_tokens=3, **options)
        assert [a.ids for a in short] == [a.ids[:n] for a in plain]
    streamed = list(engine.stream(PROMPTS[0], max_new_tokens=60, draft_tokens=3, **options))
    assert streamed == plain[0].ids


def test_up_to_the_models_last_position_and_across_longropes_trained_length():
    long = Rope(kind="longrope", factor=2.0, original_max_positions=32, short_factor=(1.0,) * 4, long_factor=(2.0, 4.0, 6.0, 8.0))
    for c in (tiny.config(max_positions=64), tiny.config(max_positions=64, rope=long)):
        engine = Engine(Decoder(c), tiny.params(c))
        plain = engine.generate(PROMPTS, max_new_tokens=1000)
        assert engine.generate(PROMPTS, max_new_tokens=1000, draft_tokens=5) == plain


def test_text_that_repeats_itself_takes_fewer_passes():
    engine = Engine(Decoder(CONFIG), PARAMS)
    flight = engine._flight(1, 100, 0, 3, {})
    flight.join([0], PROMPTS[:1])
    (first,) = flight.next(0).values()
    passes = []
    while not flight.free:
        passes += flight.next(1).values()
    assert max(map(len, passes)) == 4 and len(passes) < 60
    assert [*first, *itertools.chain(*passes)] == engine.generate(PROMPTS[:1], max_new_tokens=100)[0].ids


def test_what_followed_is_guessed_and_only_what_is_known_is_learned():
    rows = jnp.asarray([[5, 6, 7, 8, 0], [9, 6, 1, 2, 3]])
    table = draft.learn(draft.empty(16), rows, jnp.asarray([4, 0]))
    guess = jax.jit(draft.guess, static_argnums=3)
    np.testing.assert_array_equal(
        guess(table, jnp.asarray([5, 9, 3]), jnp.asarray([6, 6, 4]), 3), [[6, 7, 8, 8], [6, 7, 8, 8], [4, 4, 4, 4]]
    )
    table = draft.learn(table, rows[1:], jnp.asarray([5]))
    np.testing.assert_array_equal(guess(table, jnp.asarray([5, 9]), jnp.asarray([6, 6]), 2), [[6, 7, 8], [6, 1, 2]])


def test_a_guess_is_right_as_far_as_it_is_what_is_chosen():
    tokens = jnp.asarray([[1, 2, 3, 4], [1, 2, 9, 4], [1, 9, 3, 4]])
    chosen = jnp.asarray([[2, 3, 4, 5]] * 3)
    np.testing.assert_array_equal(draft.agreed(tokens, chosen).sum(1), [4, 2, 1])
