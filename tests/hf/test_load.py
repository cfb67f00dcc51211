"""Loading: every tensor lands where it belongs, and a checkpoint that does not fit its config is refused by name."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sftjax import sharding, tree
from sftjax.config import UserError
from sftjax.hf import load as loading
from sftjax.hf.load import load_config, load_params, resize_embeddings, resolve
from sftjax.hf.tensors import Tensor, read, write
from sftjax.hf.verify import score
from sftjax.models.families import FAMILIES
from sftjax.weights import quantize


def load(directory, **options):
    config = load_config(directory)
    return load_params(directory, config, **options), config


def rewrite(directory, change):
    """Passes `{name: array}` of a checkpoint's single file through `change` and writes it back."""
    file = directory / "model.safetensors"
    arrays = change({name: np.array(stored.view()) for name, stored in read(file).items()})
    write(file, {name: Tensor(x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_says_what_transformers_says(family, torch_model, torch_scores, rows, tmp_path):
    model = torch_model(family)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    params, config = load(tmp_path)
    np.testing.assert_allclose(score(params, config, rows), torch_scores(model, rows), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_lands_in_its_place(tied, torch_model, tmp_path):
    model = torch_model("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    params, _ = load(tmp_path)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    np.testing.assert_array_equal(params["embed"]["embedding"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["layers"]["mlp"]["down"]["kernel"][2], state["model.layers.2.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(params["layers"]["attn"]["o"]["bias"][1], state["model.layers.1.self_attn.o_proj.bias"])
    assert ("head" in params) == (not tied)


def test_sharded_files_load_as_one_file_does(checkpoint):
    one, many = load(checkpoint("qwen3"))[0], load(checkpoint("qwen3", shards=True))[0]
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_dtypes_are_the_checkpoints_own_or_the_one_asked_for(checkpoint):
    directory = checkpoint("qwen3")

    def mix(arrays):
        dtypes = {"model.norm.weight": np.float16, "lm_head.weight": ml_dtypes.bfloat16}
        dtypes["model.layers.1.mlp.up_proj.weight"] = ml_dtypes.bfloat16  # one layer of a stack
        return {name: x.astype(dtypes.get(name, x.dtype)) for name, x in arrays.items()}

    rewrite(directory, mix)
    params, _ = load(directory)
    assert params["final_norm"]["scale"].dtype == jnp.float16 and params["head"]["kernel"].dtype == jnp.bfloat16
    assert params["layers"]["mlp"]["up"]["kernel"].dtype == jnp.float32  # the one that holds both
    cast, _ = load(directory, dtype=jnp.bfloat16)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), cast, params)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(cast))


def test_each_device_gets_its_slice_and_no_more(checkpoint):
    directory = checkpoint("qwen2")
    whole, _ = load(directory)
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    axes = {"layers/attn/q/kernel": P(None, "x"), "layers/mlp/up/kernel": P(None, None, "x"), "layers/attn/q/bias": P(None, "x")}
    shardings = tree.map_leaves(lambda path, _: NamedSharding(mesh, axes.get(path, P())), whole)
    split, _ = load(directory, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, whole, split)
    q = split["layers"]["attn"]["q"]["kernel"]
    assert q.sharding.spec == P(None, "x") and q.addressable_shards[0].data.shape[1] == q.shape[1] // mesh.size


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 1, "fsdp": 2, "tensor": 4}], ids=["one device", "a mesh"])
def test_quantised_while_loading_equals_quantised_after(kind, axes, checkpoint):
    directory = checkpoint("qwen3", hidden_size=256, intermediate_size=512, head_dim=64, num_attention_heads=4, vocab_size=64)
    plain, _ = load(directory)
    mesh = sharding.make_mesh(**axes)
    quantisers = quantize.quantisers(plain, kind)
    loaded, _ = load(directory, shardings=sharding.shardings(plain, mesh), quantisers=quantisers)
    after = tree.map_leaves(lambda path, w: quantisers[path](w) if path in quantisers else w, plain)
    jax.tree.map(np.testing.assert_array_equal, loaded, after)
    assert jax.tree.map(lambda x: x.sharding.spec, loaded) == jax.tree.map(lambda s: s.spec, sharding.shardings(after, mesh))


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 1, "fsdp": 2, "tensor": 4}], ids=["one device", "a mesh"])
def test_kernels_of_a_shape_are_quantised_by_one_program(axes, checkpoint):
    directory = checkpoint("qwen3", hidden_size=64, intermediate_size=192, head_dim=32, num_attention_heads=4, vocab_size=64)
    plain, _ = load(directory)
    quantisers, places = quantize.quantisers(plain, "int8"), sharding.shardings(plain, sharding.make_mesh(**axes))
    kinds = {(w.shape, tree.flatten(places)[path].spec) for path, w in tree.flatten(plain).items() if path in quantisers}
    before = loading._stacking.cache_info().misses
    for _ in range(2):
        load(directory, shardings=places, quantisers=quantisers)
    assert loading._stacking.cache_info().misses - before == len(kinds) < len(quantisers)


