"""Kinds of weight -> an adapter's tensors and its adapter_config.json; `hf.peft` draws the table."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sftjax import tree
from sftjax.config import UserError
from sftjax.hf.load import load_config, load_family
from sftjax.hf.modules import EMBED, HEAD, module_of
from sftjax.hf.tensors import Tensor
from sftjax.models.config import DecoderConfig
from sftjax.weights.kinds import Adapter, Dora, Kind, LowRank, Tokens, norms
from sftjax.weights.lora import over_base
from sftjax.weights.targets import ENDS, module_name

MAX_RANK = 512  # the largest --max-lora-rank of vLLM
ADAPT_ENDS = ("LlamaForCausalLM", "MistralForCausalLM")  # in vLLM; Qwen's do not
NO_TARGETS = "dummy-target-modules"  # PEFT's own word for an adapter of nothing but tokens and modules to save


@dataclass(frozen=True)
class Added:
    """What a run added to its checkpoint, by the path of the leaf where it stands."""

    tied: bool
    low: dict[str, LowRank] = field(default_factory=dict)
    magnitude: dict[str, Array] = field(default_factory=dict)
    bases: dict[str, Array] = field(default_factory=dict)  # under a LowRank, where the vocabulary grew
    rows: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)  # {token: its row}
    whole: dict[str, Array] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    scored: bool = False  # the model ends with a score head

    def __bool__(self) -> bool:
        return any((self.low, self.rows, self.whole, self.adapters))


def added(params: Any, config: DecoderConfig, vocab: int, saved: Collection[str]) -> Added:
    """What `params` adds to a checkpoint of `vocab` tokens, the leaves `saved` as a whole. Raises UserError."""
    out = Added(config.tied, scored=bool(config.labels))
    nodes = {path.rpartition("/")[0] for path in saved}
    for path, w in tree.flatten(params).items():
        node = path.rpartition("/")[0]
        name = module_of(node)
        if isinstance(w, Adapter):
            out.adapters[path], w = w, w.base
        if _mixed(path, config) and (node in nodes or isinstance(w, LowRank | Dora)):
            raise UserError(
                f"{name} is of a mixture of experts, for which PEFT's form depends on transformers' version; use --to=hf, "
                "or train attention alone: --config.lora.targets=q_proj,k_proj,v_proj,o_proj"
            )
        if node in nodes:  # a bias goes with its kernel: PEFT saves modules
            if node == "layers/attn/sinks":
                raise UserError(f"{name} is a tensor and no module, and PEFT saves only modules; use --to=hf")
            if isinstance(w, Kind):
                raise UserError(f"of {name} a part trained as a whole, which PEFT has no form for; use --to=hf")
            out.whole[path] = w
            continue
        if node in ("embed", "head"):
            w, rows = _rows(w, path, vocab)
            if rows and isinstance(w, LowRank | Dora):
                raise UserError(f"{name} has LoRA and trained tokens, and PEFT takes only one of them; use --to=hf")
            if rows:
                out.rows[path] = rows
        if isinstance(w, Dora):
            out.magnitude[path] = w.magnitude * norms(w.base) if w.divided else w.magnitude
            w = w.base
        if isinstance(w, LowRank):
            out.low[path] = low = over_base(w)
            if node in ("embed", "head") and config.vocab > vocab:
                out.bases[path] = low.base
    if out.magnitude and (plain := sorted(set(out.low) - set(out.magnitude))):
        name = module_of(plain[0].rpartition("/")[0])
        raise UserError(f"{name} has LoRA and other modules DoRA, and PEFT has one use_dora for all; use --to=hf")
    return out


def _rows(w: Any, path: str, vocab: int) -> tuple[Any, dict[int, np.ndarray]]:
    """(what lies under the trained tokens, their rows), with those of an array that the checkpoint's vocabulary does not have."""
    layers = []
    while isinstance(w, Tokens):
        layers.append(w)
        w = w.base
    rows: dict[int, np.ndarray] = {}
    if not isinstance(w, Kind):
        grown = np.asarray(w[vocab:] if path == "embed/embedding" else w[:, vocab:].T)
        rows |= {vocab + i: row for i, row in enumerate(grown)}
    for tokens in reversed(layers):  # the outer one has the last word
        rows |= dict(zip(tokens.ids, np.asarray(tokens.rows)))
    return w, rows


def unserved(params: Any, config: DecoderConfig, source: Path, saved: Collection[str]) -> list[str]:
    """What of the adapter over the checkpoint `source` vLLM would refuse, in words; nothing where it serves it."""
    architecture, grown = load_family(source).architecture, config.vocab > load_config(source).vocab
    kinds = {path: list(_kinds(w)) for path, w in tree.flatten(params).items()}
    ranks = {path: sum(w.rank for w in around if isinstance(w, LowRank)) for path, around in kinds.items()}
    ends = [] if architecture in ADAPT_ENDS else [module_name(path) for path in ENDS if ranks.get(path)]
    most = max(ranks.values())
    found = {
        "DoRA": any(isinstance(w, Dora) for around in kinds.values() for w in around),
        "modules_to_save": saved,
        "trained tokens": grown or any(isinstance(w, Tokens) for around in kinds.values() for w in around),
        "LoRA on a mixture's experts": any(rank and _mixed(path, config) for path, rank in ranks.items()),
        f"LoRA on {' and '.join(ends)} of a {architecture}": ends,
        f"rank {most} (at most {MAX_RANK})": most > MAX_RANK,
    }
    return [what for what, holds in found.items() if holds]


