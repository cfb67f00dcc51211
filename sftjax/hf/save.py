"""Parameters -> a Hugging Face checkpoint that transformers, vLLM and the like read: weights merged, tokenizer beside them.

The mirror of `load`: layers unstacked, kernels transposed back, one tensor on the host at a time. A tensor that training
did not touch is copied from the source's own bytes. Of MXFP4 comes bfloat16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sftjax import tree
from sftjax.config import UserError
from sftjax.hf.load import load_family, read_json
from sftjax.hf.mxfp4 import Packed, unpacked
from sftjax.hf.staging import staged
from sftjax.hf.tensors import Stored, Tensor, read_dir, write_dir
from sftjax.models.config import DecoderConfig
from sftjax.models.families import Name, config_to_hf
from sftjax.weights.kinds import dense

TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER += ["vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"]
MORE_TEMPLATES = "additional_chat_templates"  # a folder of those that are not the default: tool_use.jinja


def save(
    params: Any,
    config: DecoderConfig,
    *,
    source: Path,
    out: str | Path,
    dtype: Any = None,
    tokenizer: Any = None,
    template: str | None = None,
    stop_ids: Sequence[int] = (),
    pad_id: int | None = None,
    max_shard_bytes: float = 5e9,
    untouched: Collection[str] = (),
    check: Callable[[Path], Any] | None = None,
) -> None:
    """Writes `params` as a checkpoint of `source`'s family to `out`. Raises UserError; `out` then stays as it was.

    params     may hold LowRank kernels: they are merged in float32, a layer at a time
    source     the checkpoint trained from; one with a config.json and no weights will do
    dtype      of every tensor; None = each tensor's own in the source, else the parameter's
    tokenizer  where training added tokens; None copies the source's files
    template   the chat template in force; None = as the tokenizer has it
    stop_ids   end a turn: added to the eos ids of generation_config.json
    pad_id     of a score head: the token that pads, by which transformers finds the last one that counts
    untouched  paths of leaves that training left alone: their tensors are the source's, byte for byte
    check      called with the finished directory before it takes `out`'s place, to raise where it will not do
    """
    source = Path(source)
    names = load_family(source).names(config)
    stored = unpacked(read_dir(source)) if any(source.glob("*.safetensors")) else {}
    leaves = tree.flatten(params)
    if strange := set(leaves) ^ set(names):
        raise UserError(f"{sorted(strange)[0]} does not fit the checkpoint's config.json")
    tensors: dict[str, Tensor] = {}
    for path, name in names.items():
        tensors |= _tensors(name, leaves[path], stored, dtype, path in untouched)
    with staged(out, source) as tmp:
        write_dir(tmp, tensors, max_shard_bytes)
        written = {t.dtype.name for t in tensors.values()} if dtype or not stored else set()
        _write_configs(tmp, source, config, written, stop_ids, pad_id)
        save_tokenizer(tmp, source, tokenizer, template)
        if check:
            check(tmp)


def _tensors(name: Name, leaf: Any, stored: Mapping[str, Stored | Packed], dtype: Any, untouched: bool) -> dict[str, Tensor]:
    out = {}
    shape = name.shape[::-1] if name.transposed else name.shape
    for hf, index in zip(name.hf(), np.ndindex(name.stacked)):
        old = stored.get(hf)
        own = old.dtype if old else jax.eval_shape(dense, leaf).dtype
        to = np.dtype(dtype or own)
        if untouched and old and old.shape == shape:
            fetch = partial(_stored, old, to)
        else:
            fetch = partial(_host, hf, leaf, index, name.transposed, to)
        out[hf] = Tensor(to, shape, fetch)
    return out


def _stored(old: Stored | Packed, dtype: np.dtype) -> np.ndarray:
    return old.view().astype(dtype, copy=False)


def _host(hf: str, leaf: Any, index: tuple[int, ...], transposed: bool, dtype: np.dtype) -> np.ndarray:
    with jax.default_matmul_precision("highest"):  # else accelerators would merge in bfloat16
        x = np.asarray(_one(leaf, index, transposed, dtype))
    if not np.isfinite(x).all():
        hint = "; float16 ends at 65504, export in bfloat16 or float32" if dtype == np.float16 else ""
        raise UserError(f"{hf} holds values that are not finite{hint}")
    return x


@partial(jax.jit, static_argnums=(2, 3))
def _one(leaf: Any, index: tuple[int, ...], transposed: bool, dtype: np.dtype) -> jax.Array:
    """The matrix at a layer, or at a layer's expert, of a stack."""
    x = dense(jax.tree.map(lambda x: x[index], leaf), dtype)
    return x.T if transposed else x


def _write_configs(
    tmp: Path, source: Path, config: DecoderConfig, dtypes: set[str], stop_ids: Sequence[int], pad_id: int | None
) -> None:
    raw = config_to_hf(config, read_json(source / "config.json"))
    if pad_id is not None:
        raw["pad_token_id"] = pad_id
    if len(dtypes) == 1:  # transformers 4 reads torch_dtype, 5 reads both
        raw |= dict.fromkeys([key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"], *dtypes)
    _write_json(tmp / "config.json", raw)
    if config.labels:
        return  # it generates nothing

    file = source / "generation_config.json"
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    generation = read_json(file) if file.is_file() else ids
    eos = generation.get("eos_token_id")
    known = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if stop_ids:
        both = list(dict.fromkeys([*known, *map(int, stop_ids)]))
        generation["eos_token_id"] = both if len(both) > 1 else both[0]
    _write_json(tmp / "generation_config.json", generation)


def save_tokenizer(directory: Path, source: Path, tokenizer: Any, template: str | None) -> None:
    """The tokenizer's files: the source's own, or `tokenizer`'s where tokens were added; and the template in force.

    Where that is still the default among several, they all are; another one is in force alone, for conversations with tools too.
    """
    config = directory / "tokenizer_config.json"
    if tokenizer is None:
        for name in TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        if (source / MORE_TEMPLATES).is_dir():
            shutil.copytree(source / MORE_TEMPLATES, directory / MORE_TEMPLATES)
    else:
        tokenizer.save_pretrained(directory)
        # transformers 5 writes class names that 4 does not know: keep the one that the source had
        old = source / "tokenizer_config.json"
        if old.is_file() and "tokenizer_class" in (had := read_json(old)):
            _write_json(config, read_json(config) | {"tokenizer_class": had["tokenizer_class"]})
    held = templates(directory)
    if template is not None and not (len(held) > 1 and held.get("default") == template):
        shutil.rmtree(directory / MORE_TEMPLATES, ignore_errors=True)
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        if config.is_file() and "chat_template" in (raw := read_json(config)):
            _write_json(config, raw | {"chat_template": template})


def templates(directory: Path) -> dict[str, str]:
    """The chat templates of a tokenizer's directory by name, as transformers finds them: files before what its config holds."""
    files = [("default", directory / "chat_template.jinja")]
    files += [(path.stem, path) for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))]
    if found := {name: path.read_text(encoding="utf-8") for name, path in files if path.is_file()}:
        return found
    config = directory / "tokenizer_config.json"
    held = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(held, list):
        return {each["name"]: each["template"] for each in held}
    return {"default": held} if held else {}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
