"""LoRA on every family, every method on some: the loss falls, and the checkpoint that comes out says what the run says."""

import pytest
import toy as worlds

from sftjax import tasks
from sftjax.models.families import FAMILIES
from sftjax.tasks.export import export

METHODS = {
    "lora": {},
    "full": {"method": "full", "optim.lr": 3e-3},
    "freeze": {"method": "freeze", "freeze.last_n_layers": 2, "optim.lr": 1e-2},
}
THOROUGH = ("llama", "qwen3", "gemma2", "mixtral")
# what sets a family apart, at its most demanding
OWN = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": False, "hidden_act": "gelu"},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 12},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]},
        "original_max_position_embeddings": 32,
    },
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32, "norm_topk_prob": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "swiglu_limit": 1.0},
}


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    return worlds.make_base(tmp_path_factory.mktemp(request.param) / "base", request.param, **OWN.get(request.param, {}))


@pytest.mark.parametrize(
    "base, method", [(f, m) for f in FAMILIES for m in METHODS if m == "lora" or f in THOROUGH], indirect=["base"]
)
def test_method_lowers_the_loss_and_comes_out_whole(toy, base, method, tmp_path):
    changes = {"model.path": str(base), "train.steps": 6, "train.eval_every": 0, "train.log_every": 6}
    summary = tasks.train(toy.config(**METHODS[method] | changes), tmp_path / "run")
    assert summary["eval_loss"] < 0.85 * summary["eval_loss_before"]
    assert export(tmp_path / "run", out=tmp_path / "out") < 1e-4  # it raises where more than rounding differs
