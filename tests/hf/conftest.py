"""Tiny random checkpoints, written by transformers itself."""

import json

import pytest

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
# what a family's class would otherwise choose for a model of another size
OWN = {
    "smollm3": {"pad_token_id": None, "eos_token_id": None},
    "phi3": {"pad_token_id": None, "eos_token_id": None},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "swiglu_limit": 1.0},
}


@pytest.fixture(scope="session")
def rows():
    """Token ids to score, of several lengths."""
    return [[5, 9, 33, 2, 60, 7], [1, 2], [11, 12, 13, 14, 15, 16, 17, 18, 19]]


@pytest.fixture(scope="session")
def torch_model():
    """`build(family, **changes)`: a random float32 model of transformers, every parameter away from its initial value."""
    import torch
    import transformers

    def build(family, **changes):
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[family](**SHAPE | OWN.get(family, {}) | changes)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or name.endswith("bias"):  # norms are ones and biases zeros otherwise
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture(scope="session")
def checkpoint(torch_model, tmp_path_factory):
    """`make(family, shards=False, **changes) -> directory`."""

    def make(family, shards=False, **changes):
        directory = tmp_path_factory.mktemp(family)
        torch_model(family, **changes).save_pretrained(directory, max_shard_size="4KB" if shards else "1GB")
        return directory

    return make


@pytest.fixture
def edit_json():
    def edit(file, **changes):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit
