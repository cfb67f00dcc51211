"""A mixture's block beside transformers' own and beside a loop over all experts, on this machine's CPU in float32.

    python bench/moe.py [--tokens=1024]

Qwen3-MoE's proportions at an eighth of the width: D 256, F 96, 32 experts of which 4 are active. Prints milliseconds of the
forward pass, and of forward and backward; and of one token, where reading weights is all there is to it.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from sftjax.models.config import DecoderConfig, Experts
from sftjax.models.moe import Mixture

D, F, E, ACTIVE = 256, 96, 32, 4
CONFIG = DecoderConfig(
    vocab=8, width=D, mlp_width=F, layers=1, heads=4, kv_heads=4, head_dim=64, experts=Experts(E, ACTIVE, F), activation="silu"
)


def best(run, times=7):
    """Milliseconds of the fastest of some runs."""
    run()
    took = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return 1e3 * min(took)


def ours(p, x):
    return Mixture(CONFIG).apply({"params": p}, x, jnp.ones(x.shape[:2], jnp.int32))[0]


def all_experts(p, x):
    """Every expert for every token, one after the other."""
    probs = jax.nn.softmax(x @ p["router"]["kernel"])
    top, chosen = jax.lax.top_k(probs, ACTIVE)
    weights = jnp.zeros_like(probs).at[0, jnp.arange(x.shape[1])[:, None], chosen[0]].set(top[0] / top[0].sum(-1, keepdims=True))

    def add(y, expert):
        gate, up, down, weight = expert
        return y + weight[..., None] * ((jax.nn.silu(x @ gate) * (x @ up)) @ down), None

    kernels = (p["experts"][name]["kernel"] for name in ("gate", "up", "down"))
    return jax.lax.scan(add, jnp.zeros_like(x), (*kernels, jnp.moveaxis(weights, -1, 0)))[0]


def in_jax(fn, p, x):
    forward, both = jax.jit(fn), jax.jit(jax.grad(lambda p, x: fn(p, x).sum(), (0, 1)))
    return tuple(best(lambda f=f: jax.block_until_ready(f(p, x))) for f in (forward, both))


def in_torch(p, x):
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    shape = {"hidden_size": D, "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": ACTIVE}
    config = Qwen3MoeConfig(**shape, norm_topk_prob=True)
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config)
    turned = {name: np.asarray(p["experts"][name]["kernel"]).swapaxes(1, 2) for name in ("gate", "up", "down")}
    with torch.no_grad():
        block.gate.weight.copy_(torch.tensor(np.asarray(p["router"]["kernel"]).T))
        block.experts.gate_up_proj.copy_(torch.tensor(np.concatenate([turned["gate"], turned["up"]], 1)))
        block.experts.down_proj.copy_(torch.tensor(turned["down"]))
    inputs = torch.tensor(np.asarray(x), requires_grad=True)

    def forward():
        with torch.no_grad():
            return block(inputs)

    same = np.abs(forward().numpy() - np.asarray(ours(p, x))).max()
    return best(forward), best(lambda: block(inputs).sum().backward()), same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    tokens = parser.parse_args().tokens
    shapes = jax.eval_shape(lambda: Mixture(CONFIG).init(jax.random.key(0), jnp.ones((1, 1, D)), jnp.ones((1, 1), jnp.int32)))
    rng = np.random.default_rng(0)
    p = jax.tree.map(lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape, np.float32)), shapes["params"])
    print(f"{'ms':>10} {'ours':>16} {'transformers':>16} {'all experts':>16}")
    for n in (tokens, 1):
        x = jnp.asarray(rng.standard_normal((1, n, D), np.float32))
        *torch_ms, apart = in_torch(p, x)
        assert apart < 1e-4, apart
        columns = in_jax(ours, p, x), torch_ms, in_jax(all_experts, p, x)
        print(f"{n:>4} token{'s' if n > 1 else ' '}" + "".join(f"{f:>8.2f} {b:>7.2f}" + " " for f, b in columns))


if __name__ == "__main__":
    main()
