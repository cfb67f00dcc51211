"""What a TPU's compiler lays out for runs that people plan, into plan_golden.json beside this file; and the runs themselves.

    PYTHONPATH=. python tests/golden_plan.py              # all of them, a minute or two each on an idle machine; needs libtpu
    PYTHONPATH=. python tests/golden_plan.py qwen3_lora   # those named; the others' figures stay

Of a model there is its config.json and nothing else. The `gate_*` are small, for a test that compiles them again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "plan_golden.json"
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
TINY = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama3_8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama3_70b": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "qwen3_06b": {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "mixtral": LLAMA
    | {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "tiny": LLAMA | TINY,
}
MODELS["tiny_moe"] = MODELS["mixtral"] | TINY | {"num_local_experts": 4}
MODELS["tiny_sinks"] = TINY | {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 4,
    "dtype": "bfloat16",
}
FSDP = {"mesh.data": 1, "mesh.fsdp": -1}
SMALL = {"data.max_length": 128, "train.batch_size": 2}
# name -> model, topology, what the config changes
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3_8b_lora": ("llama3_8b", "v6e:1x1", {"model.remat": "block", "train.batch_size": 2}),
    "llama3_8b_qlora": ("llama3_8b", "v5e:1x1", {"model.remat": "block", "train.batch_size": 2, "model.quantize": "nf4"}),
    "llama3_8b_full": ("llama3_8b", "v5e:4x4", {"model.remat": "block", "train.batch_size": 16, "method": "full", **FSDP}),
    "qwen3_lora": ("qwen3_06b", "v5e:1x1", {"model.remat": "minimal", "train.batch_size": 4}),
    "qwen3_lora_remat_block": ("qwen3_06b", "v5e:1x1", {"model.remat": "block", "train.batch_size": 8}),
    "qwen3_lora_remat_none": ("qwen3_06b", "v5e:1x1", {"model.remat": "none", "train.batch_size": 2}),
    "qwen3_full": ("qwen3_06b", "v6e:1x1", {"model.remat": "minimal", "train.batch_size": 4, "method": "full"}),
    "qwen3_reward": ("qwen3_06b", "v5e:1x1", {"model.remat": "block", "train.batch_size": 8, "task": "reward"}),
    "qwen3_grpo": (
        *("qwen3_06b", "v5e:1x1"),
        {
            "model.remat": "block",
            "task": "grpo",
            "train.batch_size": 16,
            "train.micro_batch": 8,
            "grpo.max_completion_length": 512,
        },
    ),
    "qwen3_ppo": (
        *("qwen3_06b", "v5e:1x1"),
        {
            "model.remat": "block",
            "task": "ppo",
            "train.batch_size": 16,
            "train.micro_batch": 8,
            "ppo.max_completion_length": 512,
        },
    ),
    "llama3_70b_qlora": (
        *("llama3_70b", "v5p:2x2x1"),
        {"model.remat": "block", "train.batch_size": 4, "model.quantize": "nf4", **FSDP},
    ),
    "mixtral_lora": (
        *("mixtral", "v5p:2x2x1"),
        {"model.remat": "block", "train.batch_size": 4, "lora.targets": "q_proj,k_proj,v_proj,o_proj", **FSDP},
    ),
    "gate_sft": ("tiny", "v5e:1x1", {"model.remat": "minimal", **SMALL}),
    "gate_qlora": ("tiny", "v6e:1x1", {"model.remat": "block", "model.quantize": "nf4", **SMALL}),
    "gate_moe": ("tiny_moe", "v5e:1x1", {"model.remat": "block", "lora.targets": "q_proj,v_proj", **SMALL}),
    "gate_sinks": ("tiny_sinks", "v6e:1x1", {"model.remat": "block", "lora.targets": "q_proj,v_proj", **SMALL}),
    "gate_dpo": ("tiny", "v5p:1x1x1", {"model.remat": "block", "task": "dpo", **SMALL}),
    "gate_grpo": (
        "tiny",
        "v6e:1x1",
        {"model.remat": "block", "task": "grpo", **SMALL, "train.batch_size": 8, "grpo.max_completion_length": 64},
    ),
    "gate_reward": ("tiny", "v5e:1x1", {"model.remat": "block", "task": "reward", **SMALL}),
    "gate_8bit": ("tiny", "v6e:1x1", {"model.remat": "block", "method": "full", "optim.name": "adamw_8bit", **SMALL}),
    "gate_offload": ("tiny", "v5e:1x1", {"model.remat": "block", "method": "full", "optim.offload": "true", **SMALL}),
}
CASES |= {  # each task on every chip
    f"{gate}_{chip}": (CASES[gate][0], topology, CASES[gate][2])
    for gate in ("gate_sft", "gate_qlora", "gate_moe", "gate_dpo")
    for chip, topology in (("v5e", "v5e:1x1"), ("v5p", "v5p:1x1x1"), ("v6e", "v6e:1x1"))
    if CASES[gate][1] != topology
}


def config(case: str, folder: Path) -> tuple[Any, str]:
    """(config, topology) of a case, whose model's config.json is written into `folder`."""
    from sftjax.config import default, override

    model, topology, keys = CASES[case]
    (folder / "config.json").write_text(json.dumps(MODELS[model]))
    c = default()
    for key, value in ({"model.path": str(folder), "data.max_length": 2048} | keys).items():
        override(c, key, str(value))
    return c, topology


def compile_case(case: str, folder: Path) -> tuple[Any, Any, Any]:
    """(bytes as the compiler lays them out, the compiled step, its job). A gate is compiled at level O0, a fifth of the work."""
    import jax

    from sftjax.plan import exact
    from sftjax.plan.step import mesh_sizes, open_dry
    from sftjax.plan.topology import parse

    c, topology = config(case, folder)
    where, job = parse(topology), open_dry(c)
    mesh = exact.mesh_over(exact.devices(where), mesh_sizes(c, where.devices), where.slices)
    level = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0" if case.startswith("gate") else level)
    try:
        return *exact.measure(exact.lower(job, mesh)), job
    finally:
        jax.config.update("jax_optimization_level", level)


def main() -> None:
    import dataclasses
    import tempfile
    from importlib.metadata import version

    os.environ["JAX_PLATFORMS"] = "cpu"
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    for case in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            m, _, _ = compile_case(case, Path(folder))
        known[case] = dataclasses.asdict(m) | {"seconds": round(m.seconds), "peak": m.peak}
        known[case] |= {"topology": CASES[case][1], "jax": version("jax"), "libtpu": version("libtpu")}
        FILE.write_text(json.dumps({name: known[name] for name in CASES if name in known}, indent=1) + "\n")
        print(f"{case}: {m.peak / 2**30:.3f} GiB, {m.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
