"""PPO's numbers are those of its definition, written out an action at a time; and its first step is REINFORCE's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sftjax.losses import ppo
from sftjax.losses.policy import action_logps, action_logps_and_entropy
from sftjax.losses.ppo import Experience, Played
from sftjax.models.decoder import Output

RNG = np.random.default_rng(0)
B, T = 4, 12
ESTIMATORS = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) - 1 + d}


def policy(params, batch, key=None):
    return Output(jnp.tanh(params["policy"]["embedding"][batch.tokens]), params["policy"]["head"])


def value(params, batch, key=None):
    return Output(jnp.tanh(params["value"]["embedding"][batch.tokens]), params["value"]["score"])


PARAMS = {
    "policy": {"embedding": RNG.standard_normal((64, 6)), "head": RNG.standard_normal((6, 64))},
    "value": {"embedding": RNG.standard_normal((64, 6)), "score": RNG.standard_normal((6, 1))},
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
logps_and_entropy = jax.jit(partial(action_logps_and_entropy, policy))
logps_of, values_of = jax.jit(partial(action_logps, policy)), jax.jit(partial(ppo.state_values, value))


@jax.jit
def slope_of(params, learnt, vf_coef=0.1):
    """((loss, metrics), its gradient)"""

    def loss(params):
        total, _, told = ppo.ppo(policy, value, vf_coef=vf_coef)(params, learnt)
        return total, told

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def played():
    lengths = [12, 9, 7, 10]
    batch = tiny.batch([[n] for n in lengths], T)
    mask = np.zeros((B, T), np.float32)
    for row, (start, end) in enumerate(zip([3, 5, 1, 9], lengths)):
        mask[row, start:end] = 1
    logps, entropy, reference, values = RNG.standard_normal((4, B, T)).astype(np.float32)
    scores = ppo.at_the_end(RNG.standard_normal(B).astype(np.float32), jnp.asarray(mask))
    batch = batch._replace(weights=mask)
    return Played(*map(jnp.asarray, (*batch, logps, entropy, logps + 0.3 * reference, values, scores)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("whitened", [False, True])
def test_an_action_is_worth_what_the_definition_says(estimator, whitened, played):
    how = {"kl_estimator": estimator, "gamma": 0.9, "lam": 0.8, "whiten_rewards": whitened, "whiten_advantages": whitened}
    found, told = jax.jit(partial(ppo.experience, **how))(played, 0.3)
    logps, entropy, reference, values, scores = map(np.asarray, played[4:])
    answers = [np.flatnonzero(row) for row in np.asarray(played.weights)]
    rewards = []
    for b, actions in enumerate(answers):
        rewards.append([-0.3 * ESTIMATORS[estimator](logps[b, t] - reference[b, t]) for t in actions])
        rewards[b][-1] += scores[b].sum()
    assert told["return"] == pytest.approx(np.mean([sum(r) for r in rewards]), abs=1e-5)
    every = np.concatenate(rewards)
    if whitened:
        rewards = [(np.array(r) - every.mean()) / every.std() + every.mean() for r in rewards]
    advantages = []
    for b, actions in enumerate(answers):
        v = [*values[b, actions], 0]
        surprises = [r + 0.9 * v[i + 1] - v[i] for i, r in enumerate(rewards[b])]
        advantages.append([sum(0.72**k * d for k, d in enumerate(surprises[i:])) for i in range(len(surprises))])
    returns = [np.array(a) + values[b, answers[b]] for b, a in enumerate(advantages)]
    flat, aims = np.concatenate(advantages), np.concatenate(returns)
    for b, actions in enumerate(answers):
        expected = (np.array(advantages[b]) - flat.mean()) / flat.std() if whitened else advantages[b]
        np.testing.assert_allclose(found.advantages[b, actions], expected, atol=1e-4)
        np.testing.assert_allclose(found.returns[b, actions], returns[b], atol=1e-4)
    at = np.asarray(played.weights) > 0
    assert not np.asarray(found.advantages)[~at].any() and not np.asarray(found.returns)[~at].any()
    kl = np.mean([sum(logps[b, t] - reference[b, t] for t in actions) for b, actions in enumerate(answers)])
    known = 1 - np.var(aims - values[at]) / np.var(aims)
    np.testing.assert_allclose(
        [told["kl"], told["entropy"], told["explained_variance"]], [kl, entropy[at].mean(), known], atol=1e-4
    )


def test_an_answer_earns_its_score_within_bounds_and_pays_for_being_cut_off():
    scores, stopped = jnp.asarray([-9.0, 0.5, 9.0]), jnp.asarray([True, False, False])
    np.testing.assert_allclose(ppo.earned(scores, stopped), scores)
    np.testing.assert_allclose(ppo.earned(scores, stopped, clip=2.0, missing_eos_penalty=1.0), [-2.0, -0.5, 1.0])


def test_log_probs_entropy_and_values_stand_with_the_action_they_are_of(played):
    tokens, (b, t) = np.asarray(played.tokens), np.nonzero(played.weights)
    before = tokens[b, t - 1]  # the state ends there
    hidden, head = np.tanh(PARAMS["policy"]["embedding"])[before], np.asarray(PARAMS["policy"]["head"])
    probs = np.exp(hidden @ head)
    probs /= probs.sum(-1, keepdims=True)
    logps, entropy = logps_and_entropy(PARAMS, played)
    expected = np.log(probs[np.arange(len(t)), tokens[b, t]])
    np.testing.assert_allclose(logps[b, t], expected, rtol=1e-4)
    np.testing.assert_allclose(logps_of(PARAMS, played)[b, t], expected, rtol=1e-4)
    np.testing.assert_allclose(entropy[b, t], -(probs * np.log(probs)).sum(-1), rtol=1e-4)
    scores = np.tanh(PARAMS["value"]["embedding"])[before] @ np.asarray(PARAMS["value"]["score"])
    np.testing.assert_allclose(values_of(PARAMS, played)[b, t], scores[:, 0], rtol=1e-4)


def test_the_first_step_is_reinforce_with_a_baseline(played):
    """lam = gamma = 1 and nothing to pay: sum over actions of (G - V(s)) grad log pi(a | s), whatever the clip."""
    played = played._replace(logps=logps_of(PARAMS, played), values=values_of(PARAMS, played))
    learnt, _ = ppo.experience(played, 0.0, lam=1.0, whiten_advantages=False)
    b, t = np.nonzero(played.weights)

    def reinforce(params):
        return -((played.scores.sum(1)[b] - played.values[b, t]) * action_logps(policy, params, played)[b, t]).sum()

    tiny.assert_trees_close(slope_of(PARAMS, learnt, 0.0)[1], jax.grad(reinforce)(PARAMS), rtol=1e-4)


def test_the_value_learns_the_returns_and_the_policy_none_of_it(played):
    learnt, _ = ppo.experience(played._replace(values=values_of(PARAMS, played)), 0.1)
    still = learnt._replace(advantages=jnp.zeros_like(learnt.advantages))

    def squares(params):
        return 0.25 * (learnt.weights * (ppo.state_values(value, params, played) - learnt.returns) ** 2).sum()

    slope = slope_of(PARAMS, still, 0.5)[1]
    tiny.assert_trees_close(slope, jax.grad(squares)(PARAMS), rtol=1e-4)
    assert not any(x.any() for x in jax.tree.leaves(slope["policy"])) and slope["value"]["score"].any()


def test_what_is_no_action_changes_nothing(played):
    @jax.jit
    def run(fill):
        strange = Played(*played[:4], *(jnp.where(played.weights > 0, x, fill) for x in played[4:8]), played.scores)
        learnt, told = ppo.experience(strange, 0.1, kl_estimator="k3", whiten_rewards=True)
        return told, slope_of(PARAMS, learnt)

    plain, strange = run(0.0), run(-jnp.inf)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(plain))
    tiny.assert_trees_close(strange, plain)


def test_an_action_that_went_too_far_is_counted_and_teaches_nothing(played):
    logps, values, n = logps_of(PARAMS, played), values_of(PARAMS, played), float(played.weights.sum())
    learnt = Experience(*played[:4], logps - 1, values - 5, played.weights, values - 5)  # both are beyond what they gain by
    (_, told), slope = slope_of(PARAMS, learnt)
    assert (float(told["clip_fraction"]), float(told["approx_kl"])) == (n, pytest.approx(n / 2, rel=1e-3))
    assert not any(x.any() for x in jax.tree.leaves(slope["policy"]))
    assert told["value_clip_fraction"] == 0 and slope["value"]["score"].any()  # it is the farther one from its aim
    (_, told), slope = slope_of(PARAMS, learnt._replace(advantages=0 * values, returns=values))
    assert told["value_clip_fraction"] == n and not any(x.any() for x in jax.tree.leaves(slope))
