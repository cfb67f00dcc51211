"""Guesses save forward passes and change no token, chosen greedily or drawn, whoever goes on beside a row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import assert_greedy

from sftjax.config import UserError
from sftjax.generate import draft
from sftjax.generate.engine import Engine
from sftjax.generate.sampling import choose
from sftjax.models.config import Experts, Rope
from sftjax.models.decoder import Decoder

CONFIG = tiny.config(max_positions=128)
PARAMS = tiny.params(CONFIG)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CONFIG.vocab, n).tolist() for n in (3, 41, 1, 17, 8)]


def by_passes(engine, prompts, n, draft_tokens=3, **options):
    """The answers of `prompts`, a pass at a time, and the most tokens that a row took in one. Beside them go rows whose prompts
    say what those answers will be: so there is much to guess right.
    """
    plain = [a.ids for a in engine.generate(prompts, max_new_tokens=n, **options)]
    told = [[*p, *a][: engine.limit - 1] for p, a in zip(prompts, plain)]
    seed = options.pop("seed", 0)
    flight = engine.flight(2 * len(prompts), choose(**options), draft_tokens)
    slots = flight.join([engine.row(ids, n, i, seed) for i, ids in enumerate([*prompts, *told])])
    answers, most, new = [[] for _ in prompts], 0, flight.next(0)  # prefill makes the first
    while new:
        for slot in set(new).intersection(slots[: len(prompts)]):
            answers[slots.index(slot)] += [t for t in new[slot] if t not in engine.stop_ids]
            most = max(most, len(new[slot]))
        new = flight.next(1) if len(flight.free) < len(slots) else {}
    return answers, plain, most


OPTIONS = {
    "greedy": {},
    "drawn": {"temperature": 0.7, "top_p": 0.9, "seed": 5},
    "greedy, penalised": {"repetition_penalty": 1.3},
    "drawn, penalised": {"temperature": 1.0, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_answers(options):
    free = Engine(Decoder(CONFIG), PARAMS).generate(PROMPTS, max_new_tokens=40, **options)
    engine = Engine(Decoder(CONFIG), PARAMS, stop_ids=[free[1].ids[20]])
    plain = engine.generate(PROMPTS, max_new_tokens=40, **options)
    assert plain[1].stopped
    answers, expected, most = by_passes(engine, PROMPTS, 40, **options)
    assert answers == expected == [a.ids for a in plain] and most == 4
    assert engine.generate(PROMPTS, max_new_tokens=40, batch_size=2, draft_tokens=3, **options) == plain
    for n in (1, 2):  # less than is guessed at a time
        short = engine.generate(PROMPTS, max_new_tokens=n, draft_tokens=3, **options)
        assert [a.ids for a in short] == [a.ids[:n] for a in plain]
    assert list(engine.stream(PROMPTS[0], max_new_tokens=40, draft_tokens=3, **options)) == plain[0].ids


ROPES = {
    "none": None,
    "dynamic": Rope(kind="dynamic", factor=2.0),
    "longrope": Rope(
        kind="longrope", factor=2.0, original_max_positions=32, short_factor=(1.0,) * 4, long_factor=(2.0, 4.0, 6.0, 8.0)
    ),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_up_to_the_last_position_and_across_the_trained_length(rope):
    c = tiny.config(max_positions=64) if rope is None else tiny.config(max_positions=64, rope=rope)
    engine = Engine(Decoder(c), tiny.params(c))
    for draft_tokens in (3, 32):  # more than is left
        answers, plain, most = by_passes(engine, PROMPTS, 1000, draft_tokens)
        assert answers == plain and most > 3


def test_experts_and_bfloat16():
    c = tiny.config(max_positions=128, experts=Experts(5, 2, 20, shared=28))
    engine = Engine(Decoder(c), tiny.params(c))
    answers, plain, most = by_passes(engine, PROMPTS, 30)
    assert answers == plain and most == 4
    half = Decoder(CONFIG, dtype=jnp.bfloat16)
    assert_greedy(half, PARAMS, PROMPTS, Engine(half, PARAMS).generate(PROMPTS, max_new_tokens=30, draft_tokens=3), slack=0.2)


def test_text_that_repeats_itself_takes_fewer_passes():
    engine = Engine(Decoder(CONFIG), PARAMS)
    flight = engine.flight(1, choose(), 3)
    flight.join([engine.row(PROMPTS[0], 100, 0, seed=0)])
    (first,) = flight.next(0).values()
    passes = []
    while not flight.free:
        passes += flight.next(1).values()
    assert len(passes) < 60
    assert [*first, *itertools.chain(*passes)] == engine.generate(PROMPTS[:1], max_new_tokens=100)[0].ids


def test_how_many():
    engine = Engine(Decoder(CONFIG), PARAMS)
    for n in (-1, 33):
        with pytest.raises(UserError, match=f"draft_tokens={n}: needs a whole number from 0"):
            engine.generate(PROMPTS, max_new_tokens=4, draft_tokens=n)


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
