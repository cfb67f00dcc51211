"""A config.json is read whole or refused by name, in the spelling of transformers 4 and of 5."""

import random

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from sftjax.config import UserError
from sftjax.models.config import Rope
from sftjax.models.families import FAMILIES, config_from_hf

CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def raw(model_type="llama", **changes):
    return {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture]} | SHAPE | changes


def random_config(rng, family):
    """What transformers itself writes for a random choice of every key that matters."""
    heads = rng.choice([2, 4, 6])
    changes = {
        "vocab_size": rng.randint(10, 99),
        "hidden_size": heads * rng.choice([8, 12]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, 2, heads]),
        "head_dim": rng.choice([4, 8, 16]),
        "num_hidden_layers": rng.randint(1, 4),
        "max_position_embeddings": rng.choice([64, 4096]),
        "tie_word_embeddings": rng.random() < 0.5,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "rope_theta": rng.choice([1e4, 1e6]),
    }
    if family in ("llama", "qwen3"):
        changes["attention_bias"] = rng.random() < 0.5
    if family == "llama":
        changes["mlp_bias"] = rng.random() < 0.5
    if family == "mistral":
        changes["sliding_window"] = rng.choice([None, 8])
    if family in ("qwen2", "qwen3"):
        changes |= {"use_sliding_window": rng.random() < 0.5, "sliding_window": 8, "max_window_layers": rng.randint(0, 3)}
    return CLASSES[family](architectures=[FAMILIES[family].architecture], **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read_as_transformers_reads_it(family):
    rng = random.Random(family)
    for _ in range(40):
        theirs = random_config(rng, family)
        ours = config_from_hf(theirs.to_dict())
        assert (ours.vocab, ours.width, ours.mlp_width) == (theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size)
        assert (ours.layers, ours.heads, ours.kv_heads) == (
            theirs.num_hidden_layers,
            theirs.num_attention_heads,
            theirs.num_key_value_heads,
        )
        assert (ours.head_dim, ours.tied) == (theirs.head_dim, theirs.tie_word_embeddings)
        assert (ours.norm_eps, ours.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
        assert ours.rope == Rope(theirs.rope_parameters["rope_theta"])
        assert ours.qk_norm == ("head" if family == "qwen3" else None)
        bias = getattr(theirs, "attention_bias", False)
        assert (ours.qkv_bias, ours.o_bias) == (bias or family == "qwen2", bias)
        assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
        kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * ours.layers
        windows = tuple(getattr(theirs, "sliding_window", None) if kind == "sliding_attention" else None for kind in kinds)
        assert (ours.windows or (None,) * ours.layers) == windows


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    sparse = raw(family, hidden_size=64, num_attention_heads=32)
    del sparse["num_key_value_heads"]
    theirs, ours = CLASSES[family](**sparse), config_from_hf(sparse)
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied == theirs.tie_word_embeddings and ours.norm_eps == theirs.rms_norm_eps
    if family == "qwen3":
        assert ours.head_dim == theirs.head_dim == 128
    if family == "mistral":
        assert ours.windows == (theirs.sliding_window,) * 3


ROPES = [
    ({"rope_type": "default"}, Rope(500.0)),
    ({"type": "linear", "factor": 2}, Rope(500.0, "linear", 2.0)),
    ({"rope_type": "dynamic", "factor": 4.0}, Rope(500.0, "dynamic", 4.0, 128)),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        Rope(500.0, "llama3", 8.0, 32, 1.0, 4.0),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
        Rope(500.0, "yarn", 4.0, 32, attention_factor=1.1386294361119891, truncate=False),
    ),
    (
        {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2, "finetuned": True},
        Rope(500.0, "yarn", 4.0, 128, beta_fast=16.0, beta_slow=2.0, attention_factor=1.1386294361119891 / 1.0693147180559945),
    ),
    ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}, Rope(500.0, "yarn", 4.0, 128)),
]


@pytest.mark.parametrize("scaling, rope", ROPES, ids=lambda x: x.get("rope_type", x.get("type")) if isinstance(x, dict) else "")
def test_both_spellings_of_rope_mean_the_same(scaling, rope):
    four = raw(max_position_embeddings=128, rope_theta=500.0, rope_scaling=scaling)
    five = raw(max_position_embeddings=128, rope_parameters=scaling | {"rope_theta": 500.0})
    assert config_from_hf(four).rope == config_from_hf(five).rope == rope


def test_the_original_length_beside_rope_scaling_wins():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert config_from_hf(raw(rope_scaling=scaling, original_max_position_embeddings=16)).rope.original_max_positions == 16


def test_layer_types_choose_the_windows():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = config_from_hf(raw("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3, layer_types=types))
    assert config.windows == (8, None, 8)


REFUSED = [
    ({"model_type": "gpt2"}, "model_type='gpt2'.*supported are llama, mistral, qwen2, qwen3"),
    ({"model_type": None}, "model_type=None"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*needs LlamaForCausalLM"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
    ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"head_dim": "8"}, "head_dim='8'"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ({"attention_bias": "yes"}, "attention_bias='yes'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type='longrope'"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_scaling.rope_type='mrope'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor='2'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "rope_scaling.beta_fast=3"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias=True.*mistral"),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types.*mistral"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
    ({"model_type": "qwen2", "use_mrope": True}, "use_mrope"),
    ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias"),
    ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 3}, "linear_attention"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_what_is_not_supported_is_refused_by_name(changes, message):
    kind = changes.get("model_type", "llama")
    given = raw(kind if kind in FAMILIES else "llama") | changes
    with pytest.raises(UserError, match=message):
        config_from_hf(given)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_to_hf_changes_only_the_vocabulary(family):
    from dataclasses import replace

    given = raw(family)
    config = config_from_hf(given)
    assert FAMILIES[family].config_to_hf(config, given) == given
    assert FAMILIES[family].config_to_hf(replace(config, vocab=70), given) == given | {"vocab_size": 70}
