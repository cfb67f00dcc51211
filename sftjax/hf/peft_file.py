"""The two files of an adapter as they lie there: what its config may say, and which parts each module has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sftjax.config import UserError
from sftjax.hf.load import read_json
from sftjax.hf.modules import SCORE
from sftjax.hf.tensors import Stored, read

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LABELS = "labels.json"  # {"0": "ham", "1": "spam"}: of a score head, for which PEFT's config has no word
PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "token_adapter.trainable_tokens_delta": "rows",
    "weight": "weight",
    "bias": "bias",
    "base_layer.weight": "weight",
    "token_adapter.base_layer.weight": "weight",
    "adapter_down.weight": "down",
    "adapter_down.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
    # of a saved end where the vocabulary grew: `weight` once more, and what it replaces
    "modules_to_save.weight": "weight again",
    "original_module.weight": "replaced",
}
TENSOR = re.compile(rf"base_model\.model\.(?P<module>.+?)\.(?P<part>{'|'.join(map(re.escape, PARTS))})")
TOGETHER = [{"lora_A", "lora_B"}, {"down", "down_bias", "up", "up_bias"}]

READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
READ |= {"use_dora", "modules_to_save", "trainable_token_indices", "width", "nonlinearity"}
# Say nothing about what the adapter computes: the tensors in the file say which modules and layers it has.
IGNORED = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "auto_mapping", "revision"}
IGNORED |= {"base_model_name_or_path", "inference_mode", "peft_version", "megatron_core", "qalora_group_size"}
IGNORED |= {"ensure_weight_tying", "targets"}
CLASSIFIERS = {"classifier", "score"}  # PEFT always names both beside task_type SEQ_CLS; a model has one
# Those that leave the base as it was; pissa, olora, loftq, corda and the like change it when the adapter is made.
INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError that names the key that is not supported."""
    file = directory / CONFIG
    config = read_json(file)
    kind = config.get("peft_type")
    if kind not in ("LORA", "BOTTLENECK"):
        raise UserError(f"{file}: peft_type={kind!r} is not supported; LORA and BOTTLENECK are")
    if config.get("init_lora_weights", True) not in INITS:
        raise UserError(
            f"{file}: init_lora_weights={config['init_lora_weights']!r} is not supported: it goes with a changed base"
        )
    if config.get("nonlinearity", "silu") != "silu":
        raise UserError(f"{file}: nonlinearity={config['nonlinearity']!r} is not supported; only silu is")
    for key, value in config.items():
        if key not in READ | IGNORED and value not in (None, False, "none", [], {}):
            raise UserError(f"{file}: {key}={value!r} is not supported")
    return config


@dataclass(frozen=True)
class Module:
    """One module's parts in the file, and what the config says of it."""

    directory: Path
    config: dict[str, Any]
    name: str
    parts: dict[str, Stored]

    def view(self, part: str, *expected: int) -> np.ndarray:
        """A part of the expected shape. Raises UserError where it has another."""
        if self.parts[part].shape != expected:
            over = self.config.get("base_model_name_or_path")
            raise UserError(
                f"{self.directory}: {self.name}.{part} is {list(self.parts[part].shape)}, not {list(expected)}; "
                + (f"it was trained over {over}, give that as the model" if over else "give the model that it was trained over")
            )
        return self.parts[part].view()

    @property
    def rank(self) -> int:
        return self._pattern("rank_pattern", "r")

    @property
    def scale(self) -> float:
        return self._pattern("alpha_pattern", "lora_alpha") / (self.rank**0.5 if self.config.get("use_rslora") else self.rank)

    def _pattern(self, patterns: str, default: str) -> Any:
        """The value of the first key that matches the end of the module's name, as PEFT looks it up."""
        for key, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({key})$", self.name):
                return value
        return self.config[default]

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens of its rows. PEFT takes a list to be of the embedding, and names to be the ends of modules'."""
        ids = self.config.get("trainable_token_indices") or {}
        named = ids if isinstance(ids, dict) else {"embed_tokens": ids}
        return next((tuple(value) for name, value in named.items() if self.name.endswith(name)), ())

    @property
    def saved(self) -> bool:
        """Is it replaced as a whole, and not filed along as a copy?"""
        return any(self.name.endswith(name) for name in self.config.get("modules_to_save") or ())


def read_modules(directory: Path, config: dict[str, Any]) -> dict[str, Module]:
    """Every module that has a tensor in adapter_model.safetensors. Raises UserError on a tensor that is no part of one."""
    file = directory / WEIGHTS
    if not file.is_file():
        raise UserError(f"{directory}: has no {WEIGHTS}")
    modules: dict[str, Module] = {}
    for name, stored in read(file).items():
        if not (match := TENSOR.fullmatch(name)):
            raise UserError(f"{file}: {name} is no part of a module that sftjax knows, and is not supported")
        module = modules.setdefault(match["module"], Module(directory, config, match["module"], {}))
        module.parts[PARTS[match["part"]]] = stored
    for module in modules.values():
        for together in TOGETHER:
            if missing := sorted(together - set(module.parts)) if together & set(module.parts) else []:
                raise UserError(f"{file}: {module.name} has {min(together & set(module.parts))} without its {missing[0]}")
        if ("lora_magnitude_vector" in module.parts) != bool(config.get("use_dora") and "lora_A" in module.parts):
            raise UserError(f"{file}: use_dora={config.get('use_dora')} does not go with the parts of {module.name}")
    filed = [module for module in modules.values() if {"weight", "bias"} & set(module.parts)]
    named = config.get("modules_to_save") or ()
    there = {name for name in named if any(module.name.endswith(name) for module in filed)}
    spared = CLASSIFIERS if config.get("task_type") == "SEQ_CLS" and CLASSIFIERS & there else set()
    if missing := [name for name in named if name not in there | spared]:
        raise UserError(f"{file}: holds no {missing[0]}, which modules_to_save names")
    if SCORE in modules and (parts := sorted(set(modules[SCORE].parts) - {"weight"})):
        raise UserError(
            f"{file}: {SCORE} has {' and '.join(parts)}, and a score head is read only as a whole; "
            "merge the adapter into the model with PEFT and load that"
        )
    if config.get("trainable_token_indices") and not any("rows" in module.parts for module in modules.values()):
        raise UserError(f"{file}: holds no rows of the tokens that trainable_token_indices names")
    return modules
