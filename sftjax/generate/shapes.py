"""The few sizes that requests are rounded up to, so that few programs serve all of them."""

from __future__ import annotations


def power(n: int, least: int) -> int:
    """The least `least` * 2^i that holds n."""
    while least < n:
        least *= 2
    return least


def between(n: int, least: int) -> int:
    """The least of `least` * {1, 1.5, 2, 3, 4, 6, ...} that holds n: at most half more than n. `least` is even."""
    size = power(n, least)
    return size * 3 // 4 if size > least and n <= size * 3 // 4 else size
