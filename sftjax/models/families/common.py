"""What the families share: how a config.json is read without guessing, and the table of Hugging Face tensor names.

A key that changes the computation is either read or refused by name; nothing is half-read. Dropout (attention_dropout: Granite
says 0.1) is how the checkpoint was trained and changes nothing that it computes: it is passed over, and not applied in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sftjax import tree
from sftjax.config import UserError
from sftjax.models.config import DecoderConfig
from sftjax.models.decoder import shapes
from sftjax.models.families.rope import rope
from sftjax.weights.targets import MODULES

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}

LAYER_TYPES = FULL, SLIDING = "full_attention", "sliding_attention"

# where checkpoints call a module otherwise than users do; the second {} is the expert
CHECKPOINT = {f"mlp/experts/{kernel}": f"mlp.experts.{{}}.{kernel}_proj" for kernel in ("gate", "up", "down")}


@dataclass(frozen=True)
class Name:
    """Where one leaf lives in a checkpoint."""

    template: str  # "model.layers.{}.self_attn.q_proj.weight"; the first {} is the layer, a second the expert
    shape: tuple[int, ...]  # of one tensor, in our order of axes
    transposed: bool = False  # the checkpoint holds [out, in]
    stacked: tuple[int, ...] = ()  # axes that lead in our leaf, a tensor for each: (), (L,) or (L, E)

    def hf(self) -> list[str]:
        """The checkpoint's names of this leaf's tensors, by layer and then by expert."""
        return [self.template.format(*index) for index in np.ndindex(self.stacked)]


def names(config: DecoderConfig, modules: Mapping[str, str]) -> dict[str, Name]:
    """`{path of our leaf: its Name}` for every leaf the config has. `modules` are a family's own names for a layer's modules.

    By the path of a leaf (mlp/experts/down/bias) they name a tensor of each layer that is no module's weight or bias, and has our
    order of axes.
    """
    called = {**MODULES, **CHECKPOINT, **modules}
    table = {}
    for path, leaf in tree.flatten(shapes(config)).items():
        node, _, kind = path.rpartition("/")
        layered = node.startswith("layers/")
        prefix = "model.layers.{}." if layered else "" if node in ("head", "score") else "model."
        if whole := modules.get(path.removeprefix("layers/")):
            table[path] = Name(f"{prefix}{whole}", leaf.shape[1:], stacked=leaf.shape[:1])
            continue
        module = called[node.removeprefix("layers/")]
        lead = 0 if not layered else 2 if "experts/" in node else 1
        suffix = "bias" if kind == "bias" else "weight"
        table[path] = Name(f"{prefix}{module}.{suffix}", leaf.shape[lead:], kind == "kernel", leaf.shape[:lead])
    return table


def config_to_hf(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    """The source's config.json with what training may have changed: the vocabulary's size, and what was packed is bfloat16."""
    out = source | {"vocab_size": config.vocab}
    if out.pop("quantization_config", None) and not {"dtype", "torch_dtype"} & set(out):
        out["torch_dtype"] = "bfloat16"
    return out


@dataclass(frozen=True)
class Family:
    """One `model_type`: how its config.json reads, and how its tensors are called."""

    architecture: str  # the class that reads it in transformers
    config_from_hf: Callable[[dict[str, Any]], DecoderConfig]
    modules: Mapping[str, str] = field(default_factory=dict)  # where its tensors are called otherwise than `targets.MODULES`
    config_to_hf: Callable[[DecoderConfig, dict[str, Any]], dict[str, Any]] = config_to_hf
    packings: tuple[str, ...] = ()  # `quant_method` of checkpoints in few bits that `hf.load` reads
    classifier: str | None = ""  # the class with a score head; "" = called alike, None = transformers has none

    @property
    def classes(self) -> list[str]:
        """What `architectures` may say: with a head over the vocabulary, then with a score head."""
        alike = self.architecture.replace("ForCausalLM", "ForSequenceClassification")
        return [self.architecture, *([] if self.classifier is None else [self.classifier or alike])]

    def names(self, config: DecoderConfig) -> dict[str, Name]:
        """`{path of our leaf: its Name}` for every leaf the config has."""
        return names(config, self.modules)


def base(
    raw: dict[str, Any],
    *,
    max_positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    act: str = "hidden_act",
    partial: bool = False,
) -> DecoderConfig:
    """What every family reads alike: the keywords are its defaults for keys that a file may leave out, `act` the key of the
    activation, `partial` whether heads may turn in part.

    Other defaults of a family's own stand in front of the file: `base({"tie_word_embeddings": True} | raw, ...)`.
    """
    width, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    if "num_key_value_heads" not in raw:
        kv_heads = kv_heads or heads
    else:
        kv_heads = size(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"num_attention_heads={heads} does not divide into num_key_value_heads={kv_heads} groups")
    head_dim = size(raw, "head_dim", head_dim or width // heads)
    if head_dim % 2:
        raise UserError(f"head_dim={head_dim} is odd; rotary embeddings turn pairs of dimensions")
    activation = raw.get(act) or "silu"
    if activation not in ACTIVATIONS:
        raise UserError(f"{act}={activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    positions = size(raw, "max_position_embeddings", max_positions)
    turning = rope(raw, positions, head_dim)
    if turning.partial != 1.0 and not partial:
        raise UserError(f"partial_rotary_factor={turning.partial} is not supported for model_type {raw['model_type']!r}")
    return DecoderConfig(
        vocab=size(raw, "vocab_size"),
        width=width,
        mlp_width=size(raw, "intermediate_size"),
        layers=size(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=positions,
        tied=flag(raw, "tie_word_embeddings"),
        rope=turning,
        norm_eps=positive(raw, "rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[activation],
        init_std=positive(raw, "initializer_range", 0.02),
    )


def layer_types(raw: dict[str, Any], otherwise: Sequence[str]) -> Sequence[str]:
    """`layer_types`, one of LAYER_TYPES for each layer; `otherwise` is what they are where the file is silent."""
    layers = size(raw, "num_hidden_layers")
    kinds = raw.get("layer_types") or otherwise
    if len(kinds) != layers:
        raise UserError(f"layer_types has {len(kinds)} entries for num_hidden_layers={layers}")
    if strange := sorted(set(kinds) - {*LAYER_TYPES}):
        raise UserError(f"layer_types holds {strange[0]!r}, which is not supported; supported are {', '.join(LAYER_TYPES)}")
    return kinds


def windows(kinds: Sequence[str], width: int | None, keys: str = "sliding_window does") -> tuple[int | None, ...]:
    """A window for each layer of kind sliding_attention; `keys` are those that set none where `width` is None."""
    if SLIDING not in kinds:
        return ()
    if width is None:
        raise UserError(f"layer_types asks for sliding_attention, but {keys} not give a window")
    return tuple(width if kind == SLIDING else None for kind in kinds)


def labels(raw: dict[str, Any]) -> tuple[str, ...]:
    """What the numbers of a score head mean: `id2label`, or LABEL_0 and so on where the file is silent, as in transformers."""
    named = raw.get("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(size(raw, "num_labels", 2)))
    if not isinstance(named, dict) or {str(key) for key in named} != {str(i) for i in range(len(named))} or not named:
        raise UserError(f"id2label={named!r} does not name the labels 0, 1, ...")
    return tuple(str(named[key]) for key in sorted(named, key=int))


def layer_windows(raw: dict[str, Any]) -> tuple[int | None, ...]:
    """Qwen's windows: those layers that `layer_types` names, else those from `max_window_layers` on."""
    width = window(raw) if flag(raw, "use_sliding_window") else None
    first = size(raw, "max_window_layers", 28, least=0)
    kinds = [SLIDING if width and i >= first else FULL for i in range(size(raw, "num_hidden_layers"))]
    return windows(layer_types(raw, kinds), width, "use_sliding_window and sliding_window do")


def window(raw: dict[str, Any]) -> int | None:
    """`sliding_window`: 4096 where the file is silent, none where it says null."""
    return None if raw.get("sliding_window", 0) is None else size(raw, "sliding_window", 4096)


def size(raw: dict[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    """A whole number, of `least` or more; null or absent is the default, and without a default a mistake."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{key}={value!r} is not a {'positive whole number' if least else 'whole number, at least 0'}")
    return value


def positive(raw: dict[str, Any], key: str, default: float) -> float:
    """A number above 0; null or absent is the default."""
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{key}={value!r} is not a positive number")
    return float(value)


def flag(raw: dict[str, Any], key: str) -> bool:
    """A boolean that is false where absent or null."""
    value = raw.get(key)
    if value not in (None, True, False):
        raise UserError(f"{key}={value!r} is neither true nor false")
    return bool(value)


def refuse(raw: dict[str, Any], *keys: str) -> None:
    """Keys that this family does not have: set, they would be silently ignored."""
    for key in keys:
        if raw.get(key):
            raise UserError(f"{key}={raw[key]!r} is not supported for model_type {raw['model_type']!r}")
