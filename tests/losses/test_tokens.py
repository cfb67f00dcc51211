"""Cross entropy and log-probs in blocks equal those of whole logits, in value and in every gradient."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh
from tiny import assert_trees_close, batch

from sftjax import sharding
from sftjax.data.batch import Batch
from sftjax.losses import logprobs, masked_xent, tokens
from sftjax.models.decoder import Decoder, Output, forward
from sftjax.weights import kinds
from sftjax.weights.kinds import LowRank

D, V = 12, 50
BATCH = batch([[20], [9, 8], [-5, 11], []], 20, vocab=V)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


HIDDEN = random(4, 20, D)
HEADS = {
    "head": random(D, V),
    "tied": random(V, D),  # an embedding, transposed on its way
    "low_rank": LowRank(random(D, V), random(D, 2, seed=1), random(2, V, seed=2), 0.5),
}


def as_head(name, w):
    return kinds.transpose(w) if name == "tied" else w


def ours(name, b=BATCH, **options):
    def run(params):
        loss = masked_xent(lambda p, b, key: Output(p[0], as_head(name, p[1])), **options)
        return loss(params, b, None)

    return run


def whole(name, b=BATCH, label_smoothing=0.0, z_loss=0.0):
    """The definition, over whole logits."""

    def run(params):
        logits = (params[0] @ kinds.dense(as_head(name, params[1])))[:, :-1]
        logp = jax.nn.log_softmax(logits)
        same = (b.segments[:, 1:] == b.segments[:, :-1]) & (b.segments[:, 1:] > 0)
        weights = jnp.where(same, b.weights[:, 1:], 0)
        nll = -jnp.take_along_axis(logp, b.tokens[:, 1:, None], -1)[..., 0]
        loss = (1 - label_smoothing) * nll - label_smoothing * logp.mean(-1)
        loss += z_loss * jax.nn.logsumexp(logits, -1) ** 2
        return (weights * loss).sum(), weights.sum(), {"nll": (weights * nll).sum()}

    return run


def value_and_grad(run, params):
    return jax.jit(jax.value_and_grad(lambda p: (run(p)[0], run(p)[1:]), has_aux=True))(params)


@pytest.mark.parametrize("block", [1, 4 * V * 3, 2**22], ids=["1 token", "3 tokens", "all"])  # 20 is no multiple of 3
@pytest.mark.parametrize("name, options", [("head", {"label_smoothing": 0.1, "z_loss": 1e-2}), ("tied", {}), ("low_rank", {})])
def test_equals_the_definition_whatever_the_block(name, options, block, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", block)
    params = (HIDDEN, HEADS[name])
    assert_trees_close(value_and_grad(ours(name, **options), params), value_and_grad(whole(name, **options), params))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("axes", [{}, {"data": 16}, {"fsdp": 4, "sequence": 4}, {"data": 2, "tensor": 8}], ids=str)
def test_a_devices_block_keeps_an_accelerator_busy(axes, trains, monkeypatch):
    """However many there are, each has as many logits at a time; and all of them their share of the tokens."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    sizes = {name: axes.get(name, 1) for name in sharding.MESH}
    rows, T, vocab = 16, 2048, 64 * 1024
    hidden = jax.ShapeDtypeStruct((rows, T, 8), jnp.float32)
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(sizes.values()), tuple(sizes))):
        n, B, t, _ = jax.eval_shape(lambda x: tokens.blocks(vocab, x, trains=trains)[0], hidden).shape
    devices = math.prod(sizes.values())
    assert (n * t, B) == (T, rows)
    assert B * t * vocab // devices == min(tokens.WIDE * (4 if trains else 1), rows * T * vocab // devices)


def test_equals_torch():
    import torch

    b = BATCH._replace(weights=(BATCH.weights > 0.6).astype(jnp.float32))
    logits = torch.from_numpy(np.array(HIDDEN @ HEADS["head"])).requires_grad_()
    targets, weights = tokens.shift(b)
    labels = torch.from_numpy(np.where(np.asarray(weights) > 0, targets, -100)).long()
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    total, count, _ = ours("head", b, label_smoothing=0.1)((HIDDEN, HEADS["head"]))
    assert float(count) == (labels >= 0).sum() > 5
    np.testing.assert_allclose(total / count, theirs.item(), rtol=1e-5)


