"""The progress line, and the arithmetic of MFU."""

import io
import itertools
from dataclasses import replace

import jax
import pytest
from rich.console import Console

from sftjax.config import default, override
from sftjax.models.config import DecoderConfig, Experts
from sftjax.models.decoder import init
from sftjax.train.progress import Progress, compact, duration, keys_seen, mfu, model_flops_per_token, peak_flops
from sftjax.weights import method
from sftjax.weights.quantize import quantize

CONFIG = DecoderConfig(vocab=1000, width=64, mlp_width=160, layers=3, heads=4, kv_heads=2, head_dim=16)
KERNELS = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160  # of a layer
HEAD = 64 * 1000


def flops(length, config=CONFIG, quantised=None, ids=(), **changes):
    """Of a token, for a method as a config has it."""
    c = default()
    for key, value in changes.items():
        override(c, key.replace("__", "."), value)

    def build():
        params = init(config, jax.random.key(0))
        return method.apply(quantize(params, quantised) if quantised else params, c, ids=ids)

    params = jax.eval_shape(build)
    return model_flops_per_token(config, params, method.mask(params, c), length)


def attention(keys):
    """Scores and values of all layers, forward: layers x 2 x 2 N H x keys."""
    return 3 * 4 * 64 * keys


def added(rank):
    """LoRA's a and b of all layers."""
    return 3 * rank * sum(i + o for i, o in [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)])


def test_full_training_costs_six_flops_a_parameter_and_attention_three_times_forward():
    expected = 6 * (3 * KERNELS + HEAD) + 3 * attention(101 / 2)
    assert flops(100, method="full") == pytest.approx(expected)
    assert flops(100, replace(CONFIG, tied=True), method="full") == pytest.approx(expected)


@pytest.mark.parametrize("rank", [1, 8])
def test_lora_costs_four_flops_a_parameter_and_six_for_its_own(rank):
    expected = 4 * (3 * KERNELS + HEAD) + 6 * added(rank) + 3 * attention(1)
    assert flops(1, lora__rank=str(rank)) == pytest.approx(expected)


def test_a_mixture_costs_what_a_token_passes():
    """Two of eight experts of width 96, the shared one of 48, and the gates of both."""
    mixed = replace(CONFIG, experts=Experts(8, 2, 96, shared=48))
    kernels = KERNELS - 3 * 64 * 160 + 3 * 64 * (2 * 96 + 48) + 64 * (8 + 1)
    assert flops(100, mixed, method="full") == pytest.approx(6 * (3 * kernels + HEAD) + 3 * attention(101 / 2))
    more = replace(mixed, experts=replace(mixed.experts, number=16))
    assert flops(100, more, method="full") - flops(100, mixed, method="full") == pytest.approx(6 * 3 * 64 * 8)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_kernel_costs_as_much_as_what_it_stands_for(kind):
    assert flops(100, quantised=kind) == flops(100)


def test_freezing_more_layers_costs_less():
    costs = [flops(50, method="freeze", freeze__last_n_layers=str(n)) for n in (1, 2, 3)]
    steps = [b - a for a, b in itertools.pairwise(costs)]
    assert steps == pytest.approx([4 * KERNELS + 2 * attention(25.5) / 3] * 2)
    assert costs[2] == pytest.approx(flops(50, method="full") - 2 * HEAD)


def test_the_backward_pass_ends_where_training_does():
    forward, head = 2 * 3 * KERNELS + attention(1), 2 * HEAD
    assert flops(1, method="freeze", freeze__train="head") == pytest.approx(forward + 2 * head)  # forward and dW
    assert flops(1, method="freeze", freeze__train="final_norm") == pytest.approx(forward + 2 * head)  # forward and dx
    everywhere = 2 * 2 * 3 * KERNELS + 3 * attention(1) + 2 * head
    assert flops(1, method="freeze", freeze__train="attn_norm") == pytest.approx(everywhere)


def test_rows_of_the_embedding_pass_the_gradient_through_every_layer():
    rows = 5 * 64  # of head and embedding each; the embedding's are looked up
    expected = 4 * (3 * KERNELS + HEAD + rows) + 2 * rows + 3 * attention(1)
    assert flops(1, method="tokens", ids=range(5)) == pytest.approx(expected)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 20])
def test_keys_seen_is_the_mean_over_positions(window):
    counted = sum(min(p, window or p) for p in range(1, 8)) / 7
    assert keys_seen(7, window) == pytest.approx(counted)


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", None),
        ("Tesla T4", 65),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_names_jax_gives(kind, tflops):
    assert peak_flops(kind) == (tflops and tflops * 1e12)


def test_mfu_is_a_share_of_all_devices():
    assert mfu(1e6, 1e9, "TPU v4", 8) == pytest.approx(1e15 / (8 * 275e12))
    assert mfu(1e6, 1e9, "cpu", 1) is None


def plain(total: int, seconds: float, start: int = 0, **options) -> list[str]:
    out, times = io.StringIO(), iter(range(10**6))
    console = Console(file=out, width=40)
    with Progress(total, console=console, clock=lambda: seconds * next(times), **options) as progress:
        progress.begin(start)
        for step in range(start + 1, total + 1):
            progress.update(step, {"loss": 1 / step, "lr": 2e-4, "tokens_per_s": 8123.0, "mfu": None})
    return out.getvalue().splitlines()


def test_plain_lines_where_stdout_is_no_terminal():
    lines = plain(25, 2.0)
    assert [line.split()[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert lines[0] == "step 10/25  loss 0.1000  lr 2.0e-04  8.12k tokens/s  ETA 30s"
    assert "ETA" not in lines[-1]


def test_a_resumed_run_has_its_lines_at_the_same_steps():
    assert [line.split()[1] for line in plain(30, 2.0, start=15, log_every=10)] == ["20/30", "30/30"]


def test_a_resumed_bar_starts_where_the_run_was():
    out = io.StringIO()
    with Progress(20, console=Console(file=out, force_terminal=True, width=120)) as progress:
        progress.begin(15)
    assert "15/20" in out.getvalue()


def test_one_moving_line_in_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress(20, console=console) as progress:
        progress.update(5, {"loss": 1.25, "mfu": 0.412})
        progress.say("evaluation [0.5]")
    assert "5/20" in out.getvalue() and "loss 1.2500  MFU 41 %" in out.getvalue() and "evaluation [0.5]" in out.getvalue()


@pytest.mark.parametrize(
    "x, shown", [(0, "0"), (842, "842"), (999.7, "1k"), (12345, "12.3k"), (4.56e6, "4.56M"), (2e-4, "2e-4"), (1e-5, "1e-5")]
)
def test_compact(x, shown):
    assert compact(x) == shown


@pytest.mark.parametrize("s, shown", [(0.4, "0s"), (59.6, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (273600, "3d04h")])
def test_duration(s, shown):
    assert duration(s) == shown
