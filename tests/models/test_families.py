"""A config.json is read whole or refused by name, in the spelling of transformers 4 and of 5."""

import math
import random
from dataclasses import replace

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING

from sftjax.config import UserError
from sftjax.models.config import Clamp, DecoderConfig, Experts, Rope
from sftjax.models.families import FAMILIES, config_from_hf
from sftjax.models.families.common import ACTIVATIONS

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))

# what a family is whatever its file says
NORMS = {"norm_offset": True}
FIXED = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "gemma": NORMS,
    "gemma2": NORMS | {"post_norms": True},
    "gemma3_text": NORMS | {"post_norms": True, "qk_norm": "head"},
    "olmo2": {"qk_norm": "all", "pre_norms": False, "post_norms": True},
    "phi3": {"fused_qkv": True, "fused_mlp": True},
    "qwen3_moe": {"qk_norm": "head"},
    "gpt_oss": {"sinks": True},
}
# every key that changes the computation; a family draws those that its class has
DRAWN = {
    "vocab_size": range(10, 99),
    "num_key_value_heads": (1, 2),
    "head_dim": (4, 8, 16),
    "num_hidden_layers": (1, 2, 3, 4),
    "max_position_embeddings": (64, 4096),
    "tie_word_embeddings": (True, False),
    "rms_norm_eps": (1e-5, 1e-6),
    "hidden_act": ("silu", "gelu_pytorch_tanh"),
    "hidden_activation": ("gelu", "gelu_pytorch_tanh"),
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "qkv_bias": (True, False),
    "sliding_window": (5, 8),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 2, 3),
    "no_rope_layer_interval": (1, 2, 3),
    "query_pre_attn_scalar": (16, 24),
    "attn_logit_softcapping": (None, 50.0),
    "final_logit_softcapping": (None, 30.0),
    "embedding_multiplier": (1, 12.0),
    "attention_multiplier": (0.125, 0.5),
    "residual_multiplier": (0.22, 1.0),
    "logits_scaling": (8, 1.0),
    "num_experts": (4, 6),
    "num_local_experts": (4, 6),
    "num_experts_per_tok": (1, 4),
    "norm_topk_prob": (True, False),
    "moe_intermediate_size": (8, 12),
    "shared_expert_intermediate_size": (8, 20),
    "swiglu_alpha": (1.0, 1.702),
    "swiglu_limit": (0.5, 7.0),
}
REFUSED_KEYS = {"gemma3_text": ["attn_logit_softcapping"], "phi3": ["attention_bias"], "qwen2_moe": ["attention_bias"]}
REFUSED_KEYS |= {"gpt_oss": ["hidden_act"]}


def raw(model_type="llama", **changes):
    return {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture]} | SHAPE | changes


def random_config(rng, family):
    """What transformers itself writes for a random choice of every key that matters."""
    default = CONFIG_MAPPING[family]()
    drawn = {key: rng.choice(choices) for key, choices in DRAWN.items() if hasattr(default, key)}
    for key in REFUSED_KEYS.get(family, ()):
        drawn.pop(key, None)
    heads = rng.choice([2, 4, 6])
    drawn |= {"hidden_size": heads * rng.choice([8, 12]), "num_attention_heads": heads}
    theta = rng.choice([1e4, 1e6])
    if family == "gemma3_text":
        drawn["rope_parameters"] = {"full_attention": turning(theta), "sliding_attention": turning(100.0)}
    else:
        drawn["rope_parameters"] = turning(theta)
    return CONFIG_MAPPING[family](architectures=[FAMILIES[family].architecture], **drawn, **TOKENS)


def turning(theta):
    return {"rope_type": "default", "rope_theta": theta}


