"""What trains: masks over every array, by method, and a table that adds up."""

import jax
import jax.numpy as jnp
import pytest
from tiny import config, params

from sftjax import tree
from sftjax.config import UserError, default
from sftjax.weights import method, select
from sftjax.weights.kinds import Adapter, Dora, LowRank, Tokens
from sftjax.weights.lora import lora
from sftjax.weights.quantize import Nf4, Quantised, nf4

CONFIG = config(qkv_bias=True)


def trained(p, mask):
    """Paths of which something trains."""
    chosen, _ = tree.split(p, mask)
    return {path for path, w in tree.flatten(chosen).items() if jax.tree.leaves(w)}


def parts(p, mask):
    """Paths down to the parts that train: `layers/attn/q/kernel.base.a`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree.split(p, mask)[0])
    return {"/".join(str(getattr(k, "key", f".{getattr(k, 'name', '')}")) for k in path).replace("/.", ".") for path, _ in leaves}


def test_everything_and_what_is_added():
    p = params(CONFIG)
    assert trained(p, select.everything(p)) == set(tree.flatten(p))
    assert trained(p, select.added(p)) == set()
    q = lora(p, jax.random.key(0), targets=["q_proj", "lm_head"])
    chosen, frozen = tree.split(q, select.added(q))
    assert trained(q, select.added(q)) == {"layers/attn/q/kernel", "head/kernel"}
    assert chosen["head"]["kernel"].base is None and frozen["head"]["kernel"].a is None
    also = select.added(q, also=("embed/embedding", "head/kernel"))
    assert trained(q, also) == {"layers/attn/q/kernel", "head/kernel", "embed/embedding"}
    assert tree.split(q, also)[0]["head"]["kernel"].base is not None


def test_named_leaves():
    p = params(CONFIG)
    biases = {"layers/attn/q/bias", "layers/attn/k/bias", "layers/attn/v/bias"}
    assert select.named(p, ["head/kernel", r"attn/\w/bias"]) == {"head/kernel"} | biases
    assert select.named(p, "final_norm,head") == {"final_norm/scale", "head/kernel"}
    with pytest.raises(UserError, match="nothing matches 'haed'; the leaves are embed/embedding"):
        select.named(p, ["haed"])
    with pytest.raises(UserError, match=r"freeze.train: '\(bias' is not a regular expression"):
        select.named(p, ["(bias"])


def test_a_cut_stack_is_the_same_stack():
    p = params(CONFIG)
    cut = select.cut(p, 2)
    assert (cut["lower"]["attn"]["q"]["kernel"].shape[0], cut["layers"]["attn"]["q"]["kernel"].shape[0]) == (1, 2)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), select.uncut(cut), p)
    assert all(jax.tree.leaves(same)) and select.cut(p, 3) is p and select.uncut(p) is p


def test_a_stack_of_two_dtypes_has_kernels_of_the_products_own():
    cut = select.cut(params(CONFIG), 2)
    cut["lower"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cut["lower"])
    whole = select.uncut(cut, jnp.bfloat16)["layers"]
    assert {path: x.dtype.name for path, x in tree.flatten(whole).items()} == {
        path: "bfloat16" if path.endswith("kernel") else "float32" for path in tree.flatten(whole)
    }
    assert {x.dtype for x in jax.tree.leaves(select.uncut(cut))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("n", [-1, 0, 4])
def test_layers_there_are_not(n):
    with pytest.raises(UserError, match="the model has 3 layers"):
        select.cut(params(CONFIG), n)


def made(modules=(), ids=(), base=None, **changes):
    """(params, mask) of a config's method, as a run makes them."""
    c = default()
    for key, value in changes.items():
        *path, name = key.split(".")
        node = c
        for part in path:
            node = node[part]
        node[name] = value
    p = params(CONFIG) if base is None else base
    quantisers = method.quantiser(p, c, modules)
    p = tree.map_leaves(lambda path, w: quantisers[path](w) if path in quantisers else w, p)
    p = method.apply(p, c, modules, ids)
    return p, method.mask(p, c, modules)


