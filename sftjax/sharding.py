"""Where arrays live: the mesh, one table of logical axes, and the sharding of any leaf of any kind of weight.

    data      splits the batch
    fsdp      splits the batch and every kernel's width (ZeRO-3)
    expert    splits the batch and a mixture's experts (`models.moe`)
    sequence  splits each row of the batch (`models.attention`)
    tensor    splits heads, the MLP's inner width and the vocabulary

A dimension that does not divide is an error naming leaf and axis. docs/sharding.md says which axis is for what.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sftjax import tree
from sftjax.config import UserError

MESH = ("data", "fsdp", "expert", "sequence", "tensor")  # neighbours in the last change most between them
BATCH = ("data", "fsdp", "expert")
SEQUENCE, EXPERT, HEADS = "sequence", "expert", "tensor"

# logical axis -> mesh axis
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", "expert": "expert", None: None}

# path of a kernel, bias or norm -> its logical axes, the leading layers axis left out
AXES = [
    (r"embed/embedding", ("vocab", "embed")),
    (r"head/kernel", ("embed", "vocab")),
    (r"score/kernel", ("embed", None)),
    (r"attn/(q|k|v|qkv)/kernel", ("embed", "heads")),
    (r"attn/(q|k|v|qkv|sinks)/bias", ("heads",)),
    (r"attn/o/kernel", ("heads", "embed")),
    (r"mlp/(shared/)?(gate|up|gate_up)/kernel", ("embed", "mlp")),
    (r"mlp/(gate|up|gate_up)/bias", ("mlp",)),
    (r"mlp/(shared/)?down/kernel", ("mlp", "embed")),
    (r"mlp/experts/(gate|up|gate_up)/kernel", ("expert", "embed", "mlp")),
    (r"mlp/experts/(gate|up|gate_up)/bias", ("expert", "mlp")),
    (r"mlp/experts/down/kernel", ("expert", "mlp", "embed")),
    (r"mlp/experts/down/bias", ("expert", None)),
    (r"mlp/(router|shared_gate)/kernel", ("embed", None)),
    (r".*(scale|bias)", (None,)),
]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, expert: int = 1) -> Mesh:
    """A mesh over all devices; one axis may be -1, the rest. Raises UserError where the sizes do not multiply out.

    All of them 1 is one device, however many there are.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence, "expert": expert}
    devices = 1 if set(sizes.values()) == {1} else jax.device_count()
    sizes = axis_sizes(sizes, devices, "devices here")
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=jax.devices()[:devices])


def axis_sizes(sizes: Mapping[str, int], devices: int, called: str) -> dict[str, int]:
    """The sizes in the mesh's order with -1, the rest, filled in for so many devices. Raises UserError where they do not
    multiply out."""
    sizes = {name: sizes[name] for name in MESH}
    free = [name for name, n in sizes.items() if n == -1]
    known = math.prod(n for n in sizes.values() if n != -1)
    if len(free) > 1:
        raise UserError(f"mesh: only one axis may be -1, not {' and '.join(free)}")
    shown = " x ".join(f"{k}={v}" for k, v in sizes.items() if v not in (1, -1)) or "one device"
    if free and devices % known:
        raise UserError(f"mesh: {shown} does not divide the {devices} {called}, of which {free[0]} is to take the rest")
    if free:
        sizes[free[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        raise UserError(f"mesh: {shown} does not make the {devices} {called}; set one of --config.mesh.* to -1")
    return sizes


def mesh_in_use() -> Any | None:
    """The mesh set by `jax.set_mesh`, or None where there is none or it holds one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Pins the mesh axes of an activation; nothing on one device."""
    return x if mesh_in_use() is None else jax.lax.with_sharding_constraint(x, P(*axes))


def along(T: int) -> str | None:
    """The mesh axis of T positions: `sequence` where it splits them evenly. A prompt or an answer's next token stays whole."""
    mesh = mesh_in_use()
    return None if mesh is None or T % mesh.shape[SEQUENCE] else SEQUENCE


def columns(T: int) -> int:
    """Into how many parts a row of T positions is split."""
    mesh = mesh_in_use()
    return 1 if mesh is None or along(T) is None else mesh.shape[SEQUENCE]


def batch_shards(mesh: Any) -> int:
    """Over how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def logit_shards() -> int:
    """Over how many devices the logits of a column of a batch are split, by its rows and by the vocabulary."""
    mesh = mesh_in_use()
    return 1 if mesh is None else batch_shards(mesh) * mesh.shape[HEADS]


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """Logical axes of an array at `path`, with leading None for stacked layers."""
    for pattern, axes in AXES:
        if re.search(rf"(^|/){pattern}$", path):
            return (None,) * (ndim - len(axes)) + axes
    raise KeyError(f"no sharding rule for {path}")


def shardings(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every array of `params` (arrays or ShapeDtypeStructs), inside kinds of weight too."""
    return tree.map_leaves(lambda path, x: _leaf(path, x, logical_axes(path, len(x.shape)), mesh), params)


def placed(params: Any, mesh: Mesh) -> Any:
    """`params` on the mesh; what lies there already is the same array."""
    return jax.tree.map(lambda x, home: x if x.sharding == home else jax.device_put(x, home), params, shardings(params, mesh))


def parts(weight: Any, axes: tuple[str | None, ...], spec: Callable[[tuple[str | None, ...]], Any]) -> Any:
    """A tree of `weight`'s shape: spec(logical axes) of each of its arrays, where `axes` are those of the kernel."""
    if not dataclasses.is_dataclass(weight) or isinstance(weight, type):
        return spec(axes)
    each = weight.axes(axes)  # type: ignore[attr-defined]  # a kind says which axes its parts have, and kinds nest
    return dataclasses.replace(weight, **{part: parts(getattr(weight, part), a, spec) for part, a in each.items()})


def gathered(weight: Any, axes: tuple[str | None, ...]) -> Any:
    """`weight` with what `fsdp` splits of it gathered in the form it is stored in, so that a quantised kernel travels as codes.

    A constraint on the dequantised kernel would send the wide copy.
    """
    if mesh_in_use() is None:
        return weight
    whole = parts(weight, axes, lambda a: P(*(None if RULES[x] == "fsdp" else RULES[x] for x in a)))
    return jax.tree.map(jax.lax.with_sharding_constraint, weight, whole)


def _leaf(name: str, value: Any, axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> Any:
    if value is None:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        each = value.axes(axes)  # type: ignore[attr-defined]  # as in `parts`
        placed = {part: _leaf(f"{name}.{part}", getattr(value, part), a, mesh) for part, a in each.items()}
        return dataclasses.replace(value, **placed)
    spec = P(*(RULES[a] for a in axes))
    for dim, axis in zip(value.shape, spec):
        if axis is not None and dim % mesh.shape[axis]:
            raise UserError(
                f"{name} {tuple(value.shape)}: {dim} does not divide over {mesh.shape[axis]} devices; "
                f"use --config.mesh.{axis}={math.gcd(dim, mesh.shape[axis])}"
            )
    return NamedSharding(mesh, spec)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of every [B, T] array of a batch."""
    return NamedSharding(mesh, P(BATCH, SEQUENCE))
