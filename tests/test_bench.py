"""The benchmark for accelerators runs where jax, flax, optax and numpy are, and little else."""

import json
import os
import subprocess
import sys
from pathlib import Path

from sftjax.models.flash import TEXTS

REPO = Path(__file__).parent.parent
RUN = """
import json, sys
for name in {missing}:
    sys.modules[name] = None  # an import of it fails
import train
got = train.measure(train.SHAPES["tiny"], "qlora", 2, 128, "minimal", 1)
batch, mean = train.batch(4, train.LENGTH, 512)
most = max(len(set(row.tolist())) for row in batch.segments)
print(json.dumps([got, most, float((batch.segments > 0).mean()), float(batch.weights.mean()), mean]))
"""


def test_a_case_is_measured_with_nothing_but_jax_flax_optax_and_numpy():
    missing = ["datasets", "ml_collections", "orbax", "transformers", "safetensors", "jinja2", "tokenizers", "torch"]
    env = os.environ | {
        "PYTHONPATH": str(REPO / "bench"),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    }
    code = RUN.format(missing=missing)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    got, texts, full, trained, mean = json.loads(done.stdout.splitlines()[-1])
    assert got["tokens_per_s"] > got["trained_per_s"] > 0 and got["tflops"] > 0 and got["step_gib"] > 0
    assert got["mfu"] is None and got["skipped"] == 0  # of a CPU no peak is known
    # rows without a gap, two thirds of them trained, of texts for which cuDNN's kernel with least room has enough
    assert full == 1 and abs(trained - 2 / 3) < 0.02 and 400 < mean < 1200 and texts <= TEXTS[0]
