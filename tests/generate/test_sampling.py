"""Every filter is transformers' filter, alone and in a row; a draw follows the distribution it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from sftjax.config import UserError
from sftjax.generate import sampling

B, V = 4, 97
LOGITS = np.random.default_rng(0).normal(0, 3, (B, V)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, V, (B, 20))
SEEN = np.zeros((B, V), bool)
SEEN[np.arange(B)[:, None], IDS] = True

CASES = {
    "repetition": (hf.RepetitionPenaltyLogitsProcessor(1.3), lambda x: sampling.apply_repetition_penalty(x, SEEN, 1.3)),
    "temperature": (hf.TemperatureLogitsWarper(0.7), lambda x: sampling.apply_temperature(x, 0.7)),
    "top_k": (hf.TopKLogitsWarper(5), lambda x: sampling.apply_top_k(x, 5)),
    "top_k beyond V": (hf.TopKLogitsWarper(1000), lambda x: sampling.apply_top_k(x, 1000)),
    "top_p": (hf.TopPLogitsWarper(0.8), lambda x: sampling.apply_top_p(x, 0.8)),
    "top_p 0": (hf.TopPLogitsWarper(0.0), lambda x: sampling.apply_top_p(x, 0.0)),
    "min_p": (hf.MinPLogitsWarper(0.05), lambda x: sampling.apply_min_p(x, 0.05)),
}


@pytest.mark.parametrize("name", CASES)
def test_filter_equals_transformers(name):
    theirs, ours = CASES[name]
    expected = theirs(torch.tensor(IDS), torch.tensor(LOGITS)).numpy()
    got = np.asarray(ours(jnp.asarray(LOGITS)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_all_filters_in_transformers_order(monkeypatch):
    chain = [
        hf.RepetitionPenaltyLogitsProcessor(1.4),
        hf.TemperatureLogitsWarper(1.7),
        hf.TopKLogitsWarper(20),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.08),
    ]
    expected = torch.tensor(LOGITS)
    for step in chain:
        expected = step(torch.tensor(IDS), expected)
    given = {}
    monkeypatch.setattr(sampling, "sample", lambda logits, keys: given.setdefault("logits", logits))
    chosen = sampling.choose(temperature=1.7, top_k=20, top_p=0.9, min_p=0.08, repetition_penalty=1.4)
    sampling.next_token(jnp.asarray(LOGITS), chosen, jnp.zeros(B), jnp.asarray(SEEN))
    np.testing.assert_allclose(np.asarray(given["logits"]), expected.numpy(), rtol=1e-6)
    assert np.isfinite(expected.numpy()).sum() < 20 * B


def test_greedy_is_argmax_and_the_first_of_equals():
    ties = LOGITS.copy()
    ties[0, [3, 50]] = 99
    np.testing.assert_array_equal(sampling.greedy(jnp.asarray(ties)), ties.argmax(-1))


def test_sample_follows_the_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2, 0.0]))
    n = 4000
    drawn = sampling.sample(jnp.broadcast_to(logits, (n, 4)), jax.random.split(jax.random.key(0), n))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / n, [0.5, 0.3, 0.2, 0], atol=0.03)


def test_what_changes_nothing_is_left_out():
    assert sampling.choose(temperature=0, top_k=5, top_p=0.5) == sampling.Sampling()
    assert sampling.choose(temperature=1) == sampling.Sampling(temperature=1.0)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 1.5}, {"min_p": -0.1}, {"top_k": -1}, {"repetition_penalty": 0}]
)
def test_numbers_outside_their_range_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        sampling.choose(**wrong)
