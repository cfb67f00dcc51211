"""Answers are what the whole forward says, token by token, however prompts are cut into batches, blocks and caches."""

import json
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import assert_greedy, logits_of

from sftjax import sharding, tree
from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.generate import flight as module
from sftjax.generate import passes
from sftjax.generate.engine import Answer, Engine
from sftjax.generate.sampling import choose
from sftjax.generate.text import Writer
from sftjax.hf.model import load
from sftjax.models.config import Clamp, Experts, Rope
from sftjax.models.decoder import Decoder
from sftjax.weights import kinds
from sftjax.weights.adapter import adapter
from sftjax.weights.kinds import Adapter, Kind
from sftjax.weights.lora import lora
from sftjax.weights.quantize import quantize
from sftjax.weights.select import cut
from sftjax.weights.tokens import tokens

CONFIG = tiny.config(max_positions=128)
PARAMS = tiny.params(CONFIG)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CONFIG.vocab, n).tolist() for n in (3, 41, 1, 17, 8)]


SWITCHES = {
    "plain": {},
    "tied, biases": {"tied": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qk_norm, one window": {"qk_norm": "head", "windows": (7, 7, 7)},
    "windows by layer": {"windows": (None, 5, 9), "kv_heads": 4},
    "sinks, experts": {
        "sinks": True,
        "windows": (5, None, 5),
        "experts": Experts(4, 2, 16, bias=True, fused=True, clamp=Clamp(1.7, 0.5)),
    },
    "yarn": {"max_positions": 64, "rope": Rope(kind="yarn", factor=2, original_max_positions=64)},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_cached_decoding_equals_full_forward(name, monkeypatch):
    monkeypatch.setattr(module, "PREFILL", 64)  # the longest prompt takes two blocks of 32 columns
    monkeypatch.setattr(module, "AHEAD", 8)  # and the cache grows on the way
    c = tiny.config(**{"max_positions": 128, **SWITCHES[name]})
    model, params = Decoder(c), tiny.params(c)
    answers = Engine(model, params).generate(PROMPTS, max_new_tokens=50)
    assert [len(a.ids) for a in answers] == [50] * len(PROMPTS) and not any(a.stopped for a in answers)
    assert_greedy(model, params, PROMPTS, answers)
    assert_greedy(model, params, PROMPTS, Engine(model, params).generate(PROMPTS, max_new_tokens=50, draft_tokens=3))


def test_dynamic_rope_within_its_trained_length():
    c = tiny.config(max_positions=128, rope=Rope(kind="dynamic", factor=2))
    params = tiny.params(c)
    assert_greedy(Decoder(c), params, PROMPTS, Engine(Decoder(c), params).generate(PROMPTS, max_new_tokens=10))
    assert c.reach == 256


LONGROPE = Rope(
    kind="longrope",
    factor=8.0,
    original_max_positions=16,
    attention_factor=1.2,
    short_factor=(1.0, 1.1, 1.2, 1.3),
    long_factor=(2.0, 4.0, 6.0, 8.0),
)


def one_by_one(model, params, prompt, n):
    """The n tokens that greedy whole forwards over all there is give, one after the other."""
    ids = [*prompt]
    for _ in range(n):
        row, real = np.zeros((2, 1, 128), np.int32)
        row[0, : len(ids)], real[0, : len(ids)] = ids, 1
        logits = np.asarray(logits_of(model)(params, Batch(row, None, real, np.arange(128)[None])))
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_an_answer_that_crosses_longropes_trained_length(monkeypatch):
    """Keys of the short factors do not stay: across the length too, decoding is what whole forwards say."""
    monkeypatch.setattr(module, "PREFILL", 32)  # the longest prompt takes two blocks, which are turned as one
    c = tiny.config(max_positions=128, rope=LONGROPE)
    model, params = Decoder(c), tiny.params(c)
    prompts = [*PROMPTS, RNG.integers(0, c.vocab, 16).tolist(), RNG.integers(0, c.vocab, 15).tolist()]
    expected = [one_by_one(model, params, p, 24) for p in prompts]
    engine = Engine(model, params)
    assert [a.ids for a in engine.generate(prompts, max_new_tokens=24, batch_size=3)] == expected
    assert [list(engine.stream(p, max_new_tokens=24)) for p in prompts] == expected
    for n in (1, 2):  # the last token of the trained length, and the first beyond it
        assert [a.ids for a in engine.generate(prompts, max_new_tokens=n)] == [ids[:n] for ids in expected]
    stop = expected[0][13]  # the token at position 16, which a row joins again after
    ended = [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]
    assert [a.ids for a in Engine(model, params, stop_ids=[stop]).generate(prompts, max_new_tokens=24)] == ended
    text = Letters().decode([stop])
    cut = engine.generate(prompts, max_new_tokens=24, batch_size=3, tokenizer=Letters(), stop_strings=[text])
    assert [a.ids for a in cut] == ended


def test_lora_merged_or_applied_and_a_stack_cut_in_two():
    params = lora(PARAMS, jax.random.key(0), rank=4)
    params = jax.tree.map(lambda x: x + 0.05, params)  # b starts at zero
    model = Decoder(CONFIG)
    assert_greedy(model, params, PROMPTS, Engine(model, params).generate(PROMPTS, max_new_tokens=8))
    half = Decoder(CONFIG, dtype=jnp.bfloat16)
    assert_greedy(half, params, PROMPTS, Engine(half, params).generate(PROMPTS, max_new_tokens=8), slack=0.2)
    lower = Decoder(CONFIG, lower=2)
    assert_greedy(model, PARAMS, PROMPTS, Engine(lower, cut(PARAMS, 1)).generate(PROMPTS, max_new_tokens=8))


KINDS = {
    "lora": lambda params, key: lora(params, key, rank=4),
    "dora": lambda params, key: lora(params, key, rank=4, dora=True),
    "dora on the head": lambda params, key: lora(params, key, rank=4, dora=True, targets="lm_head"),
    "pissa": lambda params, key: lora(params, key, rank=4, init="pissa"),
    "adapter": lambda params, key: adapter(params, key, width=4),
    "tokens": lambda params, key: tokens(params, [3, 60]),
    "tokens of a tied embedding": lambda params, key: tokens(without_head(params), [3, 60]),
    "nf4": lambda params, key: quantize(params, "nf4"),
    "int8 with lora": lambda params, key: lora(quantize(params, "int8"), key, rank=4),
    "nf4 with dora": lambda params, key: lora(quantize(params, "nf4"), key, rank=4, dora=True),
    "nf4 with adapter": lambda params, key: adapter(quantize(params, "nf4"), key, width=4),
}


def without_head(params):
    return {name: leaf for name, leaf in params.items() if name != "head"}


def moved(params):
    """Every part that a kind adds, away from where it starts."""

    def leaf(path, w):
        if not isinstance(w, Kind):
            return w
        parts = {name: x for name, x in vars(w).items() if name != "base" and isinstance(x, jax.Array)}
        keys = {name: tree.fold_path(jax.random.key(5), f"{path}/{name}") for name in parts}
        parts = {name: x + 0.05 * jax.random.normal(keys[name], x.shape) for name, x in parts.items()}
        return replace(w, base=leaf(f"{path}/base", w.base), **parts)

    return tree.map_leaves(leaf, params)


def one_matrix(w):
    """`w` without kinds, but for what has no one matrix."""
    return replace(w, base=kinds.dense(w.base)) if isinstance(w, Adapter) else kinds.dense(w)


@pytest.mark.parametrize("name", KINDS)
def test_any_kind_answers_as_its_one_matrix(name):
    c = tiny.config(max_positions=128, tied="tied" in name)
    start = without_head(PARAMS) if c.tied else PARAMS
    params = moved(KINDS[name](start, jax.random.key(0)))
    answers = Engine(Decoder(c), params).generate(PROMPTS, max_new_tokens=8)
    assert_greedy(Decoder(c), params, PROMPTS, answers)
    assert_greedy(Decoder(c), tree.map_leaves(lambda _, w: one_matrix(w), params), PROMPTS, answers)
    assert answers != Engine(Decoder(c), start).generate(PROMPTS, max_new_tokens=8)  # the kind says something

    half = Decoder(c, dtype=jnp.bfloat16)
    engine = Engine(half, params)
    assert_greedy(half, params, PROMPTS, engine.generate(PROMPTS, max_new_tokens=8), slack=0.2)
    assert {path: type(w) for path, w in tree.flatten(engine.params).items()} == {
        path: type(w) for path, w in tree.flatten(params).items()
    }  # nothing was merged: bfloat16 would round the update away


@pytest.mark.parametrize("base", ["array", "nf4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_needs_no_cast_is_not_copied(dtype, base):
    """A frozen model is held once, whatever stands around it."""
    stored = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    stored = quantize(stored, "nf4") if base == "nf4" else stored
    there = {id(x) for x in jax.tree.leaves(stored)}
    params = tokens(lora(stored, jax.random.key(0), rank=4, targets="q_proj"), [3, 60])
    held = jax.tree.leaves(Engine(Decoder(CONFIG, dtype=dtype), params).params)
    merged = {(jnp.float32, "array"): 3, (jnp.float32, "nf4"): 2}.get((dtype, base), 0)  # embedding, head, q
    assert len(there - {id(x) for x in held}) == merged
    assert {x.dtype for x in jax.tree.leaves(Engine(Decoder(CONFIG, dtype=dtype), PARAMS).params)} == {jnp.dtype(dtype)}


def test_samples_come_from_seed_and_row_not_from_the_batch():
    engine = Engine(Decoder(CONFIG), PARAMS)

    def draw(**options):
        return [a.ids for a in engine.generate(PROMPTS, max_new_tokens=12, temperature=1.0, top_p=0.95, **options)]

    first = draw(seed=3)
    assert draw(seed=3, batch_size=2) == first
    assert draw(seed=4) != first
    same = engine.generate([PROMPTS[0]] * 2, max_new_tokens=12, temperature=1.0)
    assert same[0].ids != same[1].ids
    assert list(engine.stream(PROMPTS[0], max_new_tokens=12, temperature=1.0, top_p=0.95, seed=3)) == first[0]


def test_seeds_are_32_bits():
    engine = Engine(Decoder(CONFIG), PARAMS)

    def draw(seed):
        return engine.generate(PROMPTS[:1], max_new_tokens=12, temperature=1.0, seed=seed)

    assert draw(2**32 - 1) != draw(2**31) != draw(0)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed={seed}: needs a whole number from 0 to 4294967295"):
            draw(seed)
        with pytest.raises(UserError, match=f"seed={seed}"):
            next(engine.stream(PROMPTS[0], max_new_tokens=1, seed=seed))


def test_stop_ids_end_a_row_and_only_that_row():
    free = Engine(Decoder(CONFIG), PARAMS).generate(PROMPTS, max_new_tokens=40)
    stop = free[1].ids[20]
    answers = Engine(Decoder(CONFIG), PARAMS, stop_ids=[stop]).generate(PROMPTS, max_new_tokens=40)
    for whole, a in zip(free, answers):
        assert a.ids == whole.ids[: whole.ids.index(stop) if stop in whole.ids else None]
        assert a.stopped == (stop in whole.ids)


class Letters:
    """A tokenizer whose token i is two letters."""

    def decode(self, ids, **_):
        return "".join(chr(97 + i // 16) + chr(65 + i % 16) for i in ids)

    def convert_ids_to_tokens(self, i):
        return self.decode([i])


def test_stop_strings_are_cut_exactly_even_within_tokens():
    engine, letters = Engine(Decoder(CONFIG), PARAMS), Letters()
    free = engine.generate(PROMPTS, max_new_tokens=70, tokenizer=letters)
    assert [a.text for a in free] == [letters.decode(a.ids) for a in free]
    at = 2 * 39 + 1  # from the middle of a token of the second chunk
    stop = free[1].text[at : at + 4]
    answers = engine.generate(PROMPTS, max_new_tokens=70, tokenizer=letters, stop_strings=[stop])
    assert any(a.stopped for a in answers)
    for whole, a in zip(free, answers):
        where = whole.text.find(stop)
        assert a.stopped == (where >= 0)
        assert a.text == (whole.text[:where] if a.stopped else whole.text)
        assert a.ids == whole.ids[: where // 2 if a.stopped else None]


def test_what_a_stop_string_ends_no_token_ended():
    answer = Answer(0, Writer(Letters(), [Letters().decode([3])]))
    assert answer.add([1, 3, 2], frozenset({2})) and (answer.ids, answer.stop_id) == ([1], None)


def test_a_stream_is_the_answer_alone(unequal):
    engine, _ = unequal
    for row in (0, 5):
        whole = engine.generate([MANY[row]], max_new_tokens=60)[0]
        assert list(engine.stream(MANY[row], max_new_tokens=60)) == whole.ids
    stream = Engine(Decoder(CONFIG), PARAMS).stream(MANY[0], max_new_tokens=60)
    assert len([next(stream) for _ in range(3)]) == 3  # one that is left is left


def test_the_models_positions_are_the_end():
    engine = Engine(Decoder(CONFIG), PARAMS)
    short, full = engine.generate([[1], [1] * 120], max_new_tokens=1000)
    assert (len(short.ids), len(full.ids), full.stopped) == (127, 8, False)
    with pytest.raises(UserError, match="prompt 1 has 128 tokens"):
        engine.generate([[1], [1] * 128], max_new_tokens=1)
    with pytest.raises(UserError, match="empty"):
        engine.generate([[]], max_new_tokens=1)
    with pytest.raises(UserError, match="token 64"):
        engine.generate([[64]], max_new_tokens=1)
    assert engine.generate([], max_new_tokens=1) == []


def programs():
    return [fn._cache_size() for fn in (passes.vacant, passes.prefill, passes.enter, passes.decode, passes.resized)]


def test_a_like_request_compiles_nothing():
    engine = Engine(Decoder(CONFIG), PARAMS)
    engine.generate(PROMPTS, max_new_tokens=9, temperature=0.5)
    before = programs()
    other = Engine(Decoder(CONFIG), tiny.params(CONFIG, seed=1))
    other.generate([p[1:] + p for p in PROMPTS if len(p) < 20] * 2, max_new_tokens=23, temperature=0.9, seed=5)
    assert programs() == before


MANY = [RNG.integers(0, CONFIG.vocab, n).tolist() for n in RNG.integers(1, 60, 24)]


@pytest.fixture(scope="module")
def unequal():
    """An engine whose answers to MANY are of very unequal lengths, and each answer alone."""
    free = Engine(Decoder(CONFIG), PARAMS).generate(MANY, max_new_tokens=60, temperature=1.0)
    stops = [t for t, _ in Counter(t for a in free for t in a.ids).most_common(2)]
    engine = Engine(Decoder(CONFIG), PARAMS, stop_ids=stops)
    alone = engine.generate(MANY, max_new_tokens=60, temperature=1.0, batch_size=len(MANY))
    assert len({len(a.ids) for a in alone}) > 8
    return engine, alone


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_slot_taken_over_changes_no_answer(unequal, batch_size):
    """Whatever a slot held before and whoever goes on beside it: greedily by the whole forward, at random by the key."""
    engine, alone = unequal
    assert engine.generate(MANY, max_new_tokens=60, temperature=1.0, batch_size=batch_size) == alone
    assert_greedy(Decoder(CONFIG), PARAMS, MANY, engine.generate(MANY, max_new_tokens=60, batch_size=batch_size))


def test_nobody_waits_for_the_longest(unequal, monkeypatch):
    """Slots are refilled while others go on: hardly more steps than the work there is, and the short come first."""
    engine, alone = unequal
    steps = []
    decode = passes.decode

    def counted(*args, **options):
        state, out = decode(*args, **options)
        steps.append(int((np.asarray(out) >= 0).any(0).sum()))
        return state, out

    monkeypatch.setattr(passes, "decode", counted)
    came = [row for row, _ in engine.each(MANY, max_new_tokens=60, temperature=1.0, batch_size=4)]
    lengths = [len(a.ids) for a in alone]
    assert sorted(came) == list(range(len(MANY))) and came != sorted(came)
    assert sum(steps) <= sum(lengths) / 4 + max(lengths)
    order = sorted(range(len(MANY)), key=lambda i: len(MANY[i]))
    batches = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert sum(steps) < 0.8 * sum(max(lengths[i] for i in batch) for batch in batches)  # what batch after batch takes


def test_requests_of_any_number_and_length_share_few_programs(unequal):
    engine, _ = unequal
    before = programs()
    for n in (17, 20, 24):
        engine.generate([MANY[i] for i in range(n)], max_new_tokens=11 * n % 60, batch_size=16)
    # prompts of 32 or 64 columns, a cache of 64 or 128
    assert all(x - y <= limit for x, y, limit in zip(programs(), before, (2, 2, 4, 2, 1)))


def test_the_cache_is_as_long_as_its_rows_need(monkeypatch):
    monkeypatch.setattr(module, "AHEAD", 8)
    c = tiny.config(max_positions=256)
    engine = Engine(Decoder(c), tiny.params(c))
    prompts = [RNG.integers(0, c.vocab, n).tolist() for n in (250, 5)]
    flight = engine.flight(2, choose(), 0)
    long, short = flight.join([engine.row(p, 70, i, seed=0) for i, p in enumerate(prompts)])
    answers, lengths = {long: [], short: []}, []
    while len(flight.free) < 2:
        for slot, new in flight.next(4).items():
            answers[slot] += new
        lengths.append(flight.length)
    assert lengths[0] == 256 and lengths[2] == 64 and lengths[-1] == 128
    alone = [engine.generate([p], max_new_tokens=70)[0].ids for p in prompts]
    assert [answers[long], answers[short]] == alone


def test_sharded_equals_single():
    expected = Engine(Decoder(CONFIG), PARAMS).generate(PROMPTS, max_new_tokens=10)
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, sequence=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, sharding.shardings(PARAMS, mesh))
        for n in (0, 3):
            assert Engine(Decoder(CONFIG), params).generate(PROMPTS, max_new_tokens=10, draft_tokens=n) == expected


def test_a_device_of_a_mesh_has_its_own_rows_and_heads_of_the_cache(monkeypatch):
    monkeypatch.setattr(module, "AHEAD", 8)  # and the cache grows on the way
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, sharding.shardings(PARAMS, mesh))
        engine = Engine(Decoder(CONFIG), params)
        flight = engine.flight(8, choose(), 0)
        flight.join([engine.row(p, 60, i, seed=0) for i, p in enumerate(PROMPTS)])
        while len(flight.free) < 8:
            for x in jax.tree.leaves(flight.state.cache):
                assert [whole // own for whole, own in zip(x.shape, x.sharding.shard_shape(x.shape))] == [1, 4, 2, 1, 1]
            flight.next()


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_greedy_equals_transformers_on_real_checkpoints(shared, name):
    import torch
    from transformers import AutoModelForCausalLM

    folder = shared / "data" / "hf_models"
    model = load(folder / name)
    golden = json.loads((folder / "golden.json").read_text())[name]
    engine = Engine(model.module, model.params, stop_ids=[1, 2])
    text = engine.generate([[1]], max_new_tokens=200, tokenizer=model.tokenizer)[0].text
    assert len(text) > 150 and golden["greedy_from_bos"].startswith(text)

    ids = model.tokenizer("Once upon a time, there was a small dog. It had a red ball and it ran")["input_ids"]
    prompts = [ids[:n] for n in (1, 5, 12, len(ids))]
    theirs = AutoModelForCausalLM.from_pretrained(folder / name)
    torch.set_num_threads(1)
    for penalty in (1.0, 1.2):
        ours = engine.generate(prompts, max_new_tokens=60, repetition_penalty=penalty)
        for prompt, answer in zip(prompts, ours):
            whole = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=60, do_sample=False, repetition_penalty=penalty, eos_token_id=[1, 2]
            )
            expected = whole[0, len(prompt) :].tolist()
            assert answer.ids == (expected[:-1] if answer.stopped else expected)
