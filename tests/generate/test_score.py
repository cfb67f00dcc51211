"""A continuation's log-probs are what the whole forward and transformers say, however rows are batched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sftjax import sharding
from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.generate import score as module
from sftjax.generate.engine import Engine
from sftjax.hf.model import load
from sftjax.models.decoder import Decoder, forward
from sftjax.weights.kinds import matmul
from sftjax.weights.lora import lora

CONFIG = tiny.config(max_positions=128)
PARAMS = tiny.params(CONFIG)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CONFIG.vocab, n).tolist() for n in (3, 60, 1, 17, 8, 128)]
CONTINUATIONS = [RNG.integers(0, CONFIG.vocab, n).tolist() for n in (5, 1, 100, 16, 0, 1)]


@pytest.fixture(scope="module")
def whole():
    """[rows, T, V]: log-probs of one forward over all rows."""
    tokens, segments = np.zeros((2, len(PROMPTS), 129), np.int32)
    for row, (p, c) in enumerate(zip(PROMPTS, CONTINUATIONS)):
        ids = [*p, *c]
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    positions = np.broadcast_to(np.arange(129), tokens.shape)
    hidden, head, _ = jax.jit(forward(Decoder(CONFIG)))(PARAMS, Batch(tokens, None, segments, positions))
    return np.asarray(jax.nn.log_softmax(matmul(hidden, head)))


def assert_scores(scored, whole, atol=1e-5):
    for row, (p, c, s) in enumerate(zip(PROMPTS, CONTINUATIONS, scored, strict=True)):
        at = whole[row, len(p) - 1 : len(p) + len(c) - 1]
        np.testing.assert_allclose(s.logps, at[np.arange(len(c)), c], atol=atol)
        np.testing.assert_array_equal(s.greedy, at.argmax(-1) == c)
        assert (s.logps.dtype, s.greedy.dtype, len(s.logps)) == (np.float32, bool, len(c))
        best = np.argsort(-at, -1, kind="stable")[:, : s.top.shape[1]]
        np.testing.assert_array_equal(s.top, best)
        np.testing.assert_allclose(s.top_logps, np.take_along_axis(at, best, -1), atol=atol)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_scores_equal_the_full_forward(whole, batch_size, monkeypatch):
    monkeypatch.setattr("sftjax.losses.tokens.BLOCK", 300)  # the head over several blocks of columns
    module._score.clear_cache()
    assert_scores(Engine(Decoder(CONFIG), PARAMS).score(PROMPTS, CONTINUATIONS, batch_size=batch_size, top=3), whole)
    module._score.clear_cache()


def test_sharded_equals_single(whole):
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, sequence=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, sharding.shardings(PARAMS, mesh))
        assert_scores(Engine(Decoder(CONFIG), params).score(PROMPTS, CONTINUATIONS), whole)


def test_greedy_marks_what_the_engine_generates():
    params = jax.tree.map(lambda x: x + 0.02, lora(PARAMS, jax.random.key(0), rank=4))
    engine = Engine(Decoder(CONFIG), params)
    answers = [a.ids for a in engine.generate(PROMPTS[:5], max_new_tokens=20)]
    assert all(s.greedy.all() for s in engine.score(PROMPTS[:5], answers))
    answers[1][7] ^= 1
    assert engine.score(PROMPTS[:5], answers)[1].greedy[:8].tolist() == [True] * 7 + [False]


def test_a_like_request_compiles_nothing():
    engine = Engine(Decoder(CONFIG), PARAMS)
    engine.score(PROMPTS, CONTINUATIONS)
    programs = module._score._cache_size()
    other = Engine(Decoder(CONFIG), tiny.params(CONFIG, seed=1))
    other.score([p[1:] or p for p in PROMPTS], [c[:97] for c in CONTINUATIONS])
    assert module._score._cache_size() == programs


def test_mistakes_are_said_before_the_first_row(monkeypatch):
    engine = Engine(Decoder(CONFIG), PARAMS)
    monkeypatch.setattr(module, "_score", None)
    for prompts, continuations, says in [
        ([[1], [2]], [[1]], "2 prompts and 1 continuations"),
        ([[1], []], [[1], [1]], "prompt 1 is empty"),
        ([[1], [1] * 100], [[1], [1] * 30], "prompt 1 .* 130 tokens; the model takes 128"),
        ([[1]], [[64]], "token 64"),
        ([[-1]], [[3]], "token -1"),
    ]:
        with pytest.raises(UserError, match=says):
            engine.score(prompts, continuations)
    assert engine.score([], []) == []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_to_transformers_on_a_real_checkpoint(shared, torch_scores, dtype):
    from transformers import AutoModelForCausalLM

    folder = shared / "data" / "hf_models" / "stories260K"
    model = load(folder, dtype=jnp.dtype(dtype).name)
    ids = model.tokenizer("Once upon a time, there was a small dog. It had a red ball and it ran")["input_ids"]
    rows = [(ids[:n], ids[n:]) for n in (1, 4, 11, len(ids) - 1)]
    scored = Engine(model.module, model.params).score(*zip(*rows))
    theirs = torch_scores(AutoModelForCausalLM.from_pretrained(folder), [ids])
    for (prompt, _), s in zip(rows, scored):
        np.testing.assert_allclose(s.logps, theirs[len(prompt) - 1 :], atol=1e-4 if dtype == jnp.float32 else 0.3)
