"""Rotary embeddings as config.json states them: `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5)."""

from __future__ import annotations

import math
from typing import Any

from sftjax.config import UserError
from sftjax.models.config import Rope

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# `finetuned` says how a YaRN checkpoint was made, and dynamic scaling starts from max_position_embeddings whatever
# `original_max_position_embeddings` says: transformers reads neither.
KEYS = {
    "default": COMMON,
    "linear": COMMON | {"factor"},
    "dynamic": COMMON | {"factor", "original_max_position_embeddings"},
    "llama3": COMMON | {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": COMMON
    | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate", "finetuned"},
    "longrope": COMMON | {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}


def rope(raw: dict[str, Any], max_positions: int, head_dim: int) -> Rope:
    """The Rope of a config.json whose `max_position_embeddings` is `max_positions`. Raises UserError on what is unknown."""
    where = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(where) or {}
    if nested := [k for k, v in given.items() if isinstance(v, dict)]:
        raise UserError(f"{where}.{nested[0]}: rotary parameters per kind of layer are not supported")
    # A key of this name beside rope_scaling wins over the one inside, as in transformers.
    beside = raw.get("original_max_position_embeddings")
    return parameters(raw, given, where, max_positions, head_dim, original=beside)


def ropes(raw: dict[str, Any], max_positions: int, head_dim: int, thetas: dict[str, tuple[str, float]]) -> dict[str, Rope]:
    """A Rope for each kind of layer in `thetas`, whose values are the key that stated theta in transformers 4 and its default.

    The first kind is the one that `rope_scaling` extends.
    """
    nested, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling")
    if strange := sorted(set(nested) - set(thetas)):
        raise UserError(
            f"rope_parameters.{strange[0]} is not supported; it has parts {' and '.join(thetas)}, one for each kind of layer"
        )
    found: dict[str, Rope] = {}
    for kind, (key, theta) in thetas.items():
        where = "rope_scaling" if scaling and not found else f"rope_parameters.{kind}"
        given = (nested.get(kind) or {}) | (scaling or {} if not found else {})
        found[kind] = parameters({"rope_theta": raw.get(key) or theta}, given, where, max_positions, head_dim)
        if found[kind].partial != 1.0:
            raise UserError(f"{where}.partial_rotary_factor={found[kind].partial} is not supported; all of a head must turn")
    return found


def parameters(
    raw: dict[str, Any],
    given: dict[str, Any],
    where: str,
    max_positions: int,
    head_dim: int,
    original: int | None = None,
) -> Rope:
    """A Rope of what is `given`, with what may stand beside it in `raw`."""
    given = {k: v for k, v in given.items() if v is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KEYS:
        raise UserError(f"{where}.rope_type={kind!r} is not supported; supported are {', '.join(KEYS)}")
    if unknown := sorted(set(given) - KEYS[kind]):
        raise UserError(f"{where}.{unknown[0]}={given[unknown[0]]!r} is not supported with rope_type {kind!r}")
    if given.get("factor") == 0:
        raise UserError(f"{where}.factor={given['factor']!r} is not a positive number")
    part = number(given, where, "partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0)
    turned = int(head_dim * part)
    if part > 1 or turned < 2 or turned % 2:
        raise UserError(f"partial_rotary_factor={part} turns {turned} of {head_dim} dimensions, and must turn pairs of them")

    theta = number(given, where, "rope_theta", raw.get("rope_theta") or 10_000.0)
    if kind == "default":
        return Rope(theta, partial=part)
    if kind == "linear":
        return Rope(theta, kind, number(given, where, "factor"), partial=part)
    if kind == "dynamic":
        return Rope(theta, kind, number(given, where, "factor"), max_positions, partial=part)
    original = int(original or number(given, where, "original_max_position_embeddings", max_positions))
    if kind == "llama3":
        low, high = number(given, where, "low_freq_factor"), number(given, where, "high_freq_factor")
        if high <= low:
            raise UserError(f"{where}.high_freq_factor={high} must be above low_freq_factor={low}")
        return Rope(theta, kind, number(given, where, "factor"), original, low, high, partial=part)
    factor = number(given, where, "factor", max_positions / original)
    if kind == "longrope":
        stretched = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))  # arXiv:2402.13753
        return Rope(
            theta,
            kind,
            factor,
            original,
            attention_factor=number(given, where, "attention_factor", stretched),
            short_factor=factors(given, where, "short_factor", turned // 2),
            long_factor=factors(given, where, "long_factor", turned // 2),
            partial=part,
        )
    return Rope(
        theta,
        kind,
        factor,
        original,
        beta_fast=number(given, where, "beta_fast", 0) or 32.0,
        beta_slow=number(given, where, "beta_slow", 0) or 1.0,
        attention_factor=attention_factor(given, where, factor),
        truncate=bool(given.get("truncate", True)),
        partial=part,
    )


def attention_factor(given: dict[str, Any], where: str, factor: float) -> float:
    """What YaRN multiplies cos and sin by: 0.1 ln(factor) + 1, arXiv:2309.00071 eq. 22, unless the file says otherwise."""
    if "attention_factor" in given:
        return number(given, where, "attention_factor")

    def attenuation(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    over, under = number(given, where, "mscale", 0), number(given, where, "mscale_all_dim", 0)
    return attenuation(over) / attenuation(under) if over and under else attenuation(1.0)


def factors(given: dict[str, Any], where: str, key: str, n: int) -> tuple[float, ...]:
    """What each of n frequencies is divided by; raises UserError where it is not n positive numbers."""
    values = given.get(key)
    if not isinstance(values, list) or len(values) != n or not all(isinstance(x, (int, float)) and x > 0 for x in values):
        raise UserError(f"{where}.{key} needs {n} positive numbers, one for each pair of dimensions that turns")
    return tuple(map(float, values))


def number(given: dict[str, Any], where: str, key: str, default: float | None = None) -> float:
    """A finite number that is not negative; raises UserError where it is missing without a default."""
    value = given.get(key, default)
    if value is None:
        raise UserError(f"{where}.{key} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError(f"{where}.{key}={value!r} is not a positive number")
    return float(value)
