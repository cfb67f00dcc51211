"""PEFT's adapters of every kind, in and out: torch says of each what we say, tied or not; nothing is lost on the way."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import tree
from sftjax.config import UserError
from sftjax.hf.load import load_config, load_params, resize_embeddings
from sftjax.hf.peft import load_adapter, save_adapter, saved_modules
from sftjax.hf.verify import score
from sftjax.weights.kinds import Adapter, Dora, LowRank, Tokens
from sftjax.weights.lora import lora
from sftjax.weights.quantize import Int8, Nf4, int8, nf4
from sftjax.weights.targets import saved
from sftjax.weights.tokens import tokens

ATOL = 1e-5
MODELS = {"llama": {"tie_word_embeddings": False}, "qwen3": {"tie_word_embeddings": True}}


@pytest.fixture(scope="module", params=MODELS)
def source(request, torch_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    torch_model(request.param, **MODELS[request.param]).save_pretrained(directory)
    return directory


@pytest.fixture
def base(source):
    config = load_config(source)
    return load_params(source, config), config


def tied(source):
    return load_config(source).tied


def of_torch(source, vocab=None):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    if vocab:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    return model


def made(source, out, vocab=None, **options):
    """An adapter of PEFT's own in `out`, everything that trains in it moved."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied models
        adapted = get_peft_model(of_torch(source, vocab), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn_like(parameter)
                    parameter.add_(0.1 * noise * parameter if "magnitude" in name else 0.05 * noise)
            tie(adapted)
        adapted.save_pretrained(out)
    return adapted


def tie(adapted):
    """The head's own parts made the embedding's, where a tied model has both."""
    tensors = {name.removeprefix("base_model.model."): parameter for name, parameter in adapted.named_parameters()}
    pairs = {
        "lora_B.default.weight": ("lora_embedding_A.default", True),
        "lora_A.default.weight": ("lora_embedding_B.default", True),
        "modules_to_save.default.weight": ("modules_to_save.default.weight", False),
    }
    for end, (embed, flip) in pairs.items():
        head, embed = tensors.get(f"lm_head.{end}"), tensors.get(f"model.embed_tokens.{embed}")
        if adapted.config.tie_word_embeddings and head is not None and embed is not None:
            head.copy_(embed.T if flip else embed)


def with_torch(source, adapter, vocab=None):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(of_torch(source, vocab), adapter).eval()


ENDS = ["embed_tokens", "lm_head"]
THEIRS = {
    "rslora": {"use_rslora": True},
    "patterns by layer": {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5}, "alpha_pattern": {"layers.2.mlp.down_proj": 1}},
    "dora": {"use_dora": True},
    "dora with ranks by layer": {"use_dora": True, "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5}},
    "dora in some layers": {"use_dora": True, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "both ends": {"target_modules": ["q_proj", *ENDS]},
    "both ends of rank patterns": {"target_modules": ["q_proj", *ENDS], "rank_pattern": {"embed_tokens": 5, "lm_head": 5}},
    "both ends saved": {"modules_to_save": ENDS},
    "norms and a linear saved": {"modules_to_save": ["norm", "o_proj"]},
    "a linear of one layer saved": {"modules_to_save": ["layers.1.self_attn.o_proj"]},
    "tokens": {"trainable_token_indices": [9, 3, 33]},
    "tokens of both ends": {"trainable_token_indices": {"embed_tokens": [9, 3, 33], "lm_head": [9, 3, 33]}},
    "tokens and saved norms": {"trainable_token_indices": [9], "modules_to_save": ["input_layernorm"]},
}
UNTIED = {
    "embedding": {"target_modules": ["embed_tokens", "k_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "dora of both ends": {"target_modules": ENDS, "use_dora": True},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "other tokens for the head": {"trainable_token_indices": {"embed_tokens": [9], "lm_head": [3, 33]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [3, 33]}},
}


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_an_adapter_of_peft_says_here_what_it_says_there(options, source, base, torch_scores, rows, tmp_path):
    theirs = torch_scores(made(source, tmp_path, **options), rows)
    np.testing.assert_allclose(score(load_adapter(base[0], tmp_path), base[1], rows), theirs, atol=ATOL)
    assert np.abs(theirs - score(*base, rows)).max() > 0.01  # else the adapter proved nothing


@pytest.mark.parametrize("options", UNTIED.values(), ids=UNTIED)
def test_what_a_tied_model_cannot_mean_is_refused_there_alone(options, source, base, torch_scores, rows, tmp_path):
    theirs = torch_scores(made(source, tmp_path, **options), rows)
    if tied(source):
        with pytest.raises(UserError, match="makes two matrices of embed_tokens and lm_head"):
            load_adapter(base[0], tmp_path)
    else:
        np.testing.assert_allclose(score(load_adapter(base[0], tmp_path), base[1], rows), theirs, atol=ATOL)


def test_a_norm_of_two_meanings_is_the_one_that_the_model_has(torch_model, torch_scores, rows, tmp_path):
    source = tmp_path / "base"
    torch_model("gemma2").save_pretrained(source)
    config = load_config(source)
    params = load_params(source, config)
    theirs = torch_scores(made(source, tmp_path / "in", modules_to_save=["post_attention_layernorm"]), rows)
    loaded = load_adapter(params, tmp_path / "in")
    np.testing.assert_allclose(score(loaded, config, rows), theirs, atol=ATOL)
    assert np.abs(theirs - score(params, config, rows)).max() > 0.01
    norms = saved(params, saved_modules(tmp_path / "in"))
    assert norms == {"layers/attn_post_norm/scale"}
    save_adapter(loaded, config, form="peft", source=source, out=tmp_path / "out", saved=norms)
    np.testing.assert_allclose(torch_scores(with_torch(source, tmp_path / "out"), rows), theirs, atol=ATOL)


GROWN = {
    "copies": {},
    "tokens": {"trainable_token_indices": [9, 62]},
    "saved": {"modules_to_save": ENDS},
    "both ends": {"target_modules": ["q_proj", *ENDS]},
}


@pytest.mark.parametrize("options", GROWN.values(), ids=GROWN)
def test_an_adapter_of_a_grown_vocabulary_makes_its_own_room(options, source, base, torch_scores, rows, tmp_path):
    rows = [*rows, [62, 5, 63, 61]]
    theirs = torch_scores(made(source, tmp_path, vocab=64, **options), rows)
    params = load_adapter(base[0], tmp_path)
    assert params["embed"]["embedding"].shape[0] == 64
    np.testing.assert_allclose(score(params, base[1], rows), theirs, atol=ATOL)


@pytest.mark.parametrize("quantise, kind", [(nf4, Nf4), (int8, Int8)])
def test_an_adapter_goes_over_a_quantised_base(quantise, kind, source, base, tmp_path):
    made(source, tmp_path, use_dora=True, layers_to_transform=[1], layers_pattern="layers", modules_to_save=["v_proj"])
    quantisers = {"layers/attn/q/kernel": quantise, "layers/attn/v/kernel": quantise}
    attention = load_adapter(load_params(source, base[1], quantisers=quantisers), tmp_path)["layers"]["attn"]
    assert isinstance(attention["q"]["kernel"].base.base, kind) and isinstance(attention["v"]["kernel"], jax.Array)


def moved(params):
    """Every float32 array of the kinds moved, their bases left alone."""
    rng = np.random.default_rng(0)

    def leaf(path, w):
        match w:
            case LowRank():
                return LowRank(w.base, w.a + shift(w.a), w.b + shift(w.b), w.scale, w.dropout)
            case Dora():
                return Dora(leaf(path, w.base), w.magnitude * (1 + shift(w.magnitude)))
            case Tokens():
                return Tokens(w.base, w.rows + shift(w.rows), w.ids, w.axis)
            case Adapter():
                return Adapter(w.base, *(x + shift(x) for x in (w.down, w.down_bias, w.up, w.up_bias)))
        return w

    def shift(x):
        return jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32)

    return tree.map_leaves(leaf, params)


def changed(params, paths):
    rng = np.random.default_rng(1)
    return tree.map_leaves(lambda path, w: w + rng.normal(0, 0.1, w.shape).astype(np.float32) if path in paths else w, params)


LINEAR = ["q_proj", "down_proj"]
OURS = {
    "lora": {"targets": LINEAR},
    "rslora": {"targets": LINEAR, "rslora": True},
    "patterns": {"targets": LINEAR, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 3.0}},
    "dora": {"targets": LINEAR, "dora": True},
    "pissa": {"targets": LINEAR, "init": "pissa"},
    "olora": {"targets": LINEAR, "init": "olora"},
    "dora of pissa": {"targets": LINEAR, "init": "pissa", "dora": True},
    "embedding": {"targets": [*LINEAR, "embed_tokens"]},
}
BESIDE = {  # modules to save, tokens, vocabulary
    "alone": ((), (), None),
    "saved": (("o_proj", "norm", "q_norm|input_layernorm"), (), None),
    "tokens": ((), (3, 9), None),
    "ends saved": (("embed_tokens",), (), None),
    "new tokens": ((), (3, 62), 64),
    "grown": ((), (), 64),
}
LAWS = [("lora", beside) for beside in BESIDE] + [(kind, "alone") for kind in OURS if kind != "lora"]
LAWS += [("dora", "new tokens"), ("embedding", "saved"), ("embedding", "grown")]


def ours(base, options, modules=(), ids=(), vocab=None):
    """(params, config, saved paths) of a run that moved all it may."""
    params, config = resize_embeddings(*base, vocab or 0)
    keep = saved(params, modules) if modules else set()
    params = lora(params, jax.random.key(0), rank=3, alpha=5.0, **options) if options else params
    params = tokens(params, ids, but=keep) if ids else params
    return changed(moved(params), keep), config, keep


@pytest.mark.parametrize("kind, beside", LAWS)
def test_torch_and_a_round_trip_say_of_our_adapter_what_the_run_says(kind, beside, source, base, torch_scores, rows, tmp_path):
    vocab = BESIDE[beside][2]
    rows = [*rows, [62, 5, 63, 61]] if vocab else rows
    params, config, keep = ours(base, OURS[kind], *BESIDE[beside])
    save_adapter(params, config, form="peft", source=source, out=tmp_path / "out", saved=keep)
    expected = score(params, config, rows)
    assert np.abs(torch_scores(with_torch(source, tmp_path / "out", vocab), rows) - expected).max() < ATOL
    assert (tmp_path / "out" / "README.md").is_file() == bool(vocab)

    again = load_adapter(base[0], tmp_path / "out")
    np.testing.assert_allclose(score(again, config, rows), expected, atol=2e-6)
    kinds = {path: type(w) for path, w in tree.flatten(again).items() if isinstance(w, LowRank | Dora)}
    assert kinds == {path: type(w) for path, w in tree.flatten(params).items() if isinstance(w, LowRank | Dora)}
    assert saved(again, saved_modules(tmp_path / "out")) == keep if keep else not saved_modules(tmp_path / "out")
