"""Saving: what was loaded comes back byte for byte, what was trained as transformers reads it, and nothing half-written."""

import errno
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sftjax import tree
from sftjax.config import UserError
from sftjax.data.tokenizer import open_tokenizer
from sftjax.hf import save as save_module
from sftjax.hf.load import load_config, load_params, read_json, resize_embeddings
from sftjax.hf.save import save
from sftjax.hf.tensors import Tensor, read, read_dir, write
from sftjax.hf.verify import score
from sftjax.models.families import FAMILIES
from sftjax.weights.lora import lora


def load(directory, **options):
    config = load_config(directory)
    return load_params(directory, config, **options), config


def raw_bytes(directory):
    return {name: (stored.dtype, stored.shape, stored.view().tobytes()) for name, stored in read_dir(directory).items()}


def trained(params):
    """LoRA on every kernel, with b away from zero."""
    rng = np.random.default_rng(0)
    params = lora(params, jax.random.key(0), rank=3, alpha=5.0)
    return jax.tree.map(lambda x: x if x.any() else jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), params)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
def test_untrained_comes_back_byte_for_byte(family, shards, checkpoint, tmp_path):
    source = checkpoint(family, shards=shards, tie_word_embeddings=family == "llama")
    save(*load(source), source=source, out=tmp_path / "out", max_shard_bytes=4000 if shards else 5e9)
    assert raw_bytes(tmp_path / "out") == raw_bytes(source)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == shards
    assert read_json(tmp_path / "out" / "config.json") == read_json(source / "config.json")


