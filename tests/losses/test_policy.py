"""Advantages and clipped losses say what their papers' sums say, written out one action at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import sharding
from sftjax.losses import policy, tokens
from sftjax.models.decoder import Output
from sftjax.weights import kinds

RNG = np.random.default_rng(0)


def answers(B=5, T=9):
    """A mask of actions that stand side by side, and random numbers for each."""
    mask = np.zeros((B, T), np.float32)
    for row in mask:
        start = RNG.integers(1, T - 2)
        row[start : RNG.integers(start + 1, T + 1)] = 1
    return mask, *RNG.standard_normal((3, B, T)).astype(np.float32)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_advantages_are_the_discounted_sum_of_surprises(gamma, lam):
    mask, rewards, values, _ = answers()
    advantages, returns = policy.gae(*map(jnp.asarray, (rewards, values, mask)), gamma=gamma, lam=lam)
    for b in range(len(mask)):
        actions = np.flatnonzero(mask[b])
        r, v = rewards[b, actions], np.append(values[b, actions], 0)
        surprises = r + gamma * v[1:] - v[:-1]
        for i, t in enumerate(actions):
            expected = sum((gamma * lam) ** k * d for k, d in enumerate(surprises[i:]))
            np.testing.assert_allclose(advantages[b, t], expected, atol=1e-5)
            np.testing.assert_allclose(returns[b, t], expected + v[i], atol=1e-5)
            if lam == 1:  # the plain return, whatever the values
                np.testing.assert_allclose(returns[b, t], sum(gamma**k * x for k, x in enumerate(r[i:])), atol=1e-5)
    assert not np.asarray(advantages)[mask == 0].any() and not np.asarray(returns)[mask == 0].any()


def test_whitened_is_centred_and_of_one_spread():
    mask, x, *_ = answers()
    y = np.asarray(policy.whiten(jnp.asarray(x), jnp.asarray(mask)))
    inside = y[mask == 1]
    np.testing.assert_allclose([inside.mean(), inside.std()], [0, 1], atol=1e-5)
    assert not y[mask == 0].any()


def test_an_answer_is_held_against_the_others_of_its_prompt():
    rewards = RNG.standard_normal((3, 4)).astype(np.float32)
    ours = np.asarray(policy.leave_one_out(jnp.asarray(rewards)))
    for p in range(3):
        for g in range(4):
            np.testing.assert_allclose(ours[p, g], rewards[p, g] - np.delete(rewards[p], g).mean(), rtol=1e-5)
    for scale, spread in (("group", rewards.std(1, ddof=1, keepdims=True)), ("batch", rewards.std(ddof=1))):
        expected = (rewards - rewards.mean(1, keepdims=True)) / (spread + policy.EPS)
        np.testing.assert_allclose(policy.group_advantages(jnp.asarray(rewards), scale=scale), expected, rtol=1e-4)
    same = policy.group_advantages(jnp.ones((2, 4)))
    assert np.isfinite(same).all() and not np.asarray(same).any()  # none is better than the others


@pytest.mark.parametrize("by", ["grpo", "dapo", "dr_grpo"])
def test_a_normalisation_is_the_mean_that_its_paper_takes(by):
    mask, losses, *_ = answers()
    lengths = mask.sum(1)
    expected = {
        "grpo": ((mask * losses).sum(1) / lengths).mean(),
        "dapo": (mask * losses).sum() / mask.sum(),
        "dr_grpo": (mask * losses).sum() / (len(mask) * 50),
    }
    weights, counts = policy.normalised(jnp.asarray(mask), by, longest=50)
    np.testing.assert_allclose((weights * losses).sum() / counts.sum(), expected[by], rtol=1e-5)


def test_estimates_of_a_divergence_have_its_mean():
    p, q = (jax.nn.log_softmax(jnp.asarray(RNG.standard_normal(6))) for _ in range(2))
    exact = float((jnp.exp(p) * (p - q)).sum())
    for kind in ("k1", "k3"):
        np.testing.assert_allclose((jnp.exp(p) * policy.divergence(p, q, kind)).sum(), exact, rtol=1e-4)
    assert (policy.divergence(p, q, "k3") >= 0).all() and not policy.divergence(p, p, "k3").any()

    def sampled(logits):  # E over p, whose samples stand still
        p = jax.nn.log_softmax(logits)
        return (jax.lax.stop_gradient(jnp.exp(p)) * policy.divergence(p, q, "k2")).sum()

    def whole(logits):
        p = jax.nn.log_softmax(logits)
        return (jnp.exp(p) * (p - q)).sum()

    np.testing.assert_allclose(jax.grad(sampled)(p), jax.grad(whole)(p), atol=1e-5)


def test_an_action_gains_nothing_beyond_the_clip():
    old = jnp.zeros(4)
    logps, advantages = jnp.log(jnp.asarray([1.5, 0.5, 1.5, 0.5])), jnp.asarray([1.0, -1.0, -1.0, 1.0])
    loss, clipped = policy.clipped_policy(logps, old, advantages, low=0.2, high=0.3)
    np.testing.assert_allclose(loss, [-1.3, 0.8, 1.5, -0.5], rtol=1e-6)  # pessimistic: it never hides a loss
    assert clipped.tolist() == [True, True, False, False]
    slopes = jax.grad(lambda x: policy.clipped_policy(x, old, advantages, low=0.2, high=0.3)[0].sum())(logps)
    assert (slopes[:2] == 0).all() and (slopes[2:] != 0).all()


def test_a_value_gains_nothing_beyond_its_clip():
    values, old, returns = jnp.asarray([1.0, 0.1]), jnp.zeros(2), jnp.asarray([2.0, 2.0])
    np.testing.assert_allclose(policy.clipped_value(values, old, returns, clip=0.2), [0.5 * 1.8**2, 0.5 * 1.9**2], rtol=1e-6)


def test_the_penalty_grows_where_the_policy_strays():
    options = {"target": 6.0, "horizon": 100.0, "n": 10}
    assert policy.adapt(0.2, 6.0, **options) == 0.2
    np.testing.assert_allclose([policy.adapt(0.2, kl, **options) for kl in (60.0, 0.0)], [0.2 * 1.02, 0.2 * 0.98])


def test_rows_split_over_devices_have_their_tokens_in_order(monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 8)  # several blocks of each part of a row
    hidden, head = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((2, 24, 6), (6, 16)))
    targets = jnp.asarray(RNG.integers(0, 16, (2, 24)))
    whole = jax.jit(policy.logps_and_entropy)(hidden, head, targets)
    with jax.set_mesh(sharding.make_mesh(data=2, sequence=4)):
        parts = jax.jit(lambda *x: policy.logps_and_entropy(*x))(hidden, head, targets)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_policy_at_a_temperature_has_the_logits_that_are_sampled_from(cap):
    hidden, kernel = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((2, 5, 6), (6, 16)))
    head = kernel if cap is None else kinds.Capped(kernel, cap)
    output = policy.tempered(lambda *_: Output(hidden, head), 0.7)(None, None)
    np.testing.assert_allclose(kinds.matmul(output.hidden, output.head), kinds.matmul(hidden, head) / 0.7, rtol=1e-4, atol=1e-5)


def test_what_is_no_action_changes_nothing():
    from tiny import batch

    b = batch([[9]], 9, vocab=16)
    mask = (np.arange(9) > 4).astype(np.float32)[None]
    head = jnp.asarray(RNG.standard_normal((6, 16)), jnp.float32)
    hidden = jnp.asarray(RNG.standard_normal((1, 9, 6)), jnp.float32).at[:, :4].multiply(200.0)  # of prompts it says impossible
    old, advantages, reference = RNG.standard_normal((3, 1, 9)).astype(np.float32)

    def value(fill):
        def put(x):
            return jnp.asarray(np.where(mask == 1, x, fill), jnp.float32)

        fields = {"counts": put(1.0), "logps": put(old), "advantages": put(advantages), "reference": put(reference)}
        rollouts = policy.Rollouts(b.tokens, jnp.asarray(mask), b.segments, b.positions, **fields)
        loss = policy.grpo(lambda h, *_: Output(h, head), beta=0.1)
        return jax.value_and_grad(lambda h: loss(h, rollouts)[0])(hidden)

    (plain, slope), (strange, slope_too) = value(0.0), value(-500.0)
    assert np.isfinite(plain) and np.isfinite(slope).all()
    np.testing.assert_allclose(strange, plain, rtol=1e-6)
    np.testing.assert_allclose(slope_too, slope, rtol=1e-6)
