"""sftjax: a Hugging Face checkpoint and a file of examples in, a better Hugging Face checkpoint out.

    model = sftjax.load("Qwen/Qwen3-0.6B")                  # module, params, tokenizer, config
    logits = model.logits("The capital of France is")       # [1, T, V], for looking
    params = sftjax.lora(model.params, key, rank=16)        # tree -> tree
    params = sftjax.lora(sftjax.quantize(model.params), key, rank=16)      # QLoRA
    loss = sftjax.losses.masked_xent(sftjax.losses.neftune(model.forward, alpha=5))
    sftjax.train(config, workdir="runs/mine")               # the whole task, as the verb does it
    sftjax.export("runs/mine", to="hf", out="mine")

Names are looked up when first used, so that `import sftjax` costs nothing and never starts jax.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import sftjax.train

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sftjax import losses
    from sftjax.config import UserError
    from sftjax.config import default as default_config
    from sftjax.config import load as load_config
    from sftjax.data.preview import preview
    from sftjax.evaluate.sequences import classify, rewards
    from sftjax.hf.model import Model, load
    from sftjax.tasks.export import export
    from sftjax.weights.lora import lora, merge
    from sftjax.weights.quantize import quantize

WHERE = {
    "UserError": ("sftjax.config", "UserError"),
    "default_config": ("sftjax.config", "default"),
    "load_config": ("sftjax.config", "load"),
    "preview": ("sftjax.data.preview", "preview"),
    "Model": ("sftjax.hf.model", "Model"),
    "load": ("sftjax.hf.model", "load"),
    "classify": ("sftjax.evaluate.sequences", "classify"),
    "rewards": ("sftjax.evaluate.sequences", "rewards"),
    "export": ("sftjax.tasks.export", "export"),
    "lora": ("sftjax.weights.lora", "lora"),
    "merge": ("sftjax.weights.lora", "merge"),
    "quantize": ("sftjax.weights.quantize", "quantize"),
    "losses": ("sftjax.losses", None),
}
__all__ = [
    "Model",
    "UserError",
    "classify",
    "default_config",
    "export",
    "load",
    "load_config",
    "lora",
    "losses",
    "merge",
    "preview",
    "quantize",
    "rewards",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module 'sftjax' has no attribute {name!r}")
    module, attribute = WHERE[name]
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


class _Train(ModuleType):
    # `train` names both the folder and the verb: the folder answers to a call
    def __call__(self, config: Any, workdir: Any, *, force: bool = False) -> dict[str, Any]:
        """Runs the task that `config.task` names in `workdir`, or resumes it; returns what its summary.json holds."""
        return importlib.import_module("sftjax.tasks").train(config, workdir, force=force)


sftjax.train.__class__ = _Train