def _mixed(path: str, config: DecoderConfig) -> bool:
    """Is it within a mixture of experts, gates and shared expert included?"""
    return bool(config.experts) and "/mlp/" in path


def _kinds(w: Any) -> Iterator[Kind]:
    while isinstance(w, Kind):
        yield w
        w = w.base


def plain(parts: Added) -> Added:
    """As vLLM reads it, where it reads it at all: of one rank, the scale in b."""
    rank = max((w.rank for w in parts.low.values()), default=0)

    def pad(x: Array, axis: int, rank: int) -> Array:
        return jnp.pad(x, [(0, rank - x.shape[i] if i == axis % x.ndim else 0) for i in range(x.ndim)])

    low = {
        path: replace(w, a=pad(w.a, -1, rank), b=pad(w.b * w.scale, -2, rank), scale=1.0, dropout=0.0)
        for path, w in parts.low.items()
    }
    return replace(parts, low=low)


def adapter_config(parts: Added, base: str) -> dict[str, Any]:
    """adapter_config.json."""
    ranks = {name: w.rank for path, w in parts.low.items() for name in _ends(path, parts)}
    alphas = {name: _whole(w.scale * w.rank) for path, w in parts.low.items() for name in _ends(path, parts)}
    r, alpha = _commonest(ranks, 8), _commonest(alphas, 8)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if parts.scored else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}) or NO_TARGETS,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max((w.dropout for w in parts.low.values()), default=0.0),
        "bias": "none",
        "use_rslora": False,
        "use_dora": bool(parts.magnitude),
        "inference_mode": True,
    }
    patterns = {
        "rank_pattern": {name: x for name, x in ranks.items() if x != r},
        "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
        "modules_to_save": list(dict.fromkeys(name for path in parts.whole for name in _ends(path, parts))),
        # PEFT ties the head's rows to the embedding's by itself
        "trainable_token_indices": {module_of(path.rpartition("/")[0]): sorted(rows) for path, rows in parts.rows.items()},
    }
    config |= {key: value for key, value in patterns.items() if value}
    if parts.adapters:
        widths = {w.up.shape[-2] for w in parts.adapters.values()}
        config |= {"peft_type": "BOTTLENECK", "width": max(widths), "nonlinearity": "silu"}
        config |= {"targets": sorted({module_of(path.rpartition("/")[0]) for path in parts.adapters})}
    return config


def _ends(path: str, parts: Added) -> list[str]:
    """Ends of the names of a leaf's modules: one, and of a tied embedding two."""
    name = module_of(path.rpartition("/")[0])
    return [name, HEAD] if name == EMBED and parts.tied else [name]


def _whole(x: float) -> float:
    return round(x) if abs(x - round(x)) < 1e-9 * abs(x) else x  # 3.0000000000000004 was a 3


def _commonest(values: dict[str, Any], default: Any) -> Any:
    return max(values.values(), key=list(values.values()).count, default=default)


def tensors(parts: Added) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors, in torch's order of axes."""
    return {f"base_model.model.{name}": Tensor(x.dtype, x.shape, lambda x=x: x) for name, x in _named(parts)}  # type: ignore[misc]


def _named(parts: Added) -> Iterator[tuple[str, np.ndarray]]:
    for path, w in parts.low.items():
        a, b = ("lora_embedding_A", "lora_embedding_B") if path == "embed/embedding" else ("lora_A.weight", "lora_B.weight")
        yield from _layers(path, a, w.a, True)
        yield from _layers(path, b, w.b, True)
        if path == "embed/embedding" and parts.tied:  # the head's pair is the embedding's, transposed
            yield f"{HEAD}.lora_A.weight", np.asarray(w.b)
            yield f"{HEAD}.lora_B.weight", np.asarray(w.a)
    for path, magnitude in parts.magnitude.items():
        yield from _layers(path, "lora_magnitude_vector", magnitude)
    for path, base in parts.bases.items():
        yield from _layers(path, "base_layer.weight", base, path.endswith("/kernel"))
    for path, rows in parts.rows.items():
        yield from _layers(path, "token_adapter.trainable_tokens_delta", np.stack([rows[i] for i in sorted(rows)]))
    for path, x in parts.whole.items():
        yield from _layers(path, "bias" if path.endswith("/bias") else "weight", x, path.endswith("/kernel"))
        if path == "embed/embedding" and parts.tied:
            yield f"{HEAD}.weight", np.asarray(x)
    for path, adapter in parts.adapters.items():
        yield from _layers(path, "adapter_down.weight", adapter.down, True)
        yield from _layers(path, "adapter_down.bias", adapter.down_bias)
        yield from _layers(path, "adapter_up.weight", adapter.up, True)
        yield from _layers(path, "adapter_up.bias", adapter.up_bias)


def _layers(path: str, part: str, x: Any, flip: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) for each layer of a stack, or for the one that there is."""
    node, host = path.rpartition("/")[0], np.asarray(x)
    for layer, one in enumerate(host) if node.startswith("layers/") else [(None, host)]:
        yield f"{module_of(node, layer)}.{part}", one.swapaxes(-1, -2) if flip else one
