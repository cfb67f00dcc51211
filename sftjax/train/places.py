"""Where the arrays of a training state lie on the mesh, and how their memory is handed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sftjax.train import optim
from sftjax.train.step import State


def freed(state: State) -> State:
    """Shapes and places of `state`, whose memory makes room for what is restored."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(lambda x: x.delete(), state)
    return like


def begin(begun: Callable[[Any], State], trainable: Any, mesh: Mesh, *, offload: bool = False) -> State:
    """`begun(trainable)`, whose arrays are made where they lie: on one device the optimiser's moments might not fit.

    `trainable` is given away.
    """
    where = homes(jax.eval_shape(begun, trainable), trainable, mesh, offload=offload)
    return jax.jit(begun, donate_argnums=0, out_shardings=where)(trainable)


def homes(state: State, trainable: Any, mesh: Mesh | AbstractMesh, *, offload: bool = False) -> Any:
    """Where each array of `state` lies: the optimiser's moments where their parameters lie, or with `offload` in its host; all
    else on every device."""
    known = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(trainable)}

    def home(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path)
        like = next((p for p_name, p in known.items() if name.endswith(p_name) and p.shape == x.shape), None)
        place = NamedSharding(mesh, P()) if like is None else like.sharding
        return optim.host(x, place) if offload and name.startswith(".opt_state") else place

    return jax.tree_util.tree_map_with_path(home, state)
