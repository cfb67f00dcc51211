"""cuDNN's kernel is told of each text where it begins and how long it is; what it cannot do goes the other way.

There is no GPU in most places where this runs: the kernel's place is taken by one written out, its arguments are jax's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from tiny import assert_trees_close, batch, config, params

from sftjax.losses import masked_xent
from sftjax.models import attention, flash
from sftjax.models.blocks import How
from sftjax.models.decoder import Decoder, forward

T, N, K, H = 24, 4, 2, 8
ROWS = [[10, 14], [5, 1, 7, 11], [24], [-3, 9], [6]]
HAS_GPU = any(d.platform == "gpu" for d in jax.devices())


def qkv(rows=5, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, (rows, T, n, H), dtype) for k, n in zip(keys, (N, K, K, N))]


def reference(q, k, v, segments):
    return attention._attention(q, k, v, segments, jnp.zeros((), jnp.int32), how=How((None,), H**-0.5, None))


def as_cudnn_reads_it(q, k, v, segments, *, scale):
    """What the kernel does with lengths and offsets: texts of the flattened rows, each causal by itself."""
    lengths, offsets = flash.texts(segments, 12)
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    lengths, _, offsets, also = cudnn._fix_seqlen_offsets(lengths, lengths, offsets, offsets, q, k)
    np.testing.assert_array_equal(offsets, also)
    flat = [np.asarray(x).reshape(-1, N, H) for x in (q, k, v)]
    out = np.full(flat[0].shape, np.nan, np.float32)
    for n, at in zip(np.ravel(lengths), np.ravel(offsets)[: lengths.size] // (N * H)):
        mine = [x[at : at + n] for x in flat]
        scores = np.einsum("tnh,snh->nts", *mine[:2]) * scale + np.where(np.tri(n), 0, -np.inf)
        out[at : at + n] = np.einsum("nts,snh->tnh", np.asarray(jax.nn.softmax(scores)), mine[2])
    return out.reshape(q.shape)


def test_texts_are_where_cudnn_looks_for_them():
    q, k, v, _ = qkv()
    segments = batch(ROWS, T).segments
    got = as_cudnn_reads_it(q, k, v, segments, scale=H**-0.5)
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(got[real], reference(q, k, v, segments)[real], atol=1e-5)
    assert np.isfinite(got).all()  # padding is texts too


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("rows", [ROWS, [[24], [10], [], [3]], [[1] * 24, [24]]], ids=["packed", "one a row", "many"])
def test_the_kernel_gets_what_it_can_do_and_no_more(rows, packs, monkeypatch):
    """Value and gradients are the reference's either way, and a kernel's, marked by its room, only where it is asked."""
    monkeypatch.setattr(flash, "TEXTS", (2, 8))
    monkeypatch.setattr(flash, "capability", lambda: 9.0 if packs else 8.0)
    for name in ("packed", "alone"):
        monkeypatch.setattr(flash, name, lambda q, k, v, s, scale, most=1: reference(q, k, v, s) + 1000.0 * most)
    q, k, v, do = qkv(len(rows))
    segments = batch(rows, T).segments

    def value(fn):
        return jax.value_and_grad(lambda *x: (fn(*x, segments) * do).sum(), argnums=(0, 1, 2))(q, k, v)

    got, grads = value(lambda *x: flash.flash(*x, scale=H**-0.5, otherwise=reference))
    want, right = value(reference)
    texts = max(len(row) + (sum(map(abs, row)) < T) for row in rows)  # the padding is one
    room = (2 if texts <= 2 else 8 if texts <= 8 else 0) if packs else rows[0] == [24] and len(rows) == 4
    np.testing.assert_allclose(got - want, 1000.0 * room * do.sum(), rtol=1e-3, atol=0.1)
    assert_trees_close(grads, right)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_a_step_over_4096_tokens_holds_no_scores(platform, monkeypatch):
    """Lowered here for devices that are not here: their kernels are in the program, and an array [.., T, T] is not."""
    monkeypatch.setattr(jax, "default_backend", lambda: {"cuda": "gpu"}.get(platform, platform))
    monkeypatch.setattr(flash, "capability", lambda: 9.0)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    c = config(layers=2, head_dim=128)
    loss = masked_xent(forward(Decoder(c, jnp.bfloat16, remat="minimal")))
    p, b = params(c), batch([[2000, 2096]], 4096)
    step = jax.jit(jax.grad(lambda p: loss(p, b, None)[0])).trace(p)
    program = step.lower(lowering_platforms=(platform,)).as_text()
    assert "4096x4096x" not in program and "4096x" in program
    assert ("tpu_custom_call" in program) == (platform == "tpu")
    assert ("@__cudnn$fmhaSoftmaxBackward(" in program) == ("@__cudnn$fmhaSoftmax(" in program) == (platform == "cuda")
    if platform == "cpu":
        compiled = step.lower().compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
        assert "4096,4096]" not in compiled and "4096,24]" in compiled
    if platform == "cuda":
        assert all(f'"max_seg_per_batch": {n}' in program.replace("\\22", '"') for n in flash.TEXTS)


@pytest.mark.parametrize("sinks", [None, jnp.ones(N)], ids=["no sinks", "sinks"])
def test_heads_with_sinks_go_the_other_way(sinks, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(flash, "capability", lambda: 9.0)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    q, k, v, _ = qkv(dtype=jnp.bfloat16)
    run = jax.jit(lambda q, k, v: attention.attention(q, k, v, batch(ROWS, T).segments, scale=H**-0.5, sinks=sinks))
    program = run.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert ("@__cudnn$fmhaSoftmax(" in program) == (sinks is None)


def test_what_it_serves(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(flash, "capability", lambda: 8.0)
    q = jax.ShapeDtypeStruct((1, T, N, 64), jnp.bfloat16)
    how = How((None, T), 1.0, None)
    assert flash.serves(q, how) and flash.serves(q.update(dtype=jnp.float16), how)
    assert not flash.serves(q.update(dtype=jnp.float32), how)
    assert not flash.serves(q.update(shape=(1, T, N, 256)), how)
    assert not flash.serves(q, how._replace(softcap=50.0)) and not flash.serves(q, how._replace(windows=(None, 8)))
    monkeypatch.setattr(flash, "capability", lambda: 7.5)
    assert not flash.serves(q, how)


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
def test_on_a_gpu_packed_equals_alone_and_the_future_is_not_seen():
    q, k, v, do = (jnp.repeat(x, 8, axis=1).repeat(8, axis=-1) for x in qkv(dtype=jnp.bfloat16))  # T 192, H 64
    segments = batch([[8 * n for n in row] for row in ROWS], 8 * T).segments
    how = How((None,), 64**-0.5, None)
    assert flash.serves(q, how)

    def of(fn):
        return jax.jit(lambda q, k, v: fn(q, k, v, segments, jnp.zeros((), jnp.int32), how=how))

    run = {fn: of(fn) for fn in (attention._flash, attention._attention)}
    got, want = (fn(q, k, v) for fn in run.values())
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=2e-2)
    grads, right = (
        jax.grad(lambda *x, fn=fn: (fn(*x) * do).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v) for fn in run.values()
    )
    assert_trees_close(grads, right, rtol=3e-2)
    later = run[attention._flash](q, k.at[:, 100:].add(1), v.at[:, 100:].add(1))
    np.testing.assert_array_equal(later[:, :100], got[:, :100])
