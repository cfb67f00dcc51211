"""One Decoder for every family: embedding, L blocks of attention and gated MLP, a last norm.

    x = x + o(attention(rope(q(n1 x)), rope(k(n1 x)), v(n1 x)));  x = x + down(act(gate(n2 x)) * up(n2 x))

What else a family may have (norms after as well, soft caps, scales, experts) is a field of its DecoderConfig. Layers are one
scanned body over stacked parameters [L, ...]; unrolled they read the same parameters. The output head is no part of the
module: `head(params, config)` is a weight [D, V], so that losses apply it to blocks of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from sftjax import sharding
from sftjax.data.batch import Batch
from sftjax.models import attention
from sftjax.models.config import DecoderConfig
from sftjax.models.layers import MLP, Dense, Embed, RMSNorm, parameter, rope, rotate, scaled
from sftjax.models.moe import Mixture, Routed
from sftjax.weights import kinds

# by name, not by kind of operation: on CPU attention's own products are inside loops and would be saved whole
REMAT = {
    "minimal": jax.checkpoint_policies.save_only_these_names("product", "attention"),
    "block": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(), names_which_can_be_offloaded=("layer",), offload_src="device", offload_dst="pinned_host"
    ),
}


class Cache(NamedTuple):
    """Keys [L, B, K, H, S] and values [L, B, K, S, H], as their products read them; slot s of a row holds its position s.

    Scanned layers hand on the whole cache and each writes its own slots: as an input and output of the scan, every
    decoding step would copy all of it. Unrolled ones take and give their own.
    """

    k: Array
    v: Array

    def write(self, layer: Any, positions: Array, k: Array, v: Array) -> Cache:
        """With k and v [B, T, K, H] at positions [B, T] of `layer`, (number,) or of its own cache (); without a slot: dropped."""
        B, _, K, _ = k.shape
        row, head, slot = jnp.arange(B)[:, None, None], jnp.arange(K), positions[:, :, None]
        return Cache(
            self.k.at[*layer, row, head, :, slot].set(k.astype(self.k.dtype), mode="drop"),
            self.v.at[*layer, row, head, slot].set(v.astype(self.v.dtype), mode="drop"),
        )


class Output(NamedTuple):
    """hidden [B, T, D] after the last norm, the head [D, V] that makes logits of it, and what the experts' routers did."""

    hidden: Array
    head: kinds.Weight
    routed: Routed | None = None


class PerLayer(NamedTuple):
    """What layers differ in, by their number: each [L], or None where all are alike."""

    number: Array
    window: Array | None  # which of the distinct windows
    rope: Array | None  # which of the distinct rotary embeddings
    cache: Cache | None  # of unrolled layers


def distinct(each: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(each))


def which(each: tuple[Any, ...]) -> Array | None:
    """The number that each one has among the distinct, [L], or None where all are alike."""
    found = distinct(each)
    return jnp.asarray([found.index(one) for one in each], jnp.int32) if len(found) > 1 else None


class Sinks(nn.Module):
    """A logit of each head's own, [N]: as a bias it stays frozen beside LoRA, and no decay pulls at it."""

    heads: int
    std: float

    @nn.compact
    def __call__(self) -> Array:
        return parameter(self, "bias", nn.initializers.normal(self.std), (self.heads,))


class Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        rotary: tuple[Array, Array],
        segments: Array,
        positions: Array,
        per_layer: PerLayer,
        cache: Cache | None,
    ) -> tuple[Array, Cache | None]:
        c = self.config
        B, T, _ = x.shape

        def norm(name: str, y: Array, n: int) -> Array:
            y = y.reshape(B, T, n, c.head_dim) if c.qk_norm == "head" else y
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(y) if c.qk_norm else y

        sizes = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
        if c.fused_qkv:
            ends = [c.heads * c.head_dim, (c.heads + c.kv_heads) * c.head_dim]
            qkv = Dense(sum(sizes.values()) * c.head_dim, c.qkv_bias, c.init_std, name="qkv")(x)
            q, k, v = jnp.split(qkv, ends, -1)
        else:
            q, k, v = (Dense(n * c.head_dim, c.qkv_bias, c.init_std, name=name)(x) for name, n in sizes.items())
        q, k = norm("q_norm", q, c.heads), norm("k_norm", k, c.kv_heads)
        q, k, v = (y.reshape(B, T, n, c.head_dim) for y, n in zip((q, k, v), sizes.values()))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        how: dict[str, Any] = {
            "windows": distinct(c.windows) or (None,),
            "which": per_layer.window,
            "scale": c.head_dim**-0.5 if c.attn_scale is None else c.attn_scale,
            "softcap": c.attn_softcap,
            "sinks": Sinks(c.heads, c.init_std, name="sinks")() if c.sinks else None,
        }
        if cache is None:
            y = attention.attention(q, k, v, segments, **how)
        else:
            layer = () if per_layer.cache else (per_layer.number,)
            cache = cache.write(layer, positions, k, v)
            y = attention.cached_attention(q, cache.k[layer], cache.v[layer], positions, **how)
        return Dense(c.width, c.o_bias, c.init_std, name="o")(y.reshape(B, T, -1)), cache