def test_a_token_counts_its_weight_and_is_predicted_within_its_segment():
    b = BATCH._replace(weights=BATCH.weights + 0.5)  # on first tokens and padding too, where it must not count
    targets, weights = map(np.asarray, tokens.shift(b))
    for row, t in np.ndindex(4, 20):
        inside = t < 19 and b.segments[row, t] == b.segments[row, t + 1] > 0
        assert weights[row, t] == (b.weights[row, t + 1] if inside else 0)
        assert not inside or targets[row, t] == b.tokens[row, t + 1]
    assert {0.0, 0.5, 1.0, 1.5} == set(weights.flatten())
    doubled = BATCH._replace(weights=BATCH.weights * 2)
    once, twice = ours("head")((HIDDEN, HEADS["head"])), ours("head", doubled)((HIDDEN, HEADS["head"]))
    np.testing.assert_allclose([2 * once[0], 2 * once[1]], twice[:2], rtol=1e-6)


def test_a_frozen_head_costs_no_gradient():
    """Logits and d/dhidden are two products of tokens x D x V; with the head's gradient they are three."""

    def products(argnums):
        run = jax.grad(lambda h, w: ours("head")((h, w))[0], argnums)
        jaxpr = jax.make_jaxpr(run)(HIDDEN, HEADS["head"]).jaxpr
        needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as the compiler drops what nobody uses
        return str(needed).count("dot_general")

    assert (products((0,)), products((0, 1))) == (2, 3)


def test_no_array_of_whole_logits(monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 4 * V * 5)
    for run in (lambda h, w: ours("head")((h, w))[0], lambda h, w: logprobs(h, w, BATCH.tokens).sum()):
        text = str(jax.make_jaxpr(jax.grad(run, (0, 1)))(HIDDEN, HEADS["head"]))
        assert f"4,5,{V}]" in text and f"4,20,{V}]" not in text and f"4,4,5,{V}]" not in text


@pytest.mark.parametrize("block", [4 * V * 3, 2**22])
@pytest.mark.parametrize("name", ["head", "low_rank"])
def test_logprobs_equal_the_definition(name, block, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", block)
    targets, cotangent = BATCH.tokens, random(4, 20, seed=3)

    def definition(hidden, head):
        return jnp.take_along_axis(jax.nn.log_softmax(hidden @ kinds.dense(head)), targets[..., None], -1)[..., 0]

    def both(fn):
        y, pull = jax.vjp(fn, HIDDEN, HEADS[name])
        return y, pull(cotangent)

    assert_trees_close(both(partial(logprobs, targets=targets)), both(definition))


def test_bfloat16_hidden_states_keep_float32_sums():
    half = HIDDEN.astype(jnp.bfloat16)
    (total, _), (dh, dw) = value_and_grad(ours("head"), (half, HEADS["head"]))
    (exact, _), _ = value_and_grad(ours("head"), (half.astype(jnp.float32), HEADS["head"]))
    assert total.dtype == jnp.float32 and dh.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    np.testing.assert_allclose(total, exact, rtol=0.01)


@pytest.mark.parametrize("case", [0, 1], ids=["completion only", "every token"])
def test_equals_trl(case, shared):
    from sftjax.hf.load import load_config, load_params

    golden = json.loads((shared / "golden" / "trl_losses.json").read_text())
    case = [c for c in golden["cases"] if c["trainer"] == "sft"][case]
    ids, labels, segments = (np.array(case["batch"][k], np.int32) for k in ("input_ids", "labels", "attention_mask"))
    b = Batch(ids, (labels != -100).astype(np.float32), segments, np.broadcast_to(np.arange(ids.shape[1]), ids.shape))
    c = load_config(shared / "golden" / "policy")
    loss = masked_xent(forward(Decoder(c)))

    def mean(params):
        total, count, _ = loss(params, b, None)
        return total / count

    value, grads = jax.jit(jax.value_and_grad(mean))(load_params(shared / "golden" / "policy", c))
    norm = np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    np.testing.assert_allclose(norm, case["grad_norm"], rtol=1e-4)
