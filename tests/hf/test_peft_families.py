"""Adapters of modules that not every family has: fused kernels in and out, experts not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import tree
from sftjax.config import UserError
from sftjax.hf.load import load_config, load_params
from sftjax.hf.peft import load_adapter, save_adapter, unserved
from sftjax.hf.verify import score
from sftjax.weights import quantize
from sftjax.weights.adapter import adapter
from sftjax.weights.lora import lora

ATTENTION = "q_proj,k_proj,v_proj,o_proj"
TARGETS = {"phi3": "all-linear", "qwen2_moe": ATTENTION, "gpt_oss": ATTENTION}


@pytest.fixture(scope="module", params=TARGETS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def source(family, torch_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    torch_model(family).save_pretrained(directory)
    return directory


@pytest.fixture
def base(source):
    config = load_config(source)
    return load_params(source, config), config


def moved(params, like):
    """Every array of `params` that is not one of `like`'s, moved."""
    rng, old = np.random.default_rng(0), {id(x) for x in jax.tree.leaves(like)}
    return jax.tree.map(lambda x: x if id(x) in old else x + rng.normal(0, 0.1, x.shape).astype(np.float32), params)


def of_torch(source):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(source).eval()


def test_our_adapter_says_in_torch_what_the_run_says(family, source, base, torch_scores, rows, tmp_path):
    from peft import PeftModel

    params = moved(lora(base[0], jax.random.key(0), rank=2, targets=TARGETS[family]), base[0])
    save_adapter(params, base[1], form="peft", source=source, out=tmp_path / "out")
    ours = score(params, base[1], rows)
    assert np.abs(ours - score(*base, rows)).max() > 0.1
    np.testing.assert_allclose(score(load_adapter(base[0], tmp_path / "out"), base[1], rows), ours, atol=1e-5)
    np.testing.assert_allclose(torch_scores(PeftModel.from_pretrained(of_torch(source), tmp_path / "out"), rows), ours, atol=2e-5)


def test_an_adapter_of_peft_says_here_what_it_says_there(family, source, base, torch_scores, rows, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    named = ["qkv_proj", "gate_up_proj"] if family == "phi3" else ["q_proj", "o_proj"]
    theirs = get_peft_model(of_torch(source), LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=named)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = score(load_adapter(base[0], tmp_path / "theirs"), base[1], rows)
    np.testing.assert_allclose(torch_scores(theirs, rows), ours, atol=2e-5)


@pytest.fixture
def mixture(checkpoint):
    source = checkpoint("qwen2_moe")
    config = load_config(source)
    return source, load_params(source, config), config


@pytest.mark.parametrize("targets", ["all-linear", "shared_expert.down_proj", "mlp.gate"])
def test_lora_within_a_mixture_is_refused_with_a_way_out(targets, mixture, tmp_path):
    source, params, config = mixture
    params = lora(params, jax.random.key(0), rank=2, targets=targets)
    with pytest.raises(UserError, match=r"mlp\..* is of a mixture of experts.*--to=hf.*--config.lora.targets=q_proj"):
        save_adapter(params, config, form="peft", source=source, out=tmp_path / "out")


@pytest.mark.parametrize("targets", ["all-linear", "shared_expert.down_proj", "mlp.gate", ATTENTION])
def test_vllm_is_served_none_of_a_mixtures_adapters_but_of_attention(targets, mixture):
    source, params, config = mixture
    params = lora(params, jax.random.key(0), rank=2, targets=targets)
    assert unserved(params, config, source, ()) == ([] if targets == ATTENTION else ["LoRA on a mixture's experts"])


def test_sinks_that_trained_are_refused_with_a_way_out(checkpoint, tmp_path):
    source = checkpoint("gpt_oss")
    config = load_config(source)
    params = lora(load_params(source, config), jax.random.key(0), rank=2, targets="q_proj")
    with pytest.raises(UserError, match=r"self_attn\.sinks is a tensor and no module.*--to=hf"):
        save_adapter(params, config, form="peft", source=source, out=tmp_path / "out", saved={"layers/attn/sinks/bias"})


def test_experts_of_an_adapter_of_peft_are_refused(mixture, tmp_path, edit_json):
    source, params, config = mixture
    save_adapter(
        lora(params, jax.random.key(0), rank=2, targets=ATTENTION), config, form="peft", source=source, out=tmp_path / "out"
    )
    file = tmp_path / "out" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layers.0.self_attn.q_proj.lora", b"layers.0.mlp.experts.1.w1.lora"))
    with pytest.raises(UserError, match=r"adapts model.layers.0.mlp.experts.*PEFT's adapters of experts are not supported"):
        load_adapter(params, tmp_path / "out")


def test_bottleneck_adapters_of_experts_come_back_to_the_bit(mixture, tmp_path):
    source, params, config = mixture
    theirs = moved(adapter(params, jax.random.key(0), width=5, targets=["experts.down_proj", "o_proj"]), params)
    save_adapter(theirs, config, form="sftjax", source=source, out=tmp_path / "out")
    again = load_adapter(params, tmp_path / "out")
    assert jax.tree.structure(again) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, again, theirs)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_experts_quantised_while_loading_are_those_quantised_after(kind, mixture):
    source, params, config = mixture
    quantisers = quantize.quantisers(params, kind)
    assert "layers/mlp/experts/gate/kernel" in quantisers and "layers/mlp/router/kernel" not in quantisers
    loaded = load_params(source, config, quantisers=quantisers)
    after = tree.map_leaves(lambda path, w: quantisers[path](w) if path in quantisers else w, params)
    assert jax.tree.structure(loaded) == jax.tree.structure(after)
    jax.tree.map(np.testing.assert_array_equal, loaded, after)
    assert jnp.shape(loaded["layers"]["mlp"]["experts"]["gate"]["kernel"].codes)[:2] == (3, 4)