class Block(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache | None], per_layer: PerLayer, rotaries: Any, segments: Array, positions: Array
    ) -> tuple[tuple[Array, Cache | None], tuple[Routed | None, Cache | None]]:
        c = self.config
        x, whole = carry
        cache = per_layer.cache or whole
        x = checkpoint_name(x, "layer")
        rotary = rotaries[0] if per_layer.rope is None else jax.tree.map(lambda *each: jnp.stack(each)[per_layer.rope], *rotaries)

        def before(name: str, x: Array) -> Array:
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x) if c.pre_norms else x

        def add(x: Array, name: str, y: Array) -> Array:
            if c.post_norms:
                y = RMSNorm(c.norm_eps, c.norm_offset, name=name)(y)
            along = sharding.along(x.shape[1]) if cache is None else None
            return sharding.constrain(x + scaled(y, c.residual_scale), sharding.BATCH, along, None)

        y = before("attn_norm", x)
        y, cache = Attention(c, name="attn")(y, rotary, segments, positions, per_layer, cache)
        x = add(x, "attn_post_norm", y)
        # Hugging Face calls two different norms post_attention_layernorm, and so two names here
        y = before("mlp_pre_norm" if c.post_norms else "mlp_norm", x)
        y, routed = Mixture(c, name="mlp")(y, segments) if c.experts else (MLP(c, name="mlp")(y), None)
        x = add(x, "mlp_post_norm", y)
        return ((x, whole), (routed, cache)) if per_layer.cache else ((x, cache), (routed, None))


class Decoder(nn.Module):
    """tokens, segments, positions [B, T] -> (hidden [B, T, D], cache, routed). `dtype` is the compute dtype.

    `on_embed` maps the embeddings [B, T, D] before the first layer: the one hook that NEFTune needs. `lower` is the
    number of layers in a first stack of their own (`weights.select.cut`). `lengths` [B, T or 1] are the rows' whole lengths where
    only some of their columns come at once.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    scan: bool = True
    remat: str = "none"
    lower: int = 0

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        cache: Cache | None = None,
        on_embed: Callable[[Array], Array] | None = None,
        lengths: Array | None = None,
    ) -> tuple[Array, Cache | None, Routed | None]:
        c = self.config
        x = Embed(c.vocab, c.width, self.dtype, c.init_std, name="embed")(tokens)
        x *= jnp.asarray(c.embed_scale, x.dtype)  # rounded first, as in the checkpoints that have one
        along = sharding.along(x.shape[1]) if cache is None else None
        x = sharding.constrain(on_embed(x) if on_embed else x, sharding.BATCH, along, None)
        rotaries = [rope(positions, segments, c.head_dim, c.max_positions, r, lengths) for r in distinct(c.ropes) or (c.rope,)]
        whole, own = (cache, None) if self.scan else (None, cache)
        per_layer = PerLayer(jnp.arange(c.layers), which(c.windows), which(c.ropes), own)
        stacks = {"lower": (0, self.lower), "layers": (self.lower, c.layers)}
        carry, made = (x, whole), list[Any]()
        for name, (start, end) in stacks.items():
            if start < end:
                here = jax.tree.map(lambda x, start=start, end=end: x[start:end], per_layer)
                carry, of_stack = self.stack(end - start, name)(carry, here, rotaries, segments, positions)
                made.append(of_stack)
        x, whole = carry
        x = RMSNorm(c.norm_eps, c.norm_offset, name="final_norm")(x)
        routed, own = jax.tree.map(lambda *each: jnp.concatenate(each), *made)
        return scaled(x, c.logit_scale), whole or own, routed

    def stack(self, length: int, name: str) -> nn.Module:
        """`length` blocks as one scanned body."""
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=length,
            unroll=1 if self.scan else length,
        )
        return layers(self.config, name=name)


def head(params: Any, c: DecoderConfig) -> kinds.Weight:
    """The output weight [D, V]: the head's kernel, or the embedding transposed where they are tied. Of a score head [D, C]."""
    if c.labels:
        return params["score"]["kernel"]
    kernel = params["head"]["kernel"] if "head" in params else kinds.transpose(params["embed"]["embedding"])
    return kinds.Capped(kernel, c.logit_softcap) if c.logit_softcap else kernel


def forward(model: Decoder) -> Callable[..., Output]:
    """`(params, batch, key=None, on_embed=None) -> Output`: what losses are made from. A key turns dropout on."""

    def run(params: Any, batch: Batch, key: Array | None = None, on_embed: Callable[[Array], Array] | None = None) -> Output:
        rngs = None if key is None else {"dropout": key}
        arrays = batch.tokens, batch.segments, batch.positions
        hidden, _, routed = model.apply({"params": params}, *arrays, on_embed=on_embed, rngs=rngs)  # type: ignore[misc]
        return Output(hidden, head(params, model.config), routed)

    return run


def init(c: DecoderConfig, key: Array) -> Any:
    """Random float32 parameters of the config's shape, heads and all."""
    one = jnp.zeros((1, 1), jnp.int32)
    params = Decoder(c).init(key, one, one, one)["params"]
    if c.labels:
        return params | {"score": {"kernel": jnp.zeros((c.width, len(c.labels)))}}
    if not c.tied:
        params["head"] = {"kernel": c.init_std * jax.random.normal(jax.random.fold_in(key, 1), (c.width, c.vocab))}
    return params


@functools.cache
def shapes(c: DecoderConfig) -> Any:
    """Of what `init` makes: shapes and dtypes. Shared by all who ask, so not to be changed."""
    return jax.eval_shape(lambda: init(c, jax.random.key(0)))


def init_cache(c: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    lead = (c.layers, batch, c.kv_heads)
    return Cache(jnp.zeros((*lead, c.head_dim, length), dtype), jnp.zeros((*lead, length, c.head_dim), dtype))
