"""A Hugging Face checkpoint from nothing: a byte-level BPE tokenizer of the project's own, and a Qwen3 with random weights.

What it writes is what any hub id would bring (config.json, model.safetensors, tokenizer.json, a ChatML template), so
from here on nothing knows that the model is small. Two choices differ from a large tokenizer's: a Chinese character is
never merged with its neighbour, and the vocabulary is only as large as the text asks for.

    python examples/quickstart/make_base.py --data=runs/quickstart --out=runs/quickstart/init
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts(data: Path) -> Iterator[str]:
    """Every text that make_data.py wrote into `data`, and the roles, as the template writes them."""
    yield from (data / "text.txt").read_text(encoding="utf-8").splitlines()
    for line in (data / "instructions.jsonl").read_text(encoding="utf-8").splitlines():
        for message in json.loads(line)["messages"]:
            yield from (message["role"] + "\n", message["content"])


def train_tokenizer(data: Path, vocab: int) -> Tokenizer:
    """Byte-level BPE: any text can be written, and what the data says often is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(data), trainer)
    return tokenizer


def hf_config(vocab: int, *, width: int, layers: int, head_dim: int) -> dict:
    """config.json of a Qwen3 of this size: two queries to a key, the mlp three times the width."""
    heads = width // head_dim
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": head_dim,
        "max_position_embeddings": 1024,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": round(width**-0.5, 4),  # 0.02 is for wide models; a narrow one learns twice as fast from this
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "float32",
    }


def random_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Normal(0, initializer_range) for every matrix, one for every norm, under Hugging Face's names ([out, in])."""
    rng = np.random.default_rng(seed)
    d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    matrices = {
        "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    norms = {"input_layernorm": d, "post_attention_layernorm": d, "self_attn.q_norm": h, "self_attn.k_norm": h}

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(0, config["initializer_range"], shape).astype(np.float32)

    weights = {"model.embed_tokens.weight": normal((config["vocab_size"], d)), "model.norm.weight": np.ones(d, np.float32)}
    for i in range(config["num_hidden_layers"]):
        weights |= {f"model.layers.{i}.{name}.weight": normal(shape) for name, shape in matrices.items()}
        weights |= {f"model.layers.{i}.{name}.weight": np.ones(n, np.float32) for name, n in norms.items()}
    return weights


def write(data: Path, out: Path, *, vocab: int, width: int, layers: int, head_dim: int, seed: int) -> dict[str, np.ndarray]:
    """Writes the checkpoint directory and returns its weights. The same arguments write the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(data, vocab)
    tokenizer.save(str(out / "tokenizer.json"))
    config = hf_config(tokenizer.get_vocab_size(), width=width, layers=layers, head_dim=head_dim)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [START, STOP],
        "chat_template": CHATML,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("config.json", config), ("tokenizer_config.json", settings)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = random_weights(config, seed)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart"), help="where make_data.py wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart/init"))
    parser.add_argument("--vocab", type=int, default=1024, help="at most")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    weights = write(a.data, a.out, vocab=a.vocab, width=a.width, layers=a.layers, head_dim=a.head_dim, seed=a.seed)
    rows = weights["model.embed_tokens.weight"].shape[0]
    print(f"{a.out}: Qwen3, {sum(w.size for w in weights.values()):,} parameters, {rows:,} tokens in the vocabulary")


if __name__ == "__main__":
    main()
