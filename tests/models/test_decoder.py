"""The decoder says what transformers says, and says it however it is padded, packed, scanned, recomputed, cut or cached."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, batch, config, params, pieces
from tokenizers import Tokenizer

from sftjax.data.batch import Batch
from sftjax.hf.load import load_config, load_params
from sftjax.hf.verify import score
from sftjax.losses import masked_xent
from sftjax.models.config import Rope
from sftjax.models.decoder import Decoder, forward, init_cache
from sftjax.weights import select
from sftjax.weights.kinds import matmul

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": None,  # some have one beyond this vocabulary
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 20}
LOCAL = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 20}
TURNS = {"rope_type": "default", "rope_theta": 100.0}
BASES = {
    "rope_parameters": {"full_attention": TURNS | {"rope_theta": 3000.0}, "sliding_attention": TURNS},
    "sliding_window_pattern": 2,
}
TWO_BASES = {"full_attention": YARN | {"rope_theta": 3000.0}, "sliding_attention": TURNS}
SCALES = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 2.5}
NOPE = {"no_rope_layers": [0, 1, 0]}


def long(n):
    """longrope that tells every one of n frequencies from the others."""
    return {"rope_type": "longrope", "short_factor": [1 + 0.1 * i for i in range(n)], "long_factor": [2.0 + i for i in range(n)]}


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28}
GPT = {"num_experts_per_tok": 2, "sliding_window": 20, "swiglu_limit": 0.6}  # a limit that half of the gates reach

CASES = {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-mqa-linear": (
        "llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    ),
    "llama-dynamic": ("llama", {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama-yarn-mha": ("llama", {"rope_parameters": YARN, "num_key_value_heads": 4}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}}),
    "mistral-window": ("mistral", {"sliding_window": 20}),
    "mistral-gelu-yarn": (
        "mistral",
        {"sliding_window": None, "hidden_act": "gelu", "rope_parameters": YARN | {"attention_factor": 1.3}},
    ),
    "qwen2-upper-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1, "head_dim": 10}),
    "qwen2-layer-types": ("qwen2", MIXED | {"sliding_window": 130, "head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-tied": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-biases-windows": ("qwen3", MIXED | {"sliding_window": 20, "attention_bias": True}),
    "gemma-tied-mqa": ("gemma", {"tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma2-tied": ("gemma2", {"tie_word_embeddings": True, "head_dim": 20, "sliding_window": 20, **CAPS}),
    "gemma2-biases-no-cap": ("gemma2", LOCAL | {"attention_bias": True, "attn_logit_softcapping": None}),
    "gemma2-mha-linear": (
        "gemma2",
        LOCAL
        | CAPS
        | {"num_key_value_heads": 4, "hidden_activation": "gelu", "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    ),
    "gemma3-tied-two-bases": ("gemma3_text", LOCAL | {"tie_word_embeddings": True, "rope_parameters": TWO_BASES}),
    "gemma3-capped-mqa": (
        "gemma3_text",
        {"sliding_window": 30, "num_key_value_heads": 1, "final_logit_softcapping": 3.0} | BASES,
    ),
    "gemma3-biases": ("gemma3_text", {"sliding_window": 130, "attention_bias": True, "head_dim": 20} | BASES),
    "olmo2": ("olmo2", {"head_dim": 10}),
    "olmo2-tied-mqa-yarn": ("olmo2", {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_parameters": YARN}),
    "olmo2-mha-biases": ("olmo2", {"num_key_value_heads": 4, "attention_bias": True, "head_dim": 20}),
    "granite": ("granite", SCALES),
    "granite-tied-biases": ("granite", SCALES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "granite-mqa-llama3": ("granite", {"num_key_value_heads": 1, "attention_multiplier": 0.1, "rope_parameters": LLAMA3}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "head_dim": 20}),
    "smollm3-tied-windows": ("smollm3", NOPE | {"use_sliding_window": True, "sliding_window": 20, "tie_word_embeddings": True}),
    "smollm3-biases-yarn": ("smollm3", NOPE | {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}),
    "phi3-window": ("phi3", {"sliding_window": 20, "head_dim": 10, "tie_word_embeddings": True}),
    "phi3-longrope": ("phi3", {"rope_parameters": long(5), "original_max_position_embeddings": 64, "head_dim": 10}),
    "phi3-longrope-partial": (
        "phi3",
        {"rope_parameters": long(8) | {"partial_rotary_factor": 0.8, "attention_factor": 1.2}, "head_dim": 20}
        | {"original_max_position_embeddings": 96, "num_key_value_heads": 1, "num_attention_heads": 2},
    ),
    "mixtral-window": ("mixtral", MOE | {"sliding_window": 20, "num_local_experts": 5, "head_dim": 10}),
    "mixtral-one-of-three-tied": (
        "mixtral",
        MOE | {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "mixtral-gelu-all": ("mixtral", MOE | {"num_local_experts": 4, "num_experts_per_tok": 4, "hidden_act": "gelu"}),
    "qwen2_moe-windows": (
        "qwen2_moe",
        MOE | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2, "num_experts": 6, "head_dim": 20},
    ),
    "qwen2_moe-normed-tied": ("qwen2_moe", MOE | {"norm_topk_prob": True, "qkv_bias": False, "num_experts": 8}),
    "qwen2_moe-one": ("qwen2_moe", MOE | {"num_experts": 7, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "qwen3_moe-biases": (
        "qwen3_moe",
        MOE | {"attention_bias": True, "norm_topk_prob": True, "head_dim": 20, "num_experts": 8},
    ),
    "qwen3_moe-window-tied": (
        "qwen3_moe",
        MOE | {"use_sliding_window": True, "sliding_window": 20, "tie_word_embeddings": True, "num_experts": 5},
    ),
    "qwen3_moe-mha": ("qwen3_moe", MOE | {"num_key_value_heads": 4, "num_experts": 6, "num_experts_per_tok": 5}),
    "gpt_oss-yarn": (
        "gpt_oss",
        GPT | {"rope_parameters": YARN | {"truncate": False}, "num_local_experts": 6, "head_dim": 20},
    ),
    "gpt_oss-one-kind-tied": (
        "gpt_oss",
        GPT
        | {"layer_types": ["sliding_attention"] * 3, "num_local_experts": 3, "num_experts_per_tok": 1, "attention_bias": False}
        | {"tie_word_embeddings": True},
    ),
    "gpt_oss-mha-all": ("gpt_oss", GPT | {"num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 4}),
}
T = 160
ROWS = [[160], [100], [-70, 90], [70, 41, 49]]  # full, right-padded, left-padded, packed


def transformers_model(family, changes):
    import torch
    import transformers

    torch.manual_seed(0)
    changes = dict(changes)
    scaling = changes.pop("rope_parameters", {"rope_type": "default"})
    if not any(isinstance(value, dict) for value in scaling.values()):
        scaling = {"rope_theta": 10_000.0} | scaling
    hf_config = transformers.CONFIG_MAPPING[family](**SHAPE | changes, rope_parameters=scaling)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):  # norms are ones and biases zeros otherwise
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("sinks"):
                parameter.add_(torch.randn_like(parameter))
    return model


def alone(model, b):
    """transformers' logits of every segment in a sequence of its own: [(row, where, [n, V])]."""
    import torch

    out = []
    # shortest first: transformers' dynamic rope remembers the longest sequence it has seen
    for row, where in sorted(pieces(b), key=lambda p: p[1].stop - p[1].start):
        with torch.no_grad():
            ids = torch.tensor(np.asarray(b.tokens)[row, where])[None]
            out.append((row, where, model(input_ids=ids).logits[0].numpy()))
    return out


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_padded_and_packed(name, tmp_path):
    family, changes = CASES[name]
    model = transformers_model(family, changes)
    model.save_pretrained(tmp_path)
    c = load_config(tmp_path)
    b = batch(ROWS, T, vocab=c.vocab)
    ours = np.asarray(jax.jit(lambda p: matmul(*forward(Decoder(c))(p, b)))(load_params(tmp_path, c)))
    for row, where, theirs in alone(model, b):
        error = np.abs(ours[row, where] - theirs).max() / np.abs(theirs).max()
        assert error < 1e-4, f"row {row}, tokens {where.start}:{where.stop}: {error:.1e}"