def mixed(source):
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16]
    arrays = {name: stored.view().astype(dtypes[i % 3]) for i, (name, stored) in enumerate(read_dir(source).items())}
    write(source / "model.safetensors", {name: Tensor(x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()})


def test_mixed_dtypes_come_back_byte_for_byte(checkpoint, tmp_path):
    source = checkpoint("qwen3")
    mixed(source)
    save(*load(source), source=source, out=tmp_path / "out")
    assert raw_bytes(tmp_path / "out") == raw_bytes(source)


def test_untouched_tensors_are_the_sources_even_where_training_held_less(checkpoint, tmp_path):
    source = checkpoint("qwen3")
    params, config = load(source, dtype=jnp.bfloat16)
    touched = {"layers/attn/q/kernel", "final_norm/scale"}
    save(params, config, source=source, out=tmp_path / "out", untouched=set(tree.flatten(params)) - touched)
    before, after = raw_bytes(source), raw_bytes(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"model.norm.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3))}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_says_of_a_merged_export_what_the_run_says(family, checkpoint, torch_scores, rows, tmp_path):
    import transformers

    source = checkpoint(family)
    params, config = load(source)
    params = trained(params)
    save(params, config, source=source, out=tmp_path / "out", max_shard_bytes=4000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = score(params, config, rows)
    np.testing.assert_allclose(torch_scores(model.eval(), rows), ours, atol=1e-4)
    assert np.abs(ours - score(load(source)[0], config, rows)).max() > 0.1  # else the adapter proved nothing


def test_a_dtype_is_of_every_tensor_and_of_the_config(checkpoint, tmp_path):
    source = checkpoint("llama")
    params, config = load(source)
    save(params, config, source=source, out=tmp_path / "out", dtype="bfloat16", untouched={"embed/embedding"})
    stored = read_dir(tmp_path / "out")
    for name, old in read_dir(source).items():
        np.testing.assert_array_equal(stored[name].view(), old.view().astype(ml_dtypes.bfloat16))
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_a_resized_vocabulary_is_in_the_config_and_the_old_rows_stay(checkpoint, tmp_path):
    source = checkpoint("llama")
    params, config = resize_embeddings(*load(source), 64)
    save(params, config, source=source, out=tmp_path / "out", untouched=set(tree.flatten(params)))
    again, config = load(tmp_path / "out")
    assert config.vocab == 64 and again["head"]["kernel"].shape == (16, 64)
    np.testing.assert_array_equal(again["embed"]["embedding"][:61], read_dir(source)["model.embed_tokens.weight"].view())


def test_a_model_made_from_a_config_alone_is_saved(checkpoint, tmp_path):
    source = checkpoint("qwen3")
    params, config = load(source)
    expected = raw_bytes(source)
    (source / "model.safetensors").unlink()
    save(params, config, source=source, out=tmp_path / "out")
    assert raw_bytes(tmp_path / "out") == expected


def test_generation_stops_where_the_template_does(checkpoint, edit_json, tmp_path):
    source = checkpoint("qwen3")
    params, config = load(source)
    edit_json(source / "generation_config.json", eos_token_id=2, temperature=0.6)
    save(params, config, source=source, out=tmp_path / "out", stop_ids=[7, 2])
    generation = read_json(tmp_path / "out" / "generation_config.json")
    assert generation["eos_token_id"] == [2, 7] and generation["temperature"] == 0.6
    (source / "generation_config.json").unlink()
    edit_json(source / "config.json", eos_token_id=None, bos_token_id=1)
    save(params, config, source=source, out=tmp_path / "out", stop_ids=[7])
    generation = read_json(tmp_path / "out" / "generation_config.json")
    assert generation == {"bos_token_id": 1, "eos_token_id": 7}


def test_the_tokenizer_goes_along_with_the_template_in_force(checkpoint, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = checkpoint("llama")
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    made.chat_template = "old"
    made.save_pretrained(source)
    params, config = load(source)

    save(params, config, source=source, out=tmp_path / "copied", template="new")
    assert (tmp_path / "copied" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "copied").chat_template == "new"

    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    save(params, config, source=source, out=tmp_path / "added", tokenizer=made)
    again = AutoTokenizer.from_pretrained(tmp_path / "added")
    assert again.convert_tokens_to_ids("<|im_start|>") == 2 and again.chat_template == "old"
    old, new = (read_json(d / "tokenizer_config.json")["tokenizer_class"] for d in (source, tmp_path / "added"))
    assert old == new


@pytest.mark.parametrize("legacy", [True, False], ids=["in tokenizer_config.json", "in files"])
@pytest.mark.parametrize("grown", [True, False])
@pytest.mark.parametrize("force", ["old", "new"])
def test_several_templates_stay_unless_another_is_in_force(checkpoint, edit_json, tmp_path, legacy, grown, force):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source, several = checkpoint("llama"), {"default": "old", "tool_use": "tools"}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    made.chat_template = None if legacy else several
    made.save_pretrained(source)
    if legacy:
        held = [{"name": name, "template": text} for name, text in several.items()]
        edit_json(source / "tokenizer_config.json", chat_template=held)
    made.chat_template = several if force == "old" else force  # as data.chat.prepare leaves it
    save(*load(source), source=source, out=tmp_path / "out", tokenizer=made if grown else None, template=force)
    expected = several if force == "old" else force
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == expected
    assert open_tokenizer("anywhere", tmp_path / "out").chat_template == expected  # as what lies with an adapter


def test_only_our_own_exports_are_replaced(checkpoint, tmp_path):
    source = checkpoint("llama")
    params, config = load(source)
    out = tmp_path / "out"
    out.mkdir()
    save(params, config, source=source, out=out)  # an empty directory will do
    save(params, config, source=source, out=out, dtype="float16")
    assert {stored.dtype.name for stored in read_dir(out).values()} == {"float16"}
    with pytest.raises(UserError, match="is the model the run started from"):
        save(params, config, source=source, out=source)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match="exists and is not an export of sftjax"):
        save(params, config, source=source, out=tmp_path / "mine")
    with pytest.raises(UserError, match=r"thesis.txt/out: cannot be made \(Not a directory\)"):
        save(params, config, source=source, out=tmp_path / "mine" / "thesis.txt" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]  # no temporary directory is left


def test_a_failed_export_leaves_the_earlier_one(checkpoint, tmp_path, monkeypatch):
    source = checkpoint("llama")
    params, config = load(source)
    save(params, config, source=source, out=tmp_path / "out")
    before = raw_bytes(tmp_path / "out")

    def refuse(directory):
        assert set(read(directory / "model.safetensors")) == set(before)  # called with the whole export
        raise UserError("will not do")

    with pytest.raises(UserError, match="will not do"):
        save(params, config, source=source, out=tmp_path / "out", dtype="float16", check=refuse)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_module, "write_dir", full)
    with pytest.raises(UserError, match="no space left"):
        save(params, config, source=source, out=tmp_path / "out", dtype="float16")
    assert raw_bytes(tmp_path / "out") == before and len(list(tmp_path.iterdir())) == 1


def test_values_that_do_not_fit_are_refused(checkpoint, tmp_path):
    source = checkpoint("llama")
    params, config = load(source)
    params["layers"]["mlp"]["up"]["kernel"] = params["layers"]["mlp"]["up"]["kernel"].at[1, 0, 0].set(1e5)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight .*float16 ends at 65504"):
        save(params, config, source=source, out=tmp_path / "out", dtype="float16")
    save(params, config, source=source, out=tmp_path / "out", dtype="bfloat16")


def test_parameters_of_another_shape_are_refused(checkpoint, tmp_path):
    source = checkpoint("llama")
    params, config = load(source)
    del params["head"]
    with pytest.raises(UserError, match="head/kernel does not fit"):
        save(params, config, source=source, out=tmp_path / "out")


def test_the_mark_tells_nobody_where_the_base_lay(checkpoint, tmp_path):
    source = checkpoint("llama")
    save(*load(source), source=source, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "sftjax_export.json").read_text()).keys() == {"sftjax"}
