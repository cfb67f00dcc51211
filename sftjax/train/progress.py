"""The line one watches while a run trains, and the arithmetic behind its MFU.

MFU is the share of the device's peak that the model's own arithmetic uses, arXiv:2204.02311, appendix B. Work that a run
does twice (rematerialisation) or in vain (padding, masked scores) is not the model's, so it lowers MFU.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from sftjax import tree
from sftjax.chips import of_kind
from sftjax.models.config import DecoderConfig
from sftjax.weights import kinds


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device, or None where it is not known."""
    chip = of_kind(device_kind)
    return chip.flops if chip else None


def mfu(tokens_per_s: float, flops_per_token: float, device_kind: str, devices: int) -> float | None:
    """The share of the peak in use, 0..1, or None where the peak is not known."""
    peak = peak_flops(device_kind)
    return tokens_per_s * flops_per_token / (peak * devices) if peak else None


def model_flops_per_token(config: DecoderConfig, params: Any, mask: Any, length: float) -> float:
    """FLOPs that training needs for one token in a text of `length` tokens (packed texts: the mean length of a text).

    With P the parameters of a layer's kernels and of what stands around them (LoRA's a and b, an adapter's), E = D V the
    head, and S the mean number of keys a token sees, (length + 1) / 2 or less under a window:

        forward        2 P + 4 N H S in each layer, and 2 E
        backward, dx   the same matrix products again, and attention's twice (dQ, dK, dV and the scores' gradient),
                       where something below them or in their stack trains
        backward, dW   2 for each parameter of P and E that trains

    So it is 6 P + ... for full, and close to 4 P + ... for LoRA. The embedding is a lookup and costs nothing. Of a mixture's
    experts a token passes those that it is given to, and P counts as many.
    """
    chosen = tree.flatten(tree.split(params, mask)[0])
    trains = {path: tree.count(w) for path, w in chosen.items()}
    windows = list(config.windows or [None] * config.layers)
    total, below = 0.0, trains["embed/embedding"]
    for stack in ("lower/", "layers/"):
        kernels = {path: w for path, w in tree.flatten(params).items() if path.startswith(stack) and path.endswith("kernel")}
        below += sum(n for path, n in trains.items() if path.startswith(stack))
        depth = max((w.shape[0] for w in kernels.values()), default=0)
        seen = sum(keys_seen(length, window) for window in windows[:depth])
        share = {path: active_share(config, path) for path in kernels}
        passed = sum(share[path] * kinds.count(w) for path, w in kernels.items())
        products = 2 * passed, 4 * config.heads * config.head_dim * seen
        total += sum(products) + 2 * sum(share[path] * trains[path] for path in kernels)
        if below:
            total += products[0] + 2 * products[1]
        windows = windows[depth:]
    below += trains["final_norm/scale"]
    head = next((path for path in ("score/kernel", "head/kernel") if path in trains), "embed/embedding")
    return total + 2 * kinds.count(tree.flatten(params)[head]) * (1 + (below > 0)) + 2 * trains[head]


def active_share(config: DecoderConfig, path: str) -> float:
    """The share of a kernel's parameters that one token passes."""
    return config.experts.active / config.experts.number if config.experts and "/experts/" in path else 1.0


def keys_seen(length: float, window: int | None) -> float:
    """The mean over positions p = 1..length of min(p, window)."""
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


class Progress:
    """`with Progress(total=800) as progress: progress.update(10, {"loss": 1.3, "tokens_per_s": 8e3, "mfu": 0.41})`.

    One line that moves in a terminal; elsewhere a plain line every `log_every` steps, and for the last. `say` prints above.
    `quiet` is for all hosts but one.
    """

    def __init__(
        self,
        total: int,
        *,
        log_every: int = 10,
        console: Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.log_every, self.clock = total, log_every, clock
        self.console = console or Console(quiet=quiet)
        self.marks: deque[tuple[float, int]] = deque(maxlen=20)  # (time, step): ETA from the recent past, not from compiling
        self.printed = 0
        self.bar: Bar | None = None
        if self.console.is_terminal and not self.console.is_jupyter and not self.console.quiet:
            columns = BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[shown]}", markup=False)
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("train", total=total, shown="starting ...")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self, step: int) -> None:
        """`step` steps were done before this start."""
        self.printed = step
        if self.bar:
            self.bar.update(self.task, completed=step)

    def update(self, step: int, shown: Mapping[str, float | None]) -> None:
        """`step` steps are done. Shown, where given: reward, loss, kl, lr, tokens_per_s, mfu."""
        self.marks.append((self.clock(), step))
        (then, first), (now, last) = self.marks[0], self.marks[-1]
        left = (self.total - step) * (now - then) / (last - first) if last > first else None
        text = describe({**shown, "eta": left if step < self.total else None})
        if self.bar:
            self.bar.update(self.task, completed=step, shown=text)
        elif step // self.log_every > self.printed // self.log_every or step == self.total:
            self.printed = step
            self.say(f"step {step}/{self.total}  {text}")

    def say(self, text: str) -> None:
        say(text, self.console)


def say(text: str, console: Console | None = None) -> None:
    """A line as it is, wrapped by the terminal alone."""
    (console or Console()).print(text, markup=False, highlight=False, soft_wrap=True)


def describe(shown: Mapping[str, float | None]) -> str:
    """loss 1.2345  lr 1.9e-04  12.3k tokens/s  MFU 41 %  ETA 3m12s"""
    how: dict[str, Callable[[float], str]] = {
        "reward": lambda x: f"reward {x:.3f}",
        "loss": lambda x: f"loss {x:.4f}",
        "kl": lambda x: f"KL {x:.4f}",
        "lr": lambda x: f"lr {x:.1e}",
        "tokens_per_s": lambda x: f"{compact(x)} tokens/s",
        "mfu": lambda x: f"MFU {100 * x:.0f} %" if x >= 0.1 else f"MFU {100 * x:.1f} %",
        "eta": lambda x: f"ETA {duration(x)}",
    }
    return "  ".join(form(value) for name, form in how.items() if (value := shown.get(name)) is not None)


def compact(x: float) -> str:
    """Three digits and a letter: 842, 12.3k, 4.56M; 2e-4 for what is small."""
    if 0 < abs(x) < 1e-3:
        return f"{x:.3g}".replace("e-0", "e-") if abs(x) < 1e-4 else f"{x * 1e4:.3g}e-4"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= 0.9995 * unit:
            return f"{x / unit:.3g}{letter}"
    return f"{x:.3g}"


def duration(seconds: float) -> str:
    """12s, 3m12s, 2h05m, 3d04h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"
