"""Every family's tiny checkpoint gives the numbers that transformers gave: no torch here, so what is installed may change."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_families import FILE, IDS, POSITIONS, TOKENS, draw

from sftjax.data.batch import Batch
from sftjax.hf.load import load_config, load_params
from sftjax.hf.tensors import Tensor, write
from sftjax.models.decoder import Decoder, forward
from sftjax.models.families import FAMILIES
from sftjax.weights.kinds import matmul

GOLDEN = json.loads(FILE.read_text())


def test_every_family_has_its_numbers():
    assert set(GOLDEN) == set(FAMILIES)


@pytest.mark.parametrize("family", GOLDEN)
def test_a_checkpoint_gives_its_golden_logits(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN[family]["config"]))
    c = load_config(tmp_path)
    tensors = {}
    for name in FAMILIES[family].names(c).values():
        shape = name.shape[::-1] if name.transposed else name.shape
        tensors |= {called: draw(called, shape) for called in name.hf()}
    write(tmp_path / "model.safetensors", {k: Tensor(x.dtype, x.shape, lambda x=x: x) for k, x in tensors.items()})
    tokens = jnp.asarray(TOKENS, jnp.int32)[None]
    ones, positions = jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None]
    batch = Batch(tokens, ones, ones, positions)
    logits = np.asarray(jax.jit(lambda p: matmul(*forward(Decoder(c))(p, batch)))(load_params(tmp_path, c)))[0]
    golden = np.array(GOLDEN[family]["logits"])
    assert np.abs(logits[POSITIONS, IDS] - golden).max() < 1e-4 * np.abs(golden).max()
