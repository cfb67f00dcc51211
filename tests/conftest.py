"""Every test runs on 8 virtual CPU devices, without a network, with compiled programs kept from one run to the next."""

import gc
import itertools
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

FLAGS = ["--xla_force_host_platform_device_count=8"]
# programs that run for milliseconds are not worth optimising, nor cutting into parts: half of the suite's work
FLAGS += ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):  # XLA ends a process that gives it a flag which it no longer has
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers of pytest-xdist are parallel enough
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "sftjax" / "tests-xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not let tests import what they share
pytest_plugins = ["toy"]
tests = itertools.count(1)


def pytest_collection_finish():
    from toy import collect_seldom

    gc.collect()
    collect_seldom()


def forget(most: int) -> None:
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > most:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def forgets():
    """Compiled programs are let go of before a process has so many that Linux maps it no more memory (vm.max_map_count)."""
    yield
    forget(30_000)


@pytest.fixture(autouse=True)
def forgets_within():
    """The same in a module that compiles very many; what its later tests share is compiled again."""
    yield
    if next(tests) % 8 == 0:
        forget(30_000)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real inputs: $SFTJAX_SHARED, else `shared` beside the repository. A test is skipped without it."""
    folder = Path(os.environ.get("SFTJAX_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the real inputs at {folder}; set SFTJAX_SHARED")
    return folder


@pytest.fixture(scope="session")
def torch_scores():
    """`scores(model, rows)`: torch's log p of every token after the first of each row, end to end."""
    import torch

    def scores(model, rows):
        out = []
        for row in rows:
            ids = torch.tensor([row])
            with torch.no_grad():
                logps = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
            out.append(logps.gather(-1, ids[0, 1:, None])[:, 0].numpy())
        return np.concatenate(out)

    return scores
