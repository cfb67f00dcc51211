"""Writes golden_families.json: a few logits of a tiny checkpoint of every family, as transformers computes them in float32.

`pip install torch transformers`, then run this file. Weights are drawn by numpy's RandomState, whose stream is frozen, from
their names in the checkpoint: only configs and results need to be kept, and whoever reads them needs no torch.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "eos_token_id": None,
    "rope_theta": 300.0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 14}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 3.0, 5.0]}

# what sets a family apart, in the spelling of transformers 4
CASES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": MIXED | {"use_sliding_window": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True, "hidden_act": "gelu"},
    "gemma2": MIXED | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": MIXED | {"query_pre_attn_scalar": 16, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "olmo2": {},
    "granite": {"embedding_multiplier": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi3": {"hidden_size": 40, "rope_scaling": LONG, "original_max_position_embeddings": 16, "partial_rotary_factor": 0.8},
    "mixtral": {"num_local_experts": 4, "sliding_window": 7} | EXPERTS,
    "qwen2_moe": {"num_experts": 5} | EXPERTS,
    "qwen3_moe": {"num_experts": 6, "norm_topk_prob": True} | EXPERTS,
    "gpt_oss": {"num_local_experts": 5, "sliding_window": 7, "swiglu_limit": 0.8, "rope_scaling": YARN} | EXPERTS,
}
TOKENS = np.random.RandomState(0).randint(0, SHAPE["vocab_size"], 24)
POSITIONS, IDS = [0, 11, 23], slice(8)  # of which logits are kept


def draw(name, shape):
    """The tensor of a checkpoint that is called `name`, float32."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return (0.5 + 0.2 * noise if len(shape) == 1 else 0.3 * noise).astype(np.float32)


def logits(config):
    """transformers' of one checkpoint, [T, V]."""
    import torch
    from safetensors.numpy import load_file, save_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        theirs = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
        AutoModelForCausalLM.from_config(theirs, dtype=torch.float32).save_pretrained(directory)
        file = Path(directory) / "model.safetensors"
        save_file({name: draw(name, x.shape) for name, x in load_file(file).items()}, file, {"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad():
            return model.eval()(input_ids=torch.from_numpy(TOKENS)[None]).logits[0].numpy()


if __name__ == "__main__":
    golden = {}
    for family, changes in CASES.items():
        config = {"model_type": family} | SHAPE | changes
        kept = logits(config)[POSITIONS, IDS]
        golden[family] = {"config": config, "logits": [[float(f"{x:.7g}") for x in row] for row in kept]}
    FILE.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in golden.items()) + "\n}\n")