@pytest.mark.parametrize(
    "name, nll, stories", [("stories260K", "nll_40_tinystories", 40), ("babyllama-tok105", "nll_30_tinystories", 30)]
)
def test_real_checkpoints_give_their_golden_numbers(name, nll, stories, shared):
    folder = shared / "data" / "hf_models"
    golden = json.loads((folder / "golden.json").read_text())[name]
    c = load_config(folder / name)
    p = load_params(folder / name, c)
    ids = jnp.asarray([golden["prompt_ids"]], jnp.int32)
    ones, positions = jnp.ones_like(ids), jnp.arange(ids.shape[1])[None]
    last = matmul(*forward(Decoder(c))(p, Batch(ids, ones, ones, positions)))[0, -1]
    np.testing.assert_allclose(last[:8], golden["last_logits_first8"], rtol=1e-4, atol=1e-4)
    assert int(last.argmax()) == golden["last_argmax"]

    encode = Tokenizer.from_file(str(folder / name / "tokenizer.json")).encode
    texts = json.loads((shared / "data" / "pretrain_text" / "tinystories_1000.json").read_text())[:stories]
    logps = score(p, c, [encode(text).ids[: c.max_positions] for text in texts])
    assert logps.size == golden["nll_tokens"]
    np.testing.assert_allclose(-logps.mean(), golden[nll], rtol=1e-5)


# -- one model computed in many ways: grouped heads, q/k norms, biases, norms after, caps, scales, and layers that differ

MIX = config(
    qk_norm="head",
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    windows=(9, None, 5),
    ropes=(Rope(100.0), Rope(), None),
    post_norms=True,
    norm_offset=True,
    sinks=True,
    attn_softcap=3.0,
    logit_softcap=5.0,
    embed_scale=3.0,
    residual_scale=0.5,
)
PACKED = batch([[20, 15], [-7, 30], [5, 9, 16]], 40)


def value_and_grad(model, p):
    loss = masked_xent(forward(model))
    return jax.jit(jax.value_and_grad(lambda p: loss(p, PACKED, None)[0]))(p)


@pytest.fixture(scope="module")
def reference():
    p = params(MIX)
    return p, *value_and_grad(Decoder(MIX), p)


@pytest.mark.parametrize(
    "options", [{"scan": False}, {"remat": "minimal"}, {"remat": "block", "scan": False}, {"remat": "offload"}], ids=str
)
def test_unrolled_and_rematerialised_change_nothing(options, reference):
    p, loss, grads = reference
    again, grads_again = value_and_grad(Decoder(MIX, **options), p)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert_trees_close(grads_again, grads)


def test_rematerialisation_saves_less(reference):
    p, *_ = reference

    def saved(remat):
        loss = masked_xent(forward(Decoder(MIX, remat=remat)))
        _, pull = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, PACKED, None)[0], p), p)
        return sum(x.size for x in jax.tree.leaves(pull))

    assert saved("none") > saved("minimal") > saved("block")


def test_a_stack_cut_in_two_is_the_same_model(reference):
    p, loss, grads = reference
    cut = select.cut(p, 1)
    assert cut["lower"]["attn"]["q"]["kernel"].shape[0] == 2
    again, grads_again = value_and_grad(Decoder(MIX, lower=2), cut)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert_trees_close(select.uncut(grads_again), grads)
    jax.tree.map(np.testing.assert_array_equal, select.uncut(cut), p)
    assert select.uncut(p) is p and select.cut(p, 3) is p


def test_nothing_flows_backward_in_time_nor_between_segments(reference):
    p, *_ = reference
    run = jax.jit(lambda tokens: forward(Decoder(MIX))(p, PACKED._replace(tokens=tokens)).hidden)
    before, real = np.asarray(run(PACKED.tokens)), np.asarray(PACKED.segments) > 0
    # to the end of the token's own segment, which two windowed layers and a full one reach; padding reaches nothing
    for row, t, end in [(0, 11, 20), (0, 20, 35), (1, 3, 3), (1, 25, 37), (2, 6, 14), (2, 20, 30)]:
        after = np.asarray(run(PACKED.tokens.at[row, t].set((PACKED.tokens[row, t] + 1) % 64)))
        reached = np.zeros_like(real)
        reached[row, t:end] = True
        np.testing.assert_array_equal((before != after).any(-1) & real, reached)


def test_compute_dtype_is_that_of_the_hidden_states(reference):
    p, *_ = reference
    exact = forward(Decoder(MIX))(p, PACKED).hidden
    half = forward(Decoder(MIX, jnp.bfloat16))(p, PACKED).hidden
    assert half.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    kept = np.asarray(PACKED.segments) > 0
    assert np.abs(half.astype(np.float32) - exact)[kept].mean() < 0.03 * np.abs(exact)[kept].mean()


@pytest.mark.parametrize(
    "c",
    [
        MIX,
        config(windows=(6, 6, 6), rope=Rope(kind="llama3", factor=4.0, original_max_positions=8)),
        config(qk_norm="all", pre_norms=False, post_norms=True, tied=True, logit_scale=0.5),
    ],
)
def test_cached_decoding_equals_full(c):
    p, model, lengths, T, S = params(c), Decoder(c), np.array([9, 4]), 16, 20
    b = batch([[T], [T]], T)
    full = np.asarray(jax.jit(lambda: forward(model)(p, b).hidden)())

    @jax.jit
    def run(tokens, positions, cache):
        return model.apply({"params": p}, tokens, jnp.ones_like(tokens), positions, cache)[:2]

    # the prompts, right-padded: what the shorter writes past its end is overwritten before it is seen
    hidden, cache = run(b.tokens[:, :9], b.positions[:, :9], init_cache(c, 2, S, jnp.float32))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :n], full[row, :n], atol=1e-5)
    for step in range(6):
        at = jnp.asarray(lengths + step)[:, None]
        hidden, cache = run(jnp.take_along_axis(b.tokens, at, 1), at, cache)
        for row, t in enumerate(lengths + step):
            np.testing.assert_allclose(hidden[row, 0], full[row, t], atol=1e-5)
