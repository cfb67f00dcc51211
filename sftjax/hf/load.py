"""A Hugging Face checkpoint -> DecoderConfig and parameters, read leaf by leaf straight into the target sharding.

    model.layers.{0..L-1}.self_attn.q_proj.weight, each [out, in]  ->  layers/attn/q/kernel [L, in, out]

Every shard of a leaf is assembled from just the bytes it needs; the host holds one leaf at a time. What is stored in MXFP4 is
read as bfloat16.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sftjax import sharding, tree
from sftjax.config import UserError
from sftjax.hf.mxfp4 import Packed, unpacked
from sftjax.hf.tensors import Stored, read_dir
from sftjax.models.config import DecoderConfig
from sftjax.models.families import Family, Name, config_from_hf, family_of
from sftjax.weights.quantize import Quantised

# What a download fetches: no .bin twins, no `original/` copies.
WANTED = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "adapter_*"]
WANTED += ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja"]
WANTED += ["*.py"]  # a tokenizer's own, which only model.trust_remote_code runs
NOT_PARAMETERS = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old exports saved


def resolve(path: str | Path, revision: str | None = None, needs: str = "config.json") -> Path:
    """The directory of a local checkpoint or of a hub id's snapshot (downloaded once). Raises UserError."""
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / needs).is_file():
            raise UserError(f"{path}: the directory has no {needs}")
        if revision:
            raise UserError(f"model.revision={revision}: {path} is a local directory, which has no revisions; leave it out")
        return local
    if local.exists():
        raise UserError(f"{path}: a file, where a checkpoint's directory is needed")
    if "://" in str(path):
        raise UserError(f"{path}: only local directories and hub ids can be read; copy it to a local directory first")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or str(path).startswith("."):
        raise UserError(f"{path}: no such directory")
    return _download(str(path), revision, needs)


def _download(repo: str, revision: str | None, needs: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f"{repo} at revision {revision}" if revision else repo
    try:
        found = Path(snapshot_download(repo, revision=revision, allow_patterns=WANTED))
    except errors.GatedRepoError as e:
        raise UserError(f"{repo}: needs its licence accepted on huggingface.co and a login (`hf auth login`)") from e
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as e:
        raise UserError(f"{repo}: neither a local directory nor a model on the Hugging Face hub") from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"{at}: the hub has no such revision") from e
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as e:
        raise UserError(f"{at}: not a local directory, not in the hub's cache, and the hub cannot be reached") from e
    except (errors.HfHubHTTPError, OSError) as e:
        raise UserError(f"{at}: the download failed ({str(e).splitlines()[0]})") from e
    if not (found / needs).is_file():
        raise UserError(f"{at}: the hub's repository has no {needs}")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file is missing or is not one."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{file}: not JSON ({e})") from e
    if not isinstance(raw, dict):
        raise UserError(f"{file}: not a JSON object")
    return raw


def load_config(directory: Path) -> DecoderConfig:
    """The DecoderConfig of a checkpoint directory. Raises UserError that names the key that is not supported."""
    file = Path(directory) / "config.json"
    try:
        return config_from_hf(read_json(file))
    except UserError as e:
        raise e if str(e).startswith(str(file)) else UserError(f"{file}: {e}") from e


def check_length(length: int, config: DecoderConfig, directory: str | Path) -> None:
    """Refuses a row length beyond the model's positions, of which it has learnt nothing."""
    if length > config.reach:
        raise UserError(
            f"data.max_length={length} is more than the {config.reach} positions of {directory}; "
            f"use --config.data.max_length={config.reach}"
        )


def load_family(directory: Path) -> Family:
    """The family of a checkpoint directory."""
    return family_of(read_json(Path(directory) / "config.json"))


def load_params(
    directory: Path,
    config: DecoderConfig,
    *,
    shardings: Any = None,
    dtype: Any = None,
    quantisers: Mapping[str, Callable[[jax.Array], Quantised]] | None = None,
) -> Any:
    """The parameters of a checkpoint directory as nested dicts of jax arrays.

    `shardings` is a tree of the parameters' shape (None: the first device); `dtype` None keeps the checkpoint's own,
    leaf by leaf. The layers' kernels at the paths of `quantisers` are quantised as they come: the devices hold one layer's
    kernel in full at a time. Raises UserError where tensors are missing, unexpected, of the wrong shape, or files are damaged.
    """
    directory = Path(directory)
    names = load_family(directory).names(config)
    stored = unpacked(read_dir(directory))
    _check(directory, config, names, stored)
    places = {} if shardings is None else tree.flatten(shardings)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = {}
    for path, name in names.items():
        parts = [stored[hf] for hf in name.hf()]
        place, quantise = places.get(path, here), (quantisers or {}).get(path)
        leaves[path] = _quantised(path, name, parts, place, quantise) if quantise else _leaf(name, parts, place, dtype)
    return tree.unflatten(leaves)


