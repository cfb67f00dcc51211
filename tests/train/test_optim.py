"""Schedules start, peak and end where they say; every optimiser lowers a loss, whatever the tree; matrices alone decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sftjax import tree
from sftjax.check import CHOICES
from sftjax.config import default
from sftjax.train.optim import decays, optimizer, schedule
from sftjax.weights import kinds, select
from sftjax.weights.adapter import adapter
from sftjax.weights.lora import lora, rates
from sftjax.weights.tokens import tokens

LR = 0.1
KEY = jax.random.key(0)


def settings(**changes):
    c = default().optim
    c.lr = LR
    with c.ignore_type():
        c.update(changes)
    return c


def curve(steps, **changes):
    rate = schedule(settings(**changes), steps)
    return np.array([float(rate(i)) for i in range(steps + 1)])


@pytest.mark.parametrize("name", CHOICES["optim.schedule"])
@pytest.mark.parametrize("warmup, expected", [(0.25, 10), (7, 7), (1, 1), (0.0, 0)])
def test_schedules_warm_up_peak_and_end(name, warmup, expected):
    lr = curve(40, schedule=name, warmup=warmup, final_lr=0.1)
    np.testing.assert_allclose(lr[:expected], LR * np.arange(1, expected + 1) / max(expected, 1), rtol=1e-5)
    assert lr[0] > 0
    np.testing.assert_allclose(lr[expected], LR, rtol=1e-5)
    np.testing.assert_allclose(lr[40], LR if name == "constant" else 0.1 * LR, rtol=1e-5)
    assert (np.diff(lr[expected:]) <= 1e-9).all()


def test_wsd_is_flat_and_then_falls_in_its_share():
    lr = curve(40, schedule="wsd", warmup=4, decay=0.25)
    np.testing.assert_allclose(lr[4:30], LR, rtol=1e-5)
    np.testing.assert_allclose(lr[29:40], LR * np.linspace(1, 0, 11), atol=1e-7)
    for warmup, decay in ((0, 0.1), (0, 1.0), (1, 0.9), (5, 0.9)):  # of one step, and of all that there are
        assert curve(10, schedule="wsd", warmup=warmup, decay=decay)[9] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", CHOICES["optim.schedule"])
@pytest.mark.parametrize("warmup", [0.03, 5])
def test_a_run_of_one_step_moves(name, warmup):
    assert curve(1, schedule=name, warmup=warmup)[0] == pytest.approx(LR)


# -- a toy: two stacked layers of two linear maps, with norms and a bias


def toy(seed=0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    attn = {"q": {"kernel": leaf(2, 6, 5), "bias": leaf(2, 5)}, "o": {"kernel": leaf(2, 5, 6)}}
    return {
        "embed": {"embedding": leaf(7, 6)},
        "layers": {"attn_norm": {"scale": leaf(2, 6)}, "attn": attn},
        "final_norm": {"scale": leaf(6)},
    }


def every_kind(params):
    """Every kind of weight that trains, in one tree."""
    params = lora(params, KEY, rank=2, alpha=2.0, targets="q_proj", dora=True)
    return tokens(adapter(params, KEY, width=2, targets="o_proj"), [1, 4])


METHODS = {
    "full": lambda params: (params, select.everything(params)),
    "lora": lambda params: with_added(lora(params, KEY, rank=2, alpha=2.0)),
    "every kind": lambda params: with_added(every_kind(params)),
}


def with_added(params):
    return params, select.added(params)


def arrays(t):
    """`{"layers/attn/q/kernel/base/a": array}`, inside kinds of weight too."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(t)}


def distance(params, target):
    """Sum of the squared distances of what each leaf makes of some rows to what the target's makes of them."""
    x, total, target = jax.random.normal(KEY, (8, 6)), 0.0, tree.flatten(target)
    for path, w in tree.flatten(params).items():
        there = target[path]
        if path.endswith("kernel"):
            some = x[:, : w.shape[-2]]
            w, there = jax.vmap(lambda w, some=some: kinds.matmul(some, w))(w), some @ there
        elif path == "embed/embedding":
            w = kinds.rows(w, jnp.arange(7))
        total += jnp.square(w - there).sum()
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CHOICES["optim.name"])
def test_every_optimiser_lowers_a_loss(name, method):
    target = toy(1)
    params, mask = METHODS[method](toy())
    trainable, frozen = tree.split(params, mask)
    lr = 0.001 if name == "sgd" else 0.02
    transform = optimizer(settings(name=name), lambda _: lr)

    @jax.jit
    def step(trainable, state):
        value, grads = jax.value_and_grad(lambda t: distance(tree.join(t, frozen), target))(trainable)
        updates, state = transform.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = transform.init(trainable), []
    for _ in range(30):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < losses[1] < losses[0] and losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("name", CHOICES["optim.name"])
def test_weight_decay_is_for_matrices_alone(name):
    """With a gradient of zero, what moves is what decays."""
    params = toy()
    transform = optimizer(settings(name=name, weight_decay=0.5), lambda _: LR)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(transform.update)(zero, transform.init(params), params)
    moved = {path for path, x in tree.flatten(updates).items() if jnp.any(x != 0)}
    assert moved == {"embed/embedding", "layers/attn/q/kernel", "layers/attn/o/kernel"}
    if name in ("adamw", "lion", "adafactor", "muon"):  # decoupled: exactly lr * decay of the weight
        np.testing.assert_allclose(updates["embed"]["embedding"], -LR * 0.5 * params["embed"]["embedding"], rtol=1e-5)
        kernel = params["layers"]["attn"]["q"]["kernel"]
        np.testing.assert_allclose(updates["layers"]["attn"]["q"]["kernel"], -LR * 0.5 * kernel, rtol=1e-5)


