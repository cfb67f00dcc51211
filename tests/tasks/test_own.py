"""A loop of one's own: the page runs as it stands, and what its functions cannot use is refused in a sentence."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sftjax
from sftjax.data.batch import Batch
from sftjax.weights.kinds import LowRank

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(toy):
    return sftjax.load(toy.base)


@pytest.mark.parametrize("bits", [None, "nf4"])
def test_the_page_runs(bits, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop, preferences = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    loop = loop.replace("Qwen/Qwen3-0.6B", str(toy.base)).replace("range(10)", "range(4)").replace("range(3)", "range(2)")
    if bits:
        loop = loop.replace("sftjax.lora(model.params,", "sftjax.lora(sftjax.quantize(model.params),")
    page = {}
    exec(loop, page)
    assert page["losses"][-1] < page["losses"][0]
    whole = sftjax.load("mine")
    beside = sftjax.load(toy.base, adapter="mine-lora", quantize=bits)
    said = np.asarray(page["tuned"].logits("3 + 4?"))
    np.testing.assert_allclose(whole.logits("3 + 4?"), said, atol=1e-2)
    np.testing.assert_allclose(beside.logits("3 + 4?"), said, atol=1e-2)
    exec(preferences, page)
    assert int(page["count"]) == 2 and float(page["total"]) > 0


def test_all_trains_where_nothing_was_put_in(model):
    trainable, frozen = sftjax.split(model.params)
    assert not jax.tree.leaves(frozen) and {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    trainable, frozen = sftjax.split(sftjax.lora(sftjax.quantize(model.params), 0, rank=2))
    both = sftjax.tree.join(trainable, frozen)["layers"]["attn"]["q"]["kernel"]
    assert isinstance(both, LowRank) and both.a.shape[-1] == 2
    with pytest.raises(sftjax.UserError, match="kernels in few bits do not train"):
        sftjax.split(sftjax.quantize(model.params))


def test_a_seed_is_a_key(model):
    one, other = (sftjax.lora(model.params, key, rank=2) for key in (3, jax.random.key(3)))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, other))


def test_an_epoch_holds_every_row_once(model, toy):
    found = sftjax.batches(model, toy.rows, max_length=64, batch_size=4)
    assert all(isinstance(b, Batch) and b.tokens.shape == (4, 64) for b in found)
    per_row = [sftjax.batches(model, [row], max_length=64, batch_size=1)[0] for row in toy.rows]
    assert sum(b.weights.sum() for b in found) == sum(b.weights.sum() for b in per_row)
    assert sum((b.segments > 0).sum() for b in found) == sum((b.segments > 0).sum() for b in per_row)


def test_ollama_is_given_a_modelfile(model, tmp_path):
    assert sftjax.save(model, tmp_path / "out", to="ollama") < 1e-4
    assert (tmp_path / "out" / "Modelfile").is_file() and (tmp_path / "out" / "model.safetensors").is_file()


def test_answers_are_those_of_the_model_in_order(model):
    asked = ["what colour is coal?", [{"role": "user", "content": "what colour is snow?"}], "what colour is coal?"]
    first, second, third = sftjax.answer(model, asked, max_new_tokens=4)
    assert first == third and [second] == sftjax.answer(model, "what colour is snow?", max_new_tokens=4)


LONG = {"messages": [{"role": "user", "content": "a" * 80}, {"role": "assistant", "content": "b"}]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda m: sftjax.answer(m, [[]]), r"prompts\[0\]: is empty"),
        (lambda m: sftjax.answer(m, [{"role": "user", "content": "a"}]), "put one conversation into a list"),
        (lambda m: sftjax.answer(m, [[{"role": "assistant", "content": "a"}]]), "nothing is asked"),
        (lambda m: sftjax.answer(m, [[{"role": "judge", "content": "a"}]]), "'judge' is not a role known here$"),
        (lambda m: sftjax.batches(m, [], max_length=64, batch_size=1), "rows"),
        (lambda m: sftjax.batches(m, [LONG], max_length=64, batch_size=1), r"rows\[0\] has .* more than max_length=64"),
        (lambda m: sftjax.batches(m, [LONG], max_length=4096, batch_size=1), "needs 2 to 128, the positions"),
        (lambda m: sftjax.batches(m, [{"messages": []}], max_length=64, batch_size=1), r"rows\[0\]: messages"),
        (lambda m: sftjax.batches(m, [PAIR], max_length=64, batch_size=1), "preferences"),
        (lambda m: sftjax.batches(m, [PAIR], max_length=64, batch_size=1, want="pair"), "want=pair: needs answers or pairs"),
        (lambda m: sftjax.save(m, "out", to="peft"), "no adapter to write"),
        (lambda m: sftjax.save(m, "out", to="lora"), "to=lora: needs one of hf, ollama, peft"),
        (lambda m: sftjax.save(m, "out", base="b"), "a merged checkpoint has none"),
        (lambda m: sftjax.save(m, "out", to="ollama", base="b"), "a merged checkpoint has none"),
    ],
)
def test_what_cannot_be_used_is_told(call, sentence, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sftjax.UserError, match=sentence):
        call(model)
    assert not any(tmp_path.iterdir())