def _check(directory: Path, config: DecoderConfig, names: dict[str, Name], stored: dict[str, Stored | Packed]) -> None:
    expected = {hf: name for name in names.values() for hf in name.hf()}
    if missing := [hf for hf in expected if hf not in stored]:
        raise UserError(f"{directory}: {_some(missing)} missing from the checkpoint, though its config.json asks for them")
    extra = [hf for hf in stored if hf not in expected and not NOT_PARAMETERS.search(hf)]
    if config.tied and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        head, embedding = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
        if head.shape != embedding.shape or not np.array_equal(head.view(), embedding.view()):
            raise UserError(f"{directory}: tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight")
    if extra:
        raise UserError(f"{directory}: the checkpoint holds {_some(extra)}, which its config.json does not account for")
    for hf, name in expected.items():
        shape = name.shape[::-1] if name.transposed else name.shape
        if stored[hf].shape != shape:
            raise UserError(f"{directory}: {hf} is {list(stored[hf].shape)}; config.json makes it {list(shape)}")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more tensors" if len(names) > 3 else shown


def _leaf(name: Name, parts: list[Stored | Packed], place: Any, dtype: Any) -> jax.Array:
    """One leaf from its tensors. Each device's shard is assembled when jax asks for it, and handed over uncopied."""
    dtype = np.dtype(dtype or functools.reduce(jnp.promote_types, [p.dtype for p in parts]))
    lead, shape = len(name.stacked), (*name.stacked, *name.shape)

    def shard(index: Any) -> np.ndarray:  # a slice for each axis
        out = _aligned(tuple(len(range(*s.indices(n))) for s, n in zip(index, shape)), dtype)
        wanted = np.arange(len(parts)).reshape(name.stacked)[index[:lead]]
        for at, part in np.ndenumerate(wanted):
            own = index[lead:]
            _copy(parts[part].take(own[::-1]).T if name.transposed else parts[part].take(own), out[at])
        return out

    return jax.make_array_from_callback(shape, place, shard)


def _quantised(
    path: str, name: Name, parts: list[Stored | Packed], place: Any, quantise: Callable[[jax.Array], Quantised]
) -> Quantised:
    """The stack [L, ...] of layers' kernels, each quantised before the next is read."""
    (layers, *experts), stacked = name.stacked, place
    one = replace(name, stacked=tuple(experts))
    kernel = jax.ShapeDtypeStruct((*name.stacked, *name.shape), functools.reduce(jnp.promote_types, [p.dtype for p in parts]))
    like = jax.eval_shape(quantise, kernel)
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
        stacked = tree.flatten(sharding.shardings(tree.unflatten({path: like}), place.mesh))[path]

    empty, put = _stacking(quantise, like, stacked)
    stack = empty()
    each = len(parts) // layers
    for i in range(layers):
        stack = put(stack, _leaf(one, parts[i * each : (i + 1) * each], place, kernel.dtype), i)
    return stack


@functools.cache
def _stacking(quantise: Callable[[jax.Array], Quantised], like: Quantised, place: Any) -> tuple[Callable, Callable]:
    """(an empty stack, a layer's kernel put into it): programs that all leaves of one shape share."""

    def empty() -> Quantised:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def put(stack: Quantised, layer: jax.Array, i: int) -> Quantised:
        return jax.tree.map(lambda s, x: s.at[i].set(x), stack, quantise(layer))

    return jax.jit(empty, out_shardings=place), jax.jit(put, donate_argnums=0, out_shardings=place)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # 64 bytes: what lets jax on CPU take the buffer over instead of copying it
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _copy(view: np.ndarray, into: np.ndarray) -> None:
    # by 64 columns: a transposing copy of whole rows misses the cache at every element, and takes three times as long
    if view.ndim < 2:
        np.copyto(into, view, casting="unsafe")
        return
    for i in range(0, view.shape[1], 64):
        np.copyto(into[:, i : i + 64], view[:, i : i + 64], casting="unsafe")


def resize_embeddings(params: Any, config: DecoderConfig, vocab: int, new: Sequence[int] = ()) -> tuple[Any, DecoderConfig]:
    """Room for `vocab` tokens, where the rows of the tokens `new`, and any that had none, start as the mean of those before them.

    A vocabulary that is large enough already (Qwen pads its own) keeps its size.
    """
    params = grow(params, vocab, new)
    return params, replace(config, vocab=params["embed"]["embedding"].shape[0])


def grow(params: Any, vocab: int, new: Sequence[int] = ()) -> Any:
    """The parameters' half of `resize_embeddings`."""
    leaves = tree.flatten(params)
    rows = leaves["embed/embedding"].shape[0]
    if vocab <= rows and not new:
        return params
    size, had = max([vocab, rows, *(i + 1 for i in new)]), min([rows, *new])
    fresh = np.array(sorted({*new, *range(rows, size)}))
    for path, axis in (("embed/embedding", 0), ("head/kernel", 1)):
        if path in leaves:
            old = leaves[path]
            mean = jax.lax.slice_in_dim(old, 0, had, axis=axis).astype(jnp.float32).mean(axis, keepdims=True).astype(old.dtype)
            room = [(0, size - rows) if i == axis else (0, 0) for i in range(2)]
            where = (fresh,) if axis == 0 else (slice(None), fresh)
            leaves[path] = jnp.pad(old, room).at[where].set(mean)
    return tree.unflatten(leaves)