Q, K, V, HEAD, EMBED = *(f"layers/attn/{x}/kernel" for x in "qkv"), "head/kernel", "embed/embedding"
LINEAR = [f"layers/{path}/kernel" for path in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")]
BIASES = {f"layers/attn/{x}/bias" for x in "qkv"}
ADAPTER = ("down", "down_bias", "up", "up_bias")
CASES = {
    "lora": ({"lora.targets": "q_proj"}, {f"{Q}.a", f"{Q}.b"}),
    "lora on all and the head": (
        {"lora.targets": ("all-linear", "lm_head")},
        {f"{path}.{part}" for path in (*LINEAR, HEAD) for part in "ab"},
    ),
    "dora": ({"lora.targets": "q_proj", "lora.dora": True}, {f"{Q}.base.a", f"{Q}.base.b", f"{Q}.magnitude"}),
    "pissa": ({"lora.targets": "q_proj", "lora.init": "pissa"}, {f"{Q}.a", f"{Q}.b"}),
    "qdora": (
        {"lora.targets": "q_proj", "lora.dora": True, "model.quantize": "nf4"},
        {f"{Q}.base.a", f"{Q}.base.b", f"{Q}.magnitude"},
    ),
    "lora beside tokens": (
        {"lora.targets": "q_proj,lm_head", "ids": (3, 9)},
        {f"{Q}.a", f"{Q}.b", f"{HEAD}.base.a", f"{HEAD}.base.b", f"{HEAD}.rows", f"{EMBED}.rows"},
    ),
    "modules to save": (
        {"lora.targets": "k_proj", "modules": "q_proj,lm_head", "model.quantize": "int8", "ids": (3,)},
        {f"{K}.a", f"{K}.b", Q, "layers/attn/q/bias", HEAD, f"{EMBED}.rows"},
    ),
    "adapter": (
        {"method": "adapter", "model.quantize": "nf4"},
        {f"layers/{path}/kernel.{part}" for path in ("attn/o", "mlp/down") for part in ADAPTER},
    ),
    "tokens": ({"method": "tokens", "ids": (3, 9)}, {f"{HEAD}.rows", f"{EMBED}.rows"}),
    "bitfit": ({"method": "freeze", "freeze.train": "bias"}, BIASES),
    "bitfit over a quantised model": ({"method": "freeze", "freeze.train": "bias", "model.quantize": "nf4"}, BIASES),
    "a kernel of a quantised model": ({"method": "freeze", "freeze.train": Q, "model.quantize": "int8"}, {Q}),
    "norms": (
        {"method": "freeze", "freeze.train": "norm"},
        {"layers/attn_norm/scale", "layers/mlp_norm/scale", "final_norm/scale"},
    ),
    "norms and a token": (
        {"method": "freeze", "freeze.train": "final_norm", "ids": (3,)},
        {"final_norm/scale", f"{HEAD}.rows", f"{EMBED}.rows"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_method_trains_exactly_its_own(name):
    changes, expected = CASES[name]
    p, mask = made(**changes)
    assert parts(p, mask) == expected
    quantised = [w for w in jax.tree.leaves(p, is_leaf=lambda w: isinstance(w, Quantised)) if isinstance(w, Quantised)]
    assert bool(quantised) == ("model.quantize" in changes)


def test_the_last_layers_and_leaves_below_them():
    p, mask = made(**{"method": "freeze", "freeze.last_n_layers": 2, "freeze.train": "layers/attn/q/bias,head"})
    upper = {path for path in tree.flatten(p) if path.startswith("layers/")}
    assert trained(p, mask) == upper | {"lower/attn/q/bias", "head/kernel"}


def test_full_trains_every_token_as_it_is():
    p, mask = made(method="full", ids=(3,))
    assert trained(p, mask) == set(tree.flatten(params(CONFIG))) and not isinstance(p["embed"]["embedding"], Tokens)


def test_kinds_stand_where_the_config_says():
    p, _ = made(
        **{"model.quantize": "nf4", "lora.dora": True, "lora.init": "olora", "lora.targets": "q_proj", "modules": "v_proj"}
    )
    q = p["layers"]["attn"]["q"]["kernel"]
    assert [type(w) for w in (q, q.base, q.base.base, q.base.base.base)] == [Dora, LowRank, LowRank, Nf4]
    assert isinstance(p["layers"]["attn"]["k"]["kernel"], Nf4)
    assert isinstance(p["layers"]["attn"]["v"]["kernel"], jax.Array)  # trains as a whole, so it keeps its bits
    p, _ = made(**{"method": "adapter", "model.quantize": "int8"})
    assert isinstance(p["layers"]["attn"]["o"]["kernel"], Adapter)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"modules": "lm_haed"}, r"lora.modules_to_save: nothing is named 'lm_haed'; did you mean lm_head\?"),
        ({"modules": "q_proj"}, "lora.modules_to_save: q_proj trains as a whole, and lora.targets names it too"),
        (
            {"method": "freeze", "freeze.train": "layers", "model.quantize": "nf4"},
            "model.quantize=nf4: freeze.train trains every kernel of the layers as it is",
        ),
        ({"lora.targets": "q_porj"}, r"lora.targets: nothing is named 'q_porj'; did you mean q_proj\?"),
        ({"lora.rank_pattern": {"donw_proj": 4}}, r"lora.rank_pattern: nothing is named 'donw_proj'; did you mean down_proj\?"),
        (
            {"method": "adapter", "adapter.targets": "o_porj"},
            r"adapter.targets: nothing is named 'o_porj'; did you mean o_proj\?",
        ),
    ],
)
def test_a_name_there_is_not_is_met_with_the_nearest(changes, message):
    with pytest.raises(UserError, match=message):
        made(**changes)


def test_the_table_adds_up():
    q = lora(params(CONFIG), jax.random.key(0), rank=2, targets=["q_proj"])
    rows = select.table(q, select.added(q))
    assert [path for path, *_ in rows] == list(tree.flatten(q))
    assert sum(n for *_, n, _ in rows) == tree.count(q)
    assert {path: t for path, *_, t in rows if t} == {"layers/attn/q/kernel": 3 * 2 * (24 + 32)}


def test_what_is_quantised_counts_as_what_it_stands_for():
    p = params(CONFIG)
    small = tree.map_leaves(lambda path, w: nf4(w) if path == Q else w, p)
    assert select.table(small, select.added(small)) == select.table(p, select.added(p))