MATRICES = {"embed/embedding/rows", "layers/attn/o/kernel/down", "layers/attn/o/kernel/up"}
MATRICES |= {"layers/attn/q/kernel/base/a", "layers/attn/q/kernel/base/b"}
VECTORS = {"layers/attn/q/kernel/magnitude", "layers/attn/o/kernel/down_bias", "layers/attn/o/kernel/up_bias"}


@pytest.mark.parametrize("name", CHOICES["optim.name"])
def test_magnitudes_and_adapters_biases_do_not_decay(name):
    params, mask = METHODS["every kind"](toy())
    trainable = jax.tree.map(lambda x: x + 1, tree.split(params, mask)[0])  # some of it starts at zero, which cannot decay
    assert arrays(trainable).keys() == MATRICES | VECTORS
    transform = optimizer(settings(name=name, weight_decay=0.5), lambda _: LR)
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, trainable), transform.init(trainable), trainable)
    assert {path for path, x in arrays(updates).items() if jnp.any(x != 0)} == MATRICES


@pytest.mark.parametrize("name", CHOICES["optim.name"])
def test_lora_plus_multiplies_the_rate_of_b_alone(name):
    params, mask = METHODS["every kind"](lora(toy(), KEY, rank=2, targets="o_proj"))
    trainable = jax.tree.map(lambda x: x + 1, tree.split(params, mask)[0])
    grads = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), trainable)

    def update(*rates):
        transform = optimizer(settings(name=name, weight_decay=0.1), lambda _: LR, *rates)
        return arrays(jax.jit(transform.update)(grads, transform.init(trainable), trainable)[0])

    alike, plus, plain = update(rates(trainable, 1.0)), update(rates(trainable, 16.0)), update()
    b = {"layers/attn/q/kernel/base/b", "layers/attn/o/kernel/base/b"}  # of an adapter's base too
    assert b <= plain.keys()
    for path, x in alike.items():
        np.testing.assert_array_equal(plus[path], 16 * x if path in b else x, path)
        np.testing.assert_array_equal(plain[path], x, path)


def test_muon_orthogonalises_every_layer_of_a_stack_by_itself():
    params, grads = toy(), toy(1)
    grads["layers"]["attn"]["q"]["kernel"] *= jnp.asarray([1.0, 100.0])[:, None, None]  # one would drown the other
    transform = optimizer(settings(name="muon"), lambda _: LR)
    update = jax.jit(lambda g, p: transform.update(g, transform.init(p), p)[0])
    stacked = update(grads, params)["layers"]["attn"]["q"]["kernel"]
    for i in range(2):
        one = lambda t, i=i: t | {"layers": jax.tree.map(lambda x: x[i : i + 1], t["layers"])}  # noqa: E731
        alone = update(one(grads), one(params))["layers"]["attn"]["q"]["kernel"][0]
        np.testing.assert_allclose(stacked[i], alone, rtol=1e-4, atol=1e-6)
        singular = np.linalg.svd(stacked[i], compute_uv=False) / (LR * 0.2 * 6**0.5)
        assert (singular > 0.5).all() and (singular < 1.5).all()  # five Newton-Schulz steps bring them near 1


@pytest.mark.parametrize("stack", ["layers", "lower"])
def test_muon_is_for_kernels_of_layers_and_adam_for_the_rest(stack):
    params = {(stack if name == "layers" else name): leaf for name, leaf in toy().items()}
    transform = optimizer(settings(name="muon"), lambda _: LR)
    grads = jax.tree.map(lambda x: x * 3, params)
    updates = tree.flatten(transform.update(grads, transform.init(params), params)[0])
    signs = {path for path, x in updates.items() if np.allclose(np.abs(x), LR, rtol=1e-3)}  # Adam's first step
    assert signs == {path for path in updates if not path.endswith("kernel")}


def test_experts_kernels_are_matrices_and_their_vectors_are_not():
    kernels = {name: {"kernel": jnp.zeros((2, 3, 8, 6))} for name in ("gate", "up")}
    params = lora({"layers": {"mlp": {"experts": kernels}}}, KEY, rank=2, dora=True, targets="up_proj")
    decay = tree.flatten(decays(params))
    assert decay["layers/mlp/experts/gate/kernel"] is True
    up = decay["layers/mlp/experts/up/kernel"]
    assert up.base.a is up.base.b is True and up.magnitude is False


def test_muon_is_for_the_matrices_of_a_kind():
    params, mask = METHODS["every kind"](toy())
    trainable = tree.split(params, mask)[0]
    transform = optimizer(settings(name="muon"), lambda _: LR)
    grads = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), trainable)
    updates = arrays(transform.update(grads, transform.init(trainable), trainable)[0])
    signs = {path for path, x in updates.items() if np.allclose(np.abs(x), LR, rtol=1e-3)}
    assert signs == VECTORS | {"embed/embedding/rows"}