def test_a_kernel_is_never_whole_in_its_own_dtype_while_it_is_quantised(checkpoint, monkeypatch):
    directory = checkpoint("qwen3", num_hidden_layers=6, hidden_size=256, intermediate_size=512)
    plain, _ = load(directory)
    quantisers, shapes = quantize.quantisers(plain, "nf4"), jax.tree.map(lambda x: x.shape, plain)
    del plain
    wide, leaf = [], loading._leaf

    def watched(*args):
        layer = leaf(*args)
        alive = [x.shape for x in jax.live_arrays() if x.dtype == jnp.float32]
        wide.append(alive.count(layer.shape))
        assert shapes["layers"]["mlp"]["up"]["kernel"] not in alive
        return layer

    monkeypatch.setattr(loading, "_leaf", watched)
    load(directory, quantisers=quantisers)
    assert len(wide) > 6 * len(quantisers) and max(wide) <= 3  # one being read, one being quantised, and chance


def test_tensors_that_do_not_fit_the_config_are_named(checkpoint, edit_json):
    directory = checkpoint("llama")
    whole = (directory / "model.safetensors").read_bytes()
    edit_json(directory / "config.json", num_hidden_layers=4)
    with pytest.raises(UserError, match=r"layers\.3\..* and 6 more tensors missing"):
        load(directory)
    edit_json(directory / "config.json", num_hidden_layers=2)
    with pytest.raises(UserError, match=r"holds model\.layers\.2\..*does not account for"):
        load(directory)
    edit_json(directory / "config.json", num_hidden_layers=3, intermediate_size=25)
    with pytest.raises(UserError, match=r"down_proj\.weight is \[16, 24\]; config\.json makes it \[16, 25\]"):
        load(directory)
    edit_json(directory / "config.json", intermediate_size=24)
    (directory / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="cut short"):
        load(directory)


def test_known_extras_are_ignored_and_only_those(checkpoint):
    directory = checkpoint("llama", tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewrite(directory, lambda x: x | extras | {"lm_head.weight": x[embedding]})
    params, _ = load(directory)
    assert "head" not in params
    rewrite(directory, lambda x: x | {"lm_head.weight": x[embedding] + 1})
    with pytest.raises(UserError, match="tie_word_embeddings is true, but"):
        load(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_the_mean_of_the_old(checkpoint, tied):
    params, config = load(checkpoint("llama", tie_word_embeddings=tied))
    resized, bigger = resize_embeddings(params, config, 64)
    assert bigger.vocab == 64
    pairs = [(params["embed"]["embedding"], resized["embed"]["embedding"])]
    if not tied:
        pairs.append((params["head"]["kernel"].T, resized["head"]["kernel"].T))
    for old, new in pairs:
        np.testing.assert_array_equal(new[:61], old)
        np.testing.assert_allclose(new[61:], np.tile(old.mean(0), (3, 1)), rtol=1e-5)
    assert resize_embeddings(params, config, 61) == (params, config)  # spare rows: nothing to do


def test_new_tokens_in_a_padded_vocabulary_get_the_mean_of_the_tokens_before_them(checkpoint):
    params, config = load(checkpoint("llama", tie_word_embeddings=False))
    resized, same = resize_embeddings(params, config, 52, [50, 51])  # of 61 rows
    assert same == config
    for old, new in (
        (params["embed"]["embedding"], resized["embed"]["embedding"]),
        (params["head"]["kernel"].T, resized["head"]["kernel"].T),
    ):
        np.testing.assert_allclose(new[50:52], np.tile(old[:50].mean(0), (2, 1)), rtol=1e-5, atol=1e-6)
        kept = np.r_[:50, 52:61]
        np.testing.assert_array_equal(new[kept], old[kept])


def test_resolve_says_what_is_wrong_with_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").touch()
    wrong = {
        str(tmp_path): "has no config.json",
        str(tmp_path / "file"): "a file",
        "./nowhere": "no such directory",
        "/nowhere/at/all": "no such directory",
        "gs://bucket/model": "copy it to a local directory",
        "sftjax-test/no-such-model": "not a local directory, not in the hub's cache",
    }
    for path, message in wrong.items():
        with pytest.raises(UserError, match=message):
            resolve(path)


def test_a_config_that_cannot_be_read_is_named_once(tmp_path):
    file = tmp_path / "config.json"
    for text, message in (("{", "not JSON"), ("[]", "not a JSON object"), ('{"model_type": "gpt2"}', "model_type='gpt2'")):
        file.write_text(text)
        with pytest.raises(UserError, match=message) as e:
            load_config(tmp_path)
        assert str(e.value).count("config.json") == 1
