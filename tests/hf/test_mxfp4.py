"""Experts in MXFP4 are read as transformers reads them, whole or in part, and leave as plain bfloat16."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sftjax import sharding
from sftjax.config import UserError
from sftjax.hf.load import load_config, load_params, read_json
from sftjax.hf.mxfp4 import Packed, unpacked
from sftjax.hf.save import save
from sftjax.hf.tensors import read, read_dir
from sftjax.hf.verify import score
from sftjax.models.families import config_from_hf, config_to_hf
from sftjax.plan.step import checkpoint_dtype
from sftjax.weights import quantize

PACKED = ("gate_up_proj", "down_proj")


def random_pair(rng, E, fan_in, out):
    """Every code, and scales that leave values of about the size of weights."""
    blocks = rng.integers(0, 256, (E, out, fan_in // 32, 16), dtype=np.uint8)
    return blocks, rng.integers(121, 126, blocks.shape[:3], dtype=np.uint8)


@pytest.fixture(scope="module")
def packed(checkpoint):
    """A tiny checkpoint as the hub's are: experts in pairs of bytes, the rest in bfloat16."""
    directory = checkpoint("gpt_oss", hidden_size=64, intermediate_size=32)
    file, rng = directory / "model.safetensors", np.random.default_rng(0)
    tensors = {}
    for name, x in load_file(file).items():
        if name.endswith(PACKED):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = random_pair(rng, *x.shape)
        else:
            tensors[name] = x.astype(ml_dtypes.bfloat16)
    save_file(tensors, file, {"format": "pt"})
    config = read_json(directory / "config.json")
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "quantization_config": quantised}))
    return directory


def load(directory, **options):
    config = load_config(directory)
    return load_params(directory, config, **options), config


def in_torch(directory, **options):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def test_values_are_those_of_transformers_bit_for_bit(tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_pair(np.random.default_rng(0), 3, 96, 5)
    scales.ravel()[:3] = 0, 5, 250  # the smallest that is a number in bfloat16, and near the largest
    save_file({"x_blocks": blocks, "x_scales": scales}, tmp_path / "model.safetensors")
    ours = unpacked(read_dir(tmp_path))["x"]
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    assert ours.shape == tuple(theirs.shape) == (3, 96, 5) and ours.view().dtype == ours.dtype
    np.testing.assert_array_equal(ours.view().view(np.int16), theirs.view(torch.int16).numpy())


@pytest.mark.parametrize("index", [np.s_[1:3, 0:96, 2:4], np.s_[0:1, 40:57, 0:5], np.s_[2:3, 32:64, 1:2]], ids=str)
def test_a_part_is_that_part_of_the_whole(index, tmp_path):
    blocks, scales = random_pair(np.random.default_rng(0), 3, 96, 5)
    save_file({"x_blocks": blocks, "x_scales": scales}, tmp_path / "x.safetensors")
    x = Packed(*read(tmp_path / "x.safetensors").values())
    np.testing.assert_array_equal(x.take(index), x.view()[index])


def test_a_loaded_model_says_what_transformers_says(packed, torch_scores, rows):
    from transformers import Mxfp4Config

    params, config = load(packed)
    assert params["layers"]["mlp"]["experts"]["gate_up"]["kernel"].dtype == jnp.bfloat16
    theirs = in_torch(packed, quantization_config=Mxfp4Config(dequantize=True))
    np.testing.assert_allclose(score(params, config, rows), torch_scores(theirs, rows), atol=1e-4)


def test_an_export_is_plain_and_says_the_same(packed, torch_scores, rows, tmp_path):
    params, config = load(packed)
    few = load(packed, quantisers=quantize.quantisers(params, "nf4"))[0]
    for out, given in (("plain", params), ("of the source's own", few)):
        untouched = {f"layers/mlp/experts/{name}/kernel" for name in ("gate_up", "down")} if given is few else ()
        save(given, config, source=packed, out=tmp_path / out, untouched=untouched)
        raw = read_json(packed / "config.json")
        assert read_json(tmp_path / out / "config.json") == {k: v for k, v in raw.items() if k != "quantization_config"}
        again = read_dir(tmp_path / out)
        assert {stored.dtype.name for stored in again.values()} == {"bfloat16"}
        for name in PACKED:
            whole = np.stack([again[f"model.layers.{i}.mlp.experts.{name}"].view() for i in range(config.layers)])
            np.testing.assert_array_equal(whole, params["layers"]["mlp"]["experts"][name.removesuffix("_proj")]["kernel"])
    np.testing.assert_allclose(score(params, config, rows), torch_scores(in_torch(tmp_path / "plain"), rows), atol=1e-4)


def test_each_device_reads_its_own_part(packed):
    whole, _ = load(packed)
    mesh = sharding.make_mesh(data=1, fsdp=4, expert=2)  # 16 of 64 rows: half a block
    split, _ = load(packed, shardings=sharding.shardings(whole, mesh))
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    kernel = split["layers"]["mlp"]["experts"]["gate_up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 2, 16, 64)


def test_half_of_a_pair_is_named(tmp_path, packed):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((packed / name).read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.down_proj missing"):
        load(tmp_path)


def test_where_no_dtype_is_named_it_is_bfloat16(packed, tmp_path):
    raw = read_json(packed / "config.json")
    del raw["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert checkpoint_dtype(tmp_path) == jnp.bfloat16
    assert config_to_hf(config_from_hf(raw), raw)["torch_dtype"] == "bfloat16"
