"""Every loss over pairs and answers gives TRL's numbers, and does what its paper says it does."""

import json
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, config, params

from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.losses import Referred, dpo, kto, preference, token_logps
from sftjax.losses.preference import DIVERGENCES, LOSSES, WITHOUT_REFERENCE, Answers, Pairs
from sftjax.models.decoder import Decoder, Output, forward
from sftjax.train.step import init_state, make_step

T = 128

# TRL's cases by the line: what they are called here
CASES = [
    ("dpo", {"beta": 0.1, "loss_type": ["sigmoid"]}, {"loss": "sigmoid", "beta": 0.1}),
    ("dpo", {"beta": 0.5, "loss_type": ["sigmoid"]}, {"loss": "sigmoid", "beta": 0.5}),
    *[
        ("dpo", {"beta": 0.1, "loss_type": [name]}, {"loss": name, "beta": 0.1})
        for name in (
            *("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
            *("aot", "aot_unpaired", "discopop", "sigmoid_norm"),
        )
    ],
    ("dpo", {"beta": 0.1, "loss_type": ["sft"]}, {"loss": "sft", "nll_by": "token"}),
    *[
        ("dpo", {"beta": 0.1, "loss_type": [name], "label_smoothing": 0.1}, {"loss": name, "beta": 0.1, "label_smoothing": 0.1})
        for name in ("robust", "exo_pair")
    ],
    *[
        ("dpo", {"beta": 0.1, "loss_type": ["sigmoid"], "f_divergence_type": theirs}, {"beta": 0.1, "divergence": ours})
        for theirs, ours in (("forward_kl", "forward_kl"), ("js_divergence", "js"), ("alpha_divergence", "alpha"))
    ],
    ("dpo", {"beta": 0.1, "loss_type": ["sigmoid"], "ld_alpha": 0.5}, {"beta": 0.1, "ld_alpha": 0.5}),
    (
        "dpo",
        {"beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"loss": {"sigmoid": 1.0, "sft": 0.2}, "beta": 0.1, "nll_by": "token"},
    ),
    ("orpo", {"beta": 0.1}, {"loss": "orpo", "beta": 0.1, "prompt_nll": True, "nll_by": "token"}),
    (
        "cpo",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 2.0},
        {"loss": "simpo", "gamma": 0.5, "beta": 2.0},
    ),
    ("cpo", {"loss_type": "sigmoid", "beta": 0.1}, {"loss": "cpo", "beta": 0.1, "nll_by": "token"}),
    *[
        (
            "cpo",
            {"loss_type": name, "beta": 0.1},
            {"loss": {name: 1.0, "sft": 1.0}, "beta": 0.1, "nll_by": "token", "reference": "none"},
        )
        for name in ("hinge", "ipo")
    ],
    ("kto", {"loss_type": "kto", "beta": 0.1}, {"loss": "kto", "beta": 0.1}),
    ("kto", {"loss_type": "apo_zero_unpaired", "beta": 0.1}, {"loss": "apo_zero_unpaired", "beta": 0.1}),
]


def pack(rows):
    """Rows of (tokens, answer starts at, segment) as a Batch [len(rows), T]."""
    rows = list(rows)
    tokens, segments, positions = (np.zeros((len(rows), T), np.int32) for _ in range(3))
    weights = np.zeros((len(rows), T), np.float32)
    for b, row in enumerate(rows):
        at = 0
        for ids, start, segment in row:
            where = slice(at, at + len(ids))
            tokens[b, where], segments[b, where], positions[b, where] = ids, segment, np.arange(len(ids))
            weights[b, at + start : at + len(ids)] = 1
            at += len(ids)
    return Batch(tokens, weights, segments, positions)


def fed(case, pairs):
    """What a case was given: the pairs' ids, or the ids and masks that a trainer made itself."""
    if case["trainer"] == "dpo":
        return pack(
            [
                [(p["prompt_ids"] + p[f"{side}_ids"], len(p["prompt_ids"]), i) for i, side in ((1, "chosen"), (2, "rejected"))]
                for p in pairs
            ]
        )

    def rows(prefix, labels, segments):
        out = []
        for ids, seen, label, segment in zip(
            *(case["batch"][prefix + k] for k in ("input_ids", "attention_mask", labels)), segments
        ):
            counts = [x != -100 if labels == "labels" else x == 1 for x in label]
            out.append((ids[: sum(seen)], counts.index(True), segment))
        return out

    if case["trainer"] == "kto":  # chosen and rejected answers in turn
        own = rows("", "completion_mask", (1, 2, 1, 2))
        return pack(
            [[x] for x in own] if "KL_input_ids" not in case["batch"] else zip(own, rows("KL_", "completion_mask", [3] * 4))
        )
    return pack(zip(rows("chosen_", "labels", [1] * 4), rows("rejected_", "labels", [2] * 4)))


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden" / "trl_losses.json").read_text())


@pytest.fixture(scope="module")
def models(shared):
    """`(batch) -> (policy's output, reference's output, pull)`: the decoder's forward and backward pass, compiled once."""
    from sftjax.hf.load import load_config, load_params

    c = load_config(shared / "golden" / "policy")
    run = forward(Decoder(c))
    policy = load_params(shared / "golden" / "policy", c)
    base = load_params(shared / "data" / "hf_models" / "stories260K", c)
    out = jax.jit(lambda p, b: tuple(run(p, b)))

    @jax.jit
    def squared_norm(batch, cotangent):
        grads = jax.vjp(lambda p: tuple(run(p, batch)), policy)[1](cotangent)[0]
        return sum(jnp.square(g).sum() for g in jax.tree.leaves(grads))

    return lambda batch: (out(policy, batch), out(base, batch), lambda d: float(squared_norm(batch, d)) ** 0.5)


def names(case):
    trainer, theirs, _ = case
    return f"{trainer} {' '.join(str(v) for v in theirs.values())}"


@pytest.mark.parametrize("case", CASES, ids=names)
def test_equals_trl(case, golden, models):
    trainer, theirs, ours = case
    [found] = [c for c in golden["cases"] if c["trainer"] == trainer and c["options"] == theirs]
    batch = fed(found, golden["pairs"])
    policy, base, norm = models(batch)
    free = isinstance(ours.get("loss"), str) and ours["loss"] in WITHOUT_REFERENCE
    reference = {} if free or "reference" in ours else {"reference": lambda _: base}
    composed = (kto if trainer == "kto" else dpo)(lambda out, batch, key: Output(*out), **reference, **ours)

    def mean(out):
        total, count, metrics = composed(out, batch, None)
        return total / count, {name: x / count for name, x in metrics.items()}

    (value, metrics), d = jax.value_and_grad(mean, has_aux=True)(policy)
    np.testing.assert_allclose(value, found["loss"], rtol=1e-5)
    np.testing.assert_allclose(norm(d), found["grad_norm"], rtol=1e-4)
    if reference and trainer == "dpo":
        np.testing.assert_allclose(*zip(*[(metrics[k], found["metrics"][k]) for k in metrics]), rtol=1e-4)


def test_no_case_is_left_out(golden):
    named = [(trainer, options) for trainer, options, _ in CASES]
    assert [c for c in golden["cases"] if (c["trainer"], c["options"]) not in named and c["trainer"] != "sft"] == []


# --- laws of the losses -----------------------------------------------------------------------------------------------

P = 6
LENGTHS = np.array([3, 9, 4, 30, 5, 7], np.float32)


def pairs_of(chosen, rejected, real=None):
    """Pairs whose log-ratios these are, with log-probs that lie around -2 a token."""

    def answers(ratio, lengths):
        logp = -2 * lengths + ratio
        return Answers(logp, ratio, lengths, logp, lengths)

    real = jnp.ones(chosen.shape, bool) if real is None else real
    return Pairs(answers(chosen, LENGTHS[: len(chosen)]), answers(rejected, LENGTHS[::-1][: len(chosen)]), real)


def ratios(scale=3.0, seed=0):
    return tuple(jnp.asarray(scale * np.random.default_rng(seed).standard_normal((2, P)), jnp.float32))


PAIRS = pairs_of(*ratios())
EVEN = pairs_of(jnp.zeros(P), jnp.zeros(P))  # the policy is the reference
OF_DIFFERENCE = ("sigmoid", "hinge", "robust", "exo_pair", "discopop")


def swap(pairs):
    return Pairs(pairs.rejected, pairs.chosen, pairs.real)


def slopes(name, pairs, **options):
    """d loss / d log pi of each chosen and each rejected answer."""

    def moved(by):
        def move(answers, x):
            return answers._replace(logp=answers.logp + x, ratio=answers.ratio + x, text=answers.text + x)

        losses = LOSSES[name](Pairs(move(pairs.chosen, by[0]), move(pairs.rejected, by[1]), pairs.real), **options)
        return jnp.where(pairs.real, losses, 0).sum()

    return jax.grad(moved)((jnp.zeros(len(pairs.real)), jnp.zeros(len(pairs.real))))


@pytest.mark.parametrize("name", LOSSES)
def test_which_answers_rise_and_which_fall(name):
    """Just above the reference the chosen answer rises and the rejected one falls, but for three losses."""
    near = pairs_of(1e-2 + jnp.arange(P) * 1e-3, -2e-2 - jnp.arange(P) * 1e-3)
    chosen, rejected = (-np.sign(x) for x in slopes(name, near))
    ways = {"apo_down": (-1, -1), "discopop": (-1, 1), "sft": (1, 0)}  # the searched link has a hill at h = 0
    np.testing.assert_array_equal(chosen, ways.get(name, (1, -1))[0])
    np.testing.assert_array_equal(rejected, ways.get(name, (1, -1))[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_at_the_reference_the_loss_is_a_coin_toss(divergence):
    f = DIVERGENCES[divergence]
    np.testing.assert_allclose(preference.sigmoid(EVEN, divergence=f), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(preference.hinge(EVEN, divergence=f), 1, rtol=1e-6)
    assert float(f(jnp.zeros(()))) == pytest.approx(0, abs=1e-7)
    slope = jax.vmap(jax.grad(f))(jnp.linspace(-5, 5, 11))
    assert (slope > 0).all() and (slope[1:] < slope[:-1] + 1e-6).all()  # more is better, and ever less so


def test_divergences_meet():
    x = jnp.linspace(-3, 3, 7)
    np.testing.assert_allclose(preference.alpha_divergence(x, alpha=1.0), preference.forward_kl(x), rtol=1e-6)
    np.testing.assert_allclose(preference.alpha_divergence(x, alpha=1e-3), preference.reverse_kl(x), rtol=1e-2, atol=1e-6)


def test_swapping_the_answers_flips_the_slope():
    chosen, rejected = slopes("sigmoid", EVEN)
    now_rejected, now_chosen = slopes("sigmoid", swap(EVEN))[::-1]
    np.testing.assert_allclose([now_rejected, now_chosen], [-chosen, -rejected])
    np.testing.assert_allclose(chosen, -0.1 / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "cpo", "simpo"])
def test_a_wrong_label_is_the_right_one_swapped(name):
    options = {"gamma": 0.0} if name == "simpo" else {"nll": 0.0} if name == "cpo" else {}
    loss = LOSSES[name]
    np.testing.assert_allclose(
        loss(PAIRS, label_smoothing=0.2, **options), loss(swap(PAIRS), label_smoothing=0.8, **options), rtol=1e-5
    )
    chosen, rejected = slopes(name, EVEN, label_smoothing=0.5, **options)
    if name == "sigmoid":  # a label that is a coin toss teaches nothing
        np.testing.assert_allclose([chosen, rejected], 0, atol=1e-7)


def test_robust_is_dpo_in_expectation_over_flipped_labels():
    e = 0.2
    expected = (1 - e) * preference.robust(PAIRS, label_smoothing=e) + e * preference.robust(swap(PAIRS), label_smoothing=e)
    np.testing.assert_allclose(expected, preference.sigmoid(PAIRS), rtol=1e-5)


def test_exo_and_conservative_dpo_rest_where_the_preference_is_as_sure_as_the_labels():
    e = 0.1
    pairs = pairs_of(jnp.full(P, np.log((1 - e) / e) / 2), jnp.full(P, -np.log((1 - e) / e) / 2))
    for name in ("exo_pair", "sigmoid"):
        np.testing.assert_allclose(slopes(name, pairs, beta=1.0, label_smoothing=e), 0, atol=1e-6)
    np.testing.assert_allclose(preference.exo_pair(pairs, beta=1.0, label_smoothing=e), 0, atol=1e-6)


def test_squares_rest_at_their_targets():
    beta = 0.1
    np.testing.assert_allclose(preference.sppo_hard(pairs_of(jnp.full(P, 5.0), jnp.full(P, -5.0)), beta=beta), 0, atol=1e-9)
    np.testing.assert_allclose(
        preference.ipo(pairs_of(jnp.full(P, 3.0), jnp.full(P, -2.0)), beta=beta, per_token=False), 0, atol=1e-9
    )
    a_token = pairs_of(3.0 * LENGTHS, -2.0 * LENGTHS[::-1])
    np.testing.assert_allclose(preference.ipo(a_token, beta=beta), 0, atol=1e-9)


@pytest.mark.parametrize(
    "name", (*OF_DIFFERENCE, "nca_pair", "bco_pair", "apo_zero", "apo_down", "aot", "aot_unpaired", "sigmoid_norm")
)
def test_only_beta_times_the_ratio_counts(name):
    chosen, rejected = ratios()
    np.testing.assert_allclose(
        LOSSES[name](pairs_of(chosen, rejected), beta=0.4), LOSSES[name](pairs_of(2 * chosen, 2 * rejected), beta=0.2), rtol=2e-5
    )


@pytest.mark.parametrize("name", OF_DIFFERENCE)
def test_what_both_ratios_share_is_nothing(name):
    chosen, rejected = ratios()
    np.testing.assert_allclose(LOSSES[name](pairs_of(chosen + 4, rejected + 4)), LOSSES[name](PAIRS), rtol=1e-5)


def test_a_shift_of_all_rewards_is_what_bco_takes_off():
    chosen, rejected = ratios()
    np.testing.assert_allclose(
        preference.bco_pair(pairs_of(chosen + 4, rejected + 4), shift=True), preference.bco_pair(PAIRS, shift=True), rtol=1e-5
    )
    assert not np.allclose(preference.bco_pair(pairs_of(chosen + 4, rejected + 4)), preference.bco_pair(PAIRS))
    d = (chosen + rejected).mean() / 2  # a constant to the gradient
    centred = pairs_of(chosen - d, rejected - d)
    np.testing.assert_allclose(slopes("bco_pair", PAIRS, shift=True), slopes("bco_pair", centred), rtol=1e-5)


def test_apo_is_in_step_with_its_equations():
    chosen, rejected = ratios()
    s = lambda x: 1 / (1 + np.exp(-0.1 * np.asarray(x)))  # noqa: E731
    np.testing.assert_allclose(preference.apo_zero(PAIRS), 1 - s(chosen) + s(rejected), rtol=1e-5)
    np.testing.assert_allclose(preference.apo_down(PAIRS), s(chosen) + 1 - s(chosen - rejected), rtol=1e-5)


def test_aot_compares_sorted_answers():
    chosen, rejected = ratios(seed=3)
    want = np.logaddexp(0, -0.1 * (np.sort(chosen) - np.sort(rejected)))
    np.testing.assert_allclose(np.sort(preference.aot_unpaired(pairs_of(chosen, rejected))), np.sort(want), rtol=1e-5)
    mixed = pairs_of(chosen, rejected[np.array([3, 1, 0, 5, 4, 2])])
    total = preference.aot_unpaired(mixed).sum()
    np.testing.assert_allclose(total, want.sum(), rtol=1e-5)  # whose rejected answer it is does not matter
    one = jax.tree.map(lambda x: x[:1], PAIRS)
    np.testing.assert_allclose(preference.aot(one), preference.sigmoid(one), rtol=1e-5)
    np.testing.assert_allclose(preference.aot_unpaired(one), preference.sigmoid(one), rtol=1e-5)
    policy = np.asarray(PAIRS.chosen.logp - PAIRS.rejected.logp)
    reference = policy - np.asarray(PAIRS.chosen.ratio - PAIRS.rejected.ratio)
    want = np.logaddexp(0, -0.1 * (np.sort(policy) - np.sort(reference)))
    np.testing.assert_allclose(preference.aot(PAIRS).sum(), want.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_no_pair_changes_nothing(name):
    options = {"bco_pair": {"shift": True}, "sft": {"nll_by": "token"}}.get(name, {})
    chosen, rejected = ratios()
    real = np.array([True, True, False, True, True, False])
    with_holes = pairs_of(chosen, rejected, jnp.asarray(real))
    without_them = jax.tree.map(lambda x: x[real], with_holes)
    np.testing.assert_allclose(LOSSES[name](with_holes, **options)[real], LOSSES[name](without_them, **options), rtol=1e-5)
    for a, b in zip(slopes(name, with_holes, **options), slopes(name, without_them, **options)):
        np.testing.assert_allclose(a[real], b, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(a[~real], 0, atol=1e-7)


@pytest.mark.parametrize("name, divergence", [(n, d) for n in LOSSES for d in (DIVERGENCES if n in OF_DIFFERENCE else [None])])
def test_nothing_overflows(name, divergence):
    """A long answer's log-ratio may be in the hundreds."""
    options = {"divergence": DIVERGENCES[divergence]} if divergence else {}
    far = jnp.asarray([-1000.0, -100.0, 0.0, 100.0, 500.0, 1000.0])
    for pairs in (pairs_of(far, jnp.zeros(P)), pairs_of(jnp.zeros(P), far), pairs_of(far, far[::-1])):
        below = jax.tree.map(lambda x: jnp.minimum(x, -1e-4), pairs.chosen)  # log-probs
        sure = pairs._replace(chosen=pairs.chosen._replace(logp=below.logp))
        assert np.isfinite(LOSSES[name](sure, **options)).all()
        assert np.isfinite(np.concatenate(slopes(name, sure, **options))).all()


def test_likelihood_is_divided_as_asked():
    nll = -np.asarray(PAIRS.chosen.text)
    np.testing.assert_allclose(preference.sft(PAIRS), nll / LENGTHS, rtol=1e-6)
    np.testing.assert_allclose(preference.sft(PAIRS, nll_by="token").mean(), nll.sum() / LENGTHS.sum(), rtol=1e-6)
    np.testing.assert_allclose(preference.sft(PAIRS, nll_by="sum"), nll, rtol=1e-6)


def test_simpo_and_orpo_are_their_equations():
    chosen, rejected = (np.asarray(x.logp / x.length) for x in PAIRS[:2])
    np.testing.assert_allclose(preference.simpo(PAIRS), np.logaddexp(0, -(2 * (chosen - rejected) - 0.5)), rtol=1e-5)
    odds = [np.exp(x) / (1 - np.exp(x)) for x in map(np.float64, (np.minimum(chosen, -0.1), np.minimum(rejected, -0.1)))]
    held = PAIRS.each(lambda a: a._replace(logp=jnp.minimum(a.logp / a.length, -0.1) * a.length))
    want = -chosen + 0.1 * np.log1p(odds[1] / odds[0])
    np.testing.assert_allclose(preference.orpo(held), want, rtol=1e-5)


def test_kto_weighs_gains_and_losses_against_the_baseline():
    r = ratios()[0]
    answers = pairs_of(r, r).chosen
    s = lambda x: 1 / (1 + np.exp(-0.1 * np.asarray(x)))  # noqa: E731
    good = preference.kto(answers, jnp.ones(P, bool), 2.0, desirable_weight=1.5)
    bad = preference.kto(answers, jnp.zeros(P, bool), 2.0, undesirable_weight=0.5)
    np.testing.assert_allclose(good, 1.5 * (1 - s(r - 2)), rtol=1e-5)
    np.testing.assert_allclose(bad, 0.5 * (1 - s(2 - r)), rtol=1e-5)
    both = preference.apo_zero(pairs_of(*ratios()))
    halves = [preference.apo_zero_unpaired(pairs_of(x, x).chosen, jnp.full(P, good)) for x, good in zip(ratios(), (True, False))]
    np.testing.assert_allclose(both, halves[0] + halves[1], rtol=1e-5)


# --- laws of the composed loss, on a tiny decoder ---------------------------------------------------------------------

CONFIG = config(layers=1)
PACKED = [[(5, 2), (7, 2), (4, 2), (9, 2)], [(6, 3), (4, 3)]]  # (length, answer starts at) of each segment
RUN = forward(Decoder(CONFIG))
out_of = jax.jit(lambda p, b: tuple(RUN(p, b)))
logps_of = token_logps(lambda out, batch, key: Output(*out))  # of what out_of made


def tiny_pairs(rows, width, seed=0):
    """Random prompts and answers; a pair's tokens depend on its lengths alone, so that it is the same pair in any row."""
    built = []
    for row in rows:
        built.append([])
        for i, (length, start) in enumerate(row, 1):
            ids = np.random.default_rng((seed, length, start)).integers(0, CONFIG.vocab, length).tolist()
            built[-1].append((ids, start, i))
    return jax.tree.map(lambda x: x[:, :width], pack(built))


WHOLE = tiny_pairs(PACKED, 26)
ONE_A_ROW = tiny_pairs([PACKED[0][:2], PACKED[0][2:], PACKED[1]], 26)
POLICY, BASE = params(CONFIG), params(CONFIG, seed=1)


def given(batch, reference=True, composer=dpo, **options):
    """(sum, count, metrics) of a loss whose forward passes have been made before."""
    policy, base = out_of(POLICY, batch), out_of(BASE, batch)
    composed = composer(lambda out, batch, key: Output(*out), **({"reference": lambda _: base} if reference else {}), **options)
    return composed(policy, batch, None)


MIXTURES = [
    {"loss": {"sigmoid": 1.0, "sft": 0.2}},
    {"loss": "ipo"},
    {"loss": "sigmoid", "ld_alpha": 0.3},
    {"loss": "sigmoid", "divergence": "alpha", "alpha": 0.7},
    {"loss": "orpo", "prompt_nll": True, "reference": False},
    {"loss": {"hinge": 1.0, "bco_pair": 2.0}},
]


@pytest.mark.parametrize("options", MIXTURES, ids=str)
def test_the_cut_changes_nothing(options):
    """Two pairs in a row are as one a row, and the sum over micro-batches is the sum over the batch."""
    whole, rows = given(WHOLE, **options), given(ONE_A_ROW, **options)
    assert float(whole[1]) == 3 and {"rewards/chosen", "rewards/accuracies", "logps/rejected"} <= set(whole[2])
    assert_trees_close(whole, rows)
    micro = [given(Batch(*(x[i : i + 1] for x in ONE_A_ROW)), **options) for i in range(3)]
    assert_trees_close(whole, jax.tree.map(lambda *xs: sum(xs), *micro))


@pytest.mark.parametrize("names", [("simpo", "sigmoid"), ("sigmoid", "simpo"), ("sft", "ipo", "simpo")], ids=str)
@pytest.mark.parametrize("beta", [None, 0.3])
def test_a_sum_of_losses_is_their_sum(names, beta):
    """Each with its own beta where none is given, in whatever order they are named."""
    weights = {name: 1.0 + i for i, name in enumerate(names)}
    alone = [
        given(WHOLE, loss=name, reference=name in ("sigmoid", "ipo"), **({"beta": beta} if name != "sft" else {}))
        for name in names
    ]
    total, count, _ = given(WHOLE, loss=weights, beta=beta)
    np.testing.assert_allclose(total, sum(w * each[0] for w, each in zip(weights.values(), alone)), rtol=1e-5)
    assert count == alone[0][1]


def test_sums_equal_the_definition():
    logps, refs = (logps_of(out_of(p, ONE_A_ROW), ONE_A_ROW) for p in (POLICY, BASE))
    hidden, head, _ = out_of(POLICY, ONE_A_ROW)
    whole = np.asarray(jax.nn.log_softmax(hidden @ head))
    want = np.zeros((3, 2))
    for (b, t), s in np.ndenumerate(np.asarray(ONE_A_ROW.segments)):
        if s and ONE_A_ROW.positions[b, t] == 0:
            assert logps[b, t] == 0
        elif s:
            np.testing.assert_allclose(logps[b, t], whole[b, t - 1, ONE_A_ROW.tokens[b, t]], rtol=1e-4, atol=1e-5)
            want[b, s - 1] += ONE_A_ROW.weights[b, t] * logps[b, t]
    _, _, metrics = given(ONE_A_ROW)
    np.testing.assert_allclose([metrics["logps/chosen"], metrics["logps/rejected"]], want.sum(0), rtol=1e-5)
    carried = Referred(*ONE_A_ROW, refs)
    composed = dpo(lambda out, batch, key: Output(*out), reference="batch")
    assert_trees_close(composed((hidden, head), carried, None), given(ONE_A_ROW))
    with pytest.raises(UserError, match="carries no reference"):
        composed((hidden, head), ONE_A_ROW, None)


def test_length_desensitising_counts_the_longer_answers_tail_less():
    logps = np.asarray(logps_of(out_of(POLICY, ONE_A_ROW), ONE_A_ROW))
    want = np.zeros(2)
    for row, (b, segments) in zip([PACKED[0][:2], PACKED[0][2:], PACKED[1]], enumerate(ONE_A_ROW.segments)):
        shared = min(length - start for length, start in row)
        for s, (_, start) in enumerate(row, 1):
            answer = logps[b][segments == s][start:]
            want[s - 1] += answer[:shared].sum() + 0.3 * answer[shared:].sum()
    for batch in (ONE_A_ROW, WHOLE):
        metrics = given(batch, ld_alpha=0.3)[2]
        np.testing.assert_allclose([metrics["logps/chosen"], metrics["logps/rejected"]], want, rtol=1e-5)


def test_an_answer_without_its_partner_is_no_pair():
    b = WHOLE._replace(segments=np.where(WHOLE.segments == 4, 0, WHOLE.segments))
    assert float(given(b)[1]) == 2
    silent = WHOLE._replace(weights=np.where(WHOLE.segments == 4, 0, WHOLE.weights).astype(np.float32))
    assert_trees_close(given(b), given(silent))
    assert_trees_close(given(b), given(tiny_pairs([PACKED[0][:2], PACKED[1]], 26)))


def test_kto_reads_labels_and_the_baseline_from_the_segments():
    def row(kinds):
        return [(np.arange(3 + i, 9 + 2 * i).tolist(), 2 + i, 3 * i + kind) for i, kind in enumerate(kinds)]

    b = jax.tree.map(lambda x: x[:, :26], pack([row([1, 2]), row([3, 1])]))
    total, count, metrics = given(b, composer=kto)
    logps, refs = (np.asarray(logps_of(out_of(p, b), b)) for p in (POLICY, BASE))
    r = [((logps - refs)[i] * (b.weights[i] * (b.segments[i] == s))).sum() for i, s in ((0, 1), (1, 4), (0, 5), (1, 3))]
    z = max(r[3], 0.0)
    s = lambda x: 1 / (1 + np.exp(-0.1 * x))  # noqa: E731
    np.testing.assert_allclose(total, (1 - s(r[0] - z)) + (1 - s(r[1] - z)) + (1 - s(z - r[2])), rtol=1e-5)
    assert float(count) == 3
    np.testing.assert_allclose(metrics["kl"] / 3, z, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"] / 3, 0.1 * (r[0] + r[1]) / 2, rtol=1e-4)
    np.testing.assert_allclose(metrics["rewards/rejected"] / 3, 0.1 * r[2], rtol=1e-4)


def kinds_of_adapter():
    from sftjax.weights.adapter import adapter
    from sftjax.weights.lora import lora
    from sftjax.weights.tokens import tokens

    key = jax.random.key(0)
    return {
        "lora": lambda p: lora(p, key, rank=2),
        "pissa": lambda p: lora(p, key, rank=2, init="pissa", targets="q_proj"),
        "dora": lambda p: lora(p, key, rank=2, dora=True),
        "adapter": lambda p: adapter(p, key, width=4),
        "tokens": lambda p: tokens(lora(p, key, rank=2), [3, 5]),
    }


@pytest.mark.parametrize("kind", ["lora", "pissa", "dora", "adapter", "tokens"])
def test_without_its_adapter_the_model_is_its_base(kind):
    from sftjax import tree
    from sftjax.weights.lora import without

    adapted = kinds_of_adapter()[kind](POLICY)
    found, want = tree.flatten(without(adapted)), tree.flatten(POLICY)
    assert list(found) == list(want) and all(found[path] is want[path] for path in want)  # no copy
    with pytest.raises(UserError, match="no adapter"):
        without(POLICY)


def test_another_tree_may_ride_in_the_params():
    both = POLICY | {"reference": BASE}
    composed = jax.jit(jax.value_and_grad(lambda p: dpo(RUN, reference=itemgetter("reference"))(p, ONE_A_ROW, None)[0]))
    value, grads = composed(both)
    np.testing.assert_allclose(value, given(ONE_A_ROW)[0], rtol=1e-5)
    assert not any(np.any(g) for g in jax.tree.leaves(grads["reference"]))
    assert all(np.any(g) for g in jax.tree.leaves(grads["layers"]))


def test_lora_against_the_model_before_it():
    """It starts at log 2, whatever the cut, and learns; the reference costs a forward pass and no gradient."""
    import optax

    from sftjax import tree
    from sftjax.weights import kinds
    from sftjax.weights.lora import lora, without

    adapted = lora(POLICY, jax.random.key(0), rank=4, alpha=8.0, targets="o_proj")
    loss = dpo(RUN, reference=without)
    mask = tree.map_leaves(lambda _, w: kinds.trained(w), adapted)
    trainable, frozen = tree.split(adapted, mask)
    optimizer = optax.adam(3e-2)
    norms = []
    for micro_batches in (1, 3):
        step = jax.jit(make_step(loss, optimizer, seed=0, micro_batches=micro_batches))
        state, metrics = step(init_state(trainable, optimizer), frozen, ONE_A_ROW)
        np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
        norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(*norms, rtol=1e-5)
    for _ in range(5):
        state, metrics = step(state, frozen, ONE_A_ROW)
    assert metrics["loss"] < 0.5 and metrics["rewards/accuracies"] == 1
    assert metrics["rewards/chosen"] > 0 > metrics["rewards/rejected"]

    def products(run):
        return str(jax.make_jaxpr(run)(trainable)).count("dot_general")

    def of(reference):
        composed = dpo(RUN, reference=reference)
        return lambda t: composed(tree.join(t, frozen), ONE_A_ROW, None)[0]

    forward_only = products(of(without)) - products(of("none"))
    assert products(jax.grad(of(without))) - products(jax.grad(of("none"))) == forward_only > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "sigmod"}, "did you mean sigmoid"),
        ({"loss": "sigmoid", "reference": None}, "needs a reference"),
        ({"loss": "simpo"}, "has none"),
        ({"gamma": 1.0}, "gamma: sigmoid does not use it"),
        ({"loss": "ipo", "divergence": "js"}, "divergence: ipo does not use it"),
        ({"divergence": "js", "alpha": 0.3}, "alpha: js does not use it"),
        ({"alpha": 0.3}, "alpha: sigmoid does not use it"),
        ({"divergence": "kl"}, "divergence kl: not known"),
        ({"prompt_nll": True}, "no term of likelihood"),
        ({"ld_alpha": 2.0}, "from 0 to 1"),
        ({"loss": "sft", "reference": None, "ld_alpha": 0.5}, "compares no lengths"),
        ({"reference": "bach"}, 'use "batch"'),
        ({"loss": "robust", "label_smoothing": 0.5}, "robust needs"),
        ({"loss": "exo_pair", "label_smoothing": 0.0}, "exo_pair divides"),
        ({"loss": "sft", "reference": None, "nll_by": "x"}, "use pair, token or sum"),
        ({"loss": ["sigmoid"]}, "needs a name, or {name: weight}"),
        ({"loss": {"sigmoid": "x"}}, "loss sigmoid: its weight is 'x', must be a number"),
        ({"beta": -1}, "beta=-1: needs a number above 0"),
        ({"label_smoothing": "a"}, "label_smoothing='a': needs the share of labels that are wrong"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        dpo(RUN, **({"reference": "none"} | options))
