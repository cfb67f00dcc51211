"""sftjax: a Hugging Face checkpoint and a file of examples in, a better Hugging Face checkpoint out.

    model = sftjax.load("Qwen/Qwen3-0.6B")                  # module, params, tokenizer, config
    logits = model.logits("The capital of France is")       # [1, T, V], for looking
    params = sftjax.lora(model.params, key, rank=16)        # tree -> tree
    params = sftjax.lora(sftjax.quantize(model.params), key, rank=16)      # QLoRA
    trainable, frozen = sftjax.split(params)                # two trees, which sftjax.tree.join puts together again
    loss = sftjax.losses.masked_xent(sftjax.losses.neftune(model.forward, alpha=5))
    batches = sftjax.batches(model, rows, max_length=512, batch_size=8)    # rows in memory; docs/python.md is a whole loop
    sftjax.answer(model.using(params), ["What is the capital of France?"])
    sftjax.save(model.using(params), "adapter", to="peft")
    sftjax.plan(config, "v5e-8")                            # does it fit, how long does it take
    sftjax.train(config, workdir="runs/mine")               # the whole task, as the verb does it
    sftjax.evaluate("runs/mine")                            # beside what it started from; or model="mine", data="test.jsonl"
    sftjax.export("runs/mine", to="hf", out="mine")
    sftjax.compare(["base", "mine"], data="test.jsonl", out="compared")

Names are looked up when first used, so that `import sftjax` costs nothing and never starts jax.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import sftjax.evaluate
import sftjax.plan
import sftjax.train

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sftjax import losses, tree
    from sftjax.config import UserError
    from sftjax.config import default as default_config
    from sftjax.config import load as load_config
    from sftjax.data.preview import preview
    from sftjax.evaluate.compare import run_compare as compare
    from sftjax.evaluate.sequences import classify, rewards
    from sftjax.generate.ask import answer
    from sftjax.hf.model import Model, load
    from sftjax.tasks.export import export
    from sftjax.tasks.own import batches, save, split
    from sftjax.weights.lora import lora, merge, without
    from sftjax.weights.quantize import quantize

WHERE = {
    "UserError": ("sftjax.config", "UserError"),
    "default_config": ("sftjax.config", "default"),
    "load_config": ("sftjax.config", "load"),
    "preview": ("sftjax.data.preview", "preview"),
    "Model": ("sftjax.hf.model", "Model"),
    "load": ("sftjax.hf.model", "load"),
    "compare": ("sftjax.evaluate.compare", "run_compare"),
    "classify": ("sftjax.evaluate.sequences", "classify"),
    "rewards": ("sftjax.evaluate.sequences", "rewards"),
    "answer": ("sftjax.generate.ask", "answer"),
    "export": ("sftjax.tasks.export", "export"),
    "batches": ("sftjax.tasks.own", "batches"),
    "save": ("sftjax.tasks.own", "save"),
    "split": ("sftjax.tasks.own", "split"),
    "lora": ("sftjax.weights.lora", "lora"),
    "merge": ("sftjax.weights.lora", "merge"),
    "without": ("sftjax.weights.lora", "without"),
    "quantize": ("sftjax.weights.quantize", "quantize"),
    "losses": ("sftjax.losses", None),
    "tree": ("sftjax.tree", None),
}
__all__ = [
    "Model",
    "UserError",
    "answer",
    "batches",
    "classify",
    "compare",
    "default_config",
    "evaluate",
    "export",
    "load",
    "load_config",
    "lora",
    "losses",
    "merge",
    "plan",
    "preview",
    "quantize",
    "rewards",
    "save",
    "split",
    "train",
    "tree",
    "without",
]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module 'sftjax' has no attribute {name!r}")
    module, attribute = WHERE[name]
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


# `train`, `evaluate` and `plan` name a folder and a verb each: the folder answers to a call, with a config or the path of one


def _opened(config: Any) -> Any:
    return importlib.import_module("sftjax.config").opened(config)


class _Train(ModuleType):
    def __call__(self, config: Any, workdir: Any, *, force: bool = False) -> dict[str, Any]:
        """Runs the task that `config.task` names in `workdir`, or resumes it; returns what its summary.json holds."""
        return importlib.import_module("sftjax.tasks").train(_opened(config), workdir, force=force)


class _Evaluate(ModuleType):
    def __call__(self, workdir: Any = None, config: Any = None, *, model: Any = None, **options: Any) -> dict[str, Any]:
        """What eval.json holds: of a run beside what it started from, or of `model` on the rows of `data`.

        `options` as in `sftjax.tasks.evaluate`: of a run checkpoint, split; of a model data, adapter, base, quantize; of both
        out, metrics, rows, max_new_tokens and how to sample.
        """
        config = None if config is None else _opened(config)
        return importlib.import_module("sftjax.tasks.evaluate").evaluate(workdir, config, model=model, **options)


class _Plan(ModuleType):
    def __call__(self, config: Any, topology: str | None = None, **options: Any) -> dict[str, Any]:
        """Says what a run of `config` would take on `topology`, and returns its figures. `options` as in `sftjax.plan.report`."""
        return importlib.import_module("sftjax.plan.report").plan(_opened(config), topology, **options)


sftjax.train.__class__ = _Train
sftjax.evaluate.__class__ = _Evaluate
sftjax.plan.__class__ = _Plan
