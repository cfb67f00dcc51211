"""What trains: masks over every leaf, and a table that adds up."""

import jax
import pytest
from tiny import config, params

from sftjax import tree
from sftjax.config import UserError
from sftjax.weights import select
from sftjax.weights.lora import lora

CONFIG = config(qkv_bias=True)


def trained(p, mask):
    """Paths of which something trains."""
    chosen, _ = tree.split(p, mask)
    return {path for path, w in tree.flatten(chosen).items() if jax.tree.leaves(w)}


def test_everything_and_low_rank():
    p = params(CONFIG)
    assert trained(p, select.everything(p)) == set(tree.flatten(p))
    q = lora(p, jax.random.key(0), targets=["q_proj", "lm_head"])
    chosen, frozen = tree.split(q, select.low_rank(q))
    assert set(trained(q, select.low_rank(q))) == {"layers/attn/q/kernel", "head/kernel"}
    assert chosen["head"]["kernel"].base is None and frozen["head"]["kernel"].a is None
    also = select.low_rank(q, also=("embed/embedding", "head/kernel"))
    assert trained(q, also) == {"layers/attn/q/kernel", "head/kernel", "embed/embedding"}
    assert tree.split(q, also)[0]["head"]["kernel"].base is not None


def test_named_leaves_and_the_last_layers():
    p = params(CONFIG)
    assert trained(p, select.named(p, ["head/kernel", r"attn/\w/bias"], 0)) == {
        "head/kernel",
        "layers/attn/q/bias",
        "layers/attn/k/bias",
        "layers/attn/v/bias",
    }
    cut = select.cut(p, 2)
    last = trained(cut, select.named(cut, [], 2))
    assert last == {path for path in tree.flatten(cut) if path.startswith("layers/")}
    with pytest.raises(UserError, match="nothing matches 'haed'; the leaves are embed/embedding"):
        select.named(p, ["haed"], 0)
    with pytest.raises(UserError, match=r"freeze.train: '\(bias' is not a regular expression"):
        select.named(p, ["(bias"], 0)
    assert trained(p, select.named(p, "final_norm,head", 0)) == {"final_norm/scale", "head/kernel"}


@pytest.mark.parametrize("n", [-1, 0, 4])
def test_layers_there_are_not(n):
    with pytest.raises(UserError, match="the model has 3 layers"):
        select.cut(params(CONFIG), n)


def test_the_table_adds_up():
    q = lora(params(CONFIG), jax.random.key(0), rank=2, targets=["q_proj"])
    rows = select.table(q, select.low_rank(q))
    assert [path for path, *_ in rows] == list(tree.flatten(q))
    assert sum(n for *_, n, _ in rows) == tree.count(q)
    assert {path: t for path, *_, t in rows if t} == {"layers/attn/q/kernel": 3 * 2 * (24 + 32)}