def meant(family, theirs):
    """The DecoderConfig of a config of transformers, by its attributes."""

    def get(key, default=None):
        return getattr(theirs, key, default)

    layers, bias = theirs.num_hidden_layers, get("attention_bias", False)
    kinds = get("layer_types") or ["sliding_attention"] * layers
    given = theirs.rope_parameters
    by_kind = {
        kind: Rope(p["rope_theta"], p["rope_type"], p.get("factor", 1.0)) for kind, p in given.items() if isinstance(p, dict)
    }
    if family == "gemma3_text" and by_kind["full_attention"].kind == "linear":  # its positions are the extended ones
        full = by_kind["full_attention"]
        by_kind["full_attention"] = replace(full, original_max_positions=int(theirs.max_position_embeddings // full.factor))
    plain = None if by_kind else Rope(given["rope_theta"], given["rope_type"], given.get("factor", 1.0))
    if plain and plain.kind == "yarn":
        stretched = 0.1 * math.log(plain.factor) + 1
        original, truncate = given["original_max_position_embeddings"], given["truncate"]
        plain = replace(plain, original_max_positions=original, attention_factor=stretched, truncate=truncate)
    turned = [by_kind.get(kind, plain) for kind in kinds]
    scale, width = get("query_pre_attn_scalar"), theirs.hidden_size
    experts = None
    if number := get("num_experts") or get("num_local_experts"):
        inner, shared = get("moe_intermediate_size", theirs.intermediate_size), get("shared_expert_intermediate_size", 0)
        experts = Experts(number, theirs.num_experts_per_tok, inner, get("norm_topk_prob", True), shared)
        if limit := get("swiglu_limit"):
            experts = replace(experts, bias=True, fused=True, clamp=Clamp(theirs.swiglu_alpha, limit))
    return DecoderConfig(
        vocab=theirs.vocab_size,
        width=width,
        mlp_width=theirs.intermediate_size,
        layers=layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=get("head_dim") or width // theirs.num_attention_heads,
        max_positions=theirs.max_position_embeddings,
        tied=theirs.tie_word_embeddings,
        windows=tuple(get("sliding_window") if kind == "sliding_attention" else None for kind in kinds),
        ropes=tuple(rope if turns else None for rope, turns in zip(turned, get("no_rope_layers", [1] * layers))),
        attn_scale=get("attention_multiplier", scale and scale**-0.5),
        attn_softcap=get("attn_logit_softcapping"),
        logit_softcap=get("final_logit_softcapping"),
        norm_eps=theirs.rms_norm_eps,
        embed_scale=width**0.5 if "gemma" in family else get("embedding_multiplier", 1.0),
        residual_scale=get("residual_multiplier", 1.0),
        logit_scale=1 / get("logits_scaling", 1.0),
        activation=ACTIVATIONS[get("hidden_activation") or theirs.hidden_act],
        mlp_bias=get("mlp_bias", False),
        experts=experts,
        init_std=theirs.initializer_range,
        **{"qkv_bias": get("qkv_bias", bias), "o_bias": bias} | FIXED.get(family, {}),
    )


def spelled_out(config):
    """With a window and a rotary embedding for every layer, and nothing that no layer reads."""
    every = (None,) * config.layers
    return replace(config, rope=Rope(), ropes=config.ropes or (config.rope,) * config.layers, windows=config.windows or every)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read_as_transformers_reads_it(family):
    rng = random.Random(family)
    for _ in range(40):
        theirs = random_config(rng, family)
        assert spelled_out(config_from_hf(theirs.to_dict())) == meant(family, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    sparse = raw(family, hidden_size=64, num_attention_heads=32)
    del sparse["num_key_value_heads"]
    assert spelled_out(config_from_hf(sparse)) == meant(family, CONFIG_MAPPING[family](**sparse, **TOKENS))


LINEAR = {"rope_type": "linear", "factor": 8.0}
GPT_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
FOUR = [
    ("gemma", {"hidden_act": "gelu", "rope_theta": 500.0, "head_dim": 8}),
    ("gemma2", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 500.0, "rope_scaling": None}),
    ("gemma3_text", {"rope_theta": 500.0, "rope_local_base_freq": 70.0, "rope_scaling": LINEAR, "sliding_window_pattern": 2}),
    ("gemma3_text", {"rope_scaling": LINEAR, "sliding_window": 7, "num_hidden_layers": 13}),
    ("olmo2", {"rope_theta": 500.0, "rope_scaling": LINEAR}),
    ("granite", {"rope_theta": 500.0, "rope_scaling": LINEAR, "num_key_value_heads": None}),
    ("smollm3", {"rope_theta": 500.0, "no_rope_layers": [1, 0, 1, 1, 1], "use_sliding_window": True, "sliding_window": 7}),
    ("smollm3", {"no_rope_layers": [1, 1, 1]}),
    ("phi3", {"rope_theta": 500.0, "sliding_window": 2047, "rope_scaling": None, "original_max_position_embeddings": 64}),
    ("mixtral", {"rope_theta": 500.0, "sliding_window": None, "num_local_experts": 3}),
    ("qwen2_moe", {"rope_theta": 500.0, "use_sliding_window": True, "max_window_layers": 2, "mlp_only_layers": []}),
    ("qwen3_moe", {"rope_theta": 500.0, "num_experts": 9, "head_dim": 16, "max_window_layers": 48, "sliding_window": None}),
    ("gpt_oss", {"rope_theta": 500.0, "rope_scaling": GPT_YARN, "swiglu_limit": 5.0, "experts_per_token": 7, "num_experts": 9}),
    ("gpt_oss", {"rope_scaling": None, "layer_types": ["full_attention"] * 3, "attention_bias": False}),
]


@pytest.mark.parametrize("family, changes", FOUR)
def test_the_spelling_of_transformers_4_is_read_as_transformers_5_reads_it(family, changes):
    given = raw(family, **changes)
    theirs = CONFIG_MAPPING[family].from_dict(
        {key: value.copy() if isinstance(value, dict) else value for key, value in given.items()}
    )
    assert spelled_out(config_from_hf(given)) == meant(family, theirs)


REACH = [  # of the hub's own configs, and as their cards say that they are extended
    ("Llama-3.2", "llama", 131_072, {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}, 131_072),
    ("Llama-3.1", "llama", 131_072, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131_072),
    ("gemma-3-4b", "gemma3_text", 131_072, LINEAR, 131_072),
    ("gpt-oss-20b", "gpt_oss", 131_072, {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}, 131_072),
    ("Qwen3-8B", "qwen3", 40_960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
    ("Qwen2.5-7B", "qwen2", 32_768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
    ("vicuna-7b-v1.5-16k", "llama", 4096, {"type": "linear", "factor": 4.0}, 16_384),
    ("a Llama 2 by dynamic NTK", "llama", 4096, {"type": "dynamic", "factor": 2.0}, 8192),
    ("Qwen3-8B as it comes", "qwen3", 40_960, None, 40_960),
]


@pytest.mark.parametrize("name, family, positions, scaling, reach", REACH, ids=lambda x: x if isinstance(x, str) else "")
def test_a_model_reaches_as_far_as_it_says(name, family, positions, scaling, reach):
    if scaling and scaling.get("rope_type") == "llama3":
        scaling = scaling | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert config_from_hf(raw(family, max_position_embeddings=positions, rope_scaling=scaling)).reach == reach


# where transformers reads a null as something; any other it refuses, or reads as if the key were absent
SAY_SOMETHING = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads")
MORE = ("initializer_range", "rope_theta", "rope_parameters", "layer_types", "no_rope_layers", "attention_dropout")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_null_is_as_good_as_absent(family):
    default = CONFIG_MAPPING[family]()
    for key in {*DRAWN, *MORE} - {*SAY_SOMETHING, "vocab_size", "num_hidden_layers"}:
        if hasattr(default, key):
            absent = {name: value for name, value in raw(family).items() if name != key}
            assert config_from_hf(absent | {key: None}) == config_from_hf(absent), key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_null_that_says_something_is_read_as_transformers_reads_it(family):
    default = CONFIG_MAPPING[family]()
    for key in (key for key in SAY_SOMETHING if hasattr(default, key)):
        given = raw(family) | {key: None}
        try:
            theirs = CONFIG_MAPPING[family](**given, **TOKENS)
        except StrictDataclassFieldValidationError:
            continue
        if key == "sliding_window" and "sliding_attention" in (getattr(theirs, "layer_types", None) or ()):
            continue  # a window of no width, which REFUSED has
        if theirs.num_key_value_heads:  # else transformers makes no model of it
            assert spelled_out(config_from_hf(given)) == meant(family, theirs), key


def test_dropout_of_a_checkpoint_changes_nothing():
    """Granite 3 says 0.1."""
    for family in FAMILIES:
        dropout = {"attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
        assert config_from_hf(raw(family) | dropout) == config_from_hf(raw(family))


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


LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_longrope_by_all_its_names(name):
    """arXiv:2402.13753: the square root of 1 + ln(factor) / ln(original)."""
    own = {"original_max_position_embeddings": 32, "max_position_embeddings": 128}
    rope = config_from_hf(raw("phi3", rope_scaling=LONG | {"type": name}, **own)).rope
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("longrope", 4.0, 32)
    assert config_from_hf(raw("phi3", rope_scaling=LONG | {"type": name}, **own)).reach == 128
    assert rope.attention_factor == pytest.approx(1.4**0.5) and rope.short_factor[5] == 1.5 and rope.long_factor[5] == 6.0
    part = raw("phi3", rope_parameters=LONG | {"partial_rotary_factor": 0.5, "short_factor": [1, 1, 1], "long_factor": [1, 2, 3]})
    assert config_from_hf(part).rope.partial == 0.5


REFUSED = [
    ({"model_type": "gpt2"}, f"model_type='gpt2' is not supported; supported are {', '.join(FAMILIES)}"),
    ({"model_type": None}, "model_type=None"),
    (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        "'gemma3' is not supported, for it takes more than text",
    ),
    ({"architectures": ["LlamaForTokenClassification"]}, "needs LlamaForCausalLM or LlamaForSequenceClassification"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
    ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"head_dim": "8"}, "head_dim='8'"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' is not a positive number"),
    ({"model_type": "qwen2", "max_window_layers": -1}, "max_window_layers=-1 is not a whole number, at least 0"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ({"attention_bias": "yes"}, "attention_bias='yes'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.short_factor needs 6 positive numbers"),
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
    ({"model_type": "phi3", "lm_head_bias": True}, "lm_head_bias"),
    (
        {"model_type": "phi3", "rope_scaling": LONG | {"short_factor": [1.0]}},
        "rope_scaling.short_factor needs 6 positive numbers",
    ),
    ({"model_type": "phi3", "partial_rotary_factor": 0.6}, "partial_rotary_factor=0.6 turns 7 of 12"),
    ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 8 experts"),
    ({"model_type": "qwen2_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2.*all layers must have experts"),
    ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers=.0..*all layers must have experts"),
    ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention=True.*gemma"),
    ({"model_type": "gemma2", "hidden_activation": "relu"}, "hidden_activation='relu'"),
    ({"model_type": "gemma2", "sliding_window": None}, "sliding_window does not give a window"),
    ({"model_type": "gemma2", "attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0 is not a positive number"),
    ({"model_type": "gemma2", "query_pre_attn_scalar": "8"}, "query_pre_attn_scalar='8'"),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0.*gemma3_text"),
    ({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type is not supported"),
    ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
    (
        {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 0}},
        "rope_scaling.factor=0 is not a positive number",
    ),
    (
        {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"rope_type": "mrope"}}},
        "rope_parameters.sliding_attention.rope_type='mrope'",
    ),
    ({"model_type": "gemma3_text", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (
        {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
        "rope_parameters.full_attention.partial_rotary_factor=0.5",
    ),
    ({"model_type": "gpt_oss", "hidden_act": "gelu"}, "hidden_act='gelu'.*gpt_oss"),
    ({"model_type": "gpt_oss", "swiglu_limit": 0}, "swiglu_limit=0 is not a positive number"),
    ({"model_type": "gpt_oss", "sliding_window": None}, "sliding_window does not give a window"),
    ({"model_type": "gpt_oss", "num_experts_per_tok": 200}, "num_experts_per_tok=200 is more than the 128 experts"),
    ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "fp8"}}, "quantization_config.*fp8"),
    ({"model_type": "olmo2", "layer_types": ["full_attention"] * 3}, "layer_types.*olmo2"),
    ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling=0"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for num_hidden_layers=3"),
    ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
    ({"model_type": "smollm3", "layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
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
