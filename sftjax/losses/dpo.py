"""DPO and its kin over packed batches: log-probs of answers from one forward pass, the reference's from another.

    row       [ prompt chosen | prompt rejected | prompt chosen | prompt rejected | padding ]
    segments    1 ...           2 ...             3 ...           4 ...             0 ...

A pair is two segments of one row, the chosen answer's 2i + 1 and the rejected one's 2i + 2; `weights` marks the answers.
So a pair is a row's own affair: batches are packed, cut and sharded as any other. The losses are in `losses.preference`.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sftjax.config import UserError
from sftjax.losses import preference
from sftjax.losses.preference import DIVERGENCES, LOSSES, PER_TOKEN, UNPAIRED, WITHOUT_REFERENCE, Answers, Pairs
from sftjax.losses.tokens import Forward, Loss, logprobs, shift
from sftjax.models.decoder import Output

Reference = Callable[[Any], Any] | str
Each = Callable[..., tuple[Array, Array, dict[str, Array]]]
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (lambda x: 0 < x < math.inf, "a number above 0"),
    "label_smoothing": (lambda x: 0 <= x < 1, "the share of labels that are wrong, from 0 to below 1"),
}


def dpo(forward: Forward, **options: Any) -> Loss:
    """`(params, batch, key) -> (sum over pairs, pairs, metrics)`: `each_pair`, whose options these are, summed."""
    each = each_pair(forward, **options)

    def run(params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Array, dict[str, Array]]:
        losses, real, shown = each(params, batch, key)
        return losses.sum(), real.sum().astype(jnp.float32), {name: x.sum() for name, x in shown.items()}

    return run


def each_pair(
    forward: Forward,
    *,
    loss: str | Mapping[str, float] = "sigmoid",
    beta: float | None = None,
    reference: Reference | None = None,
    divergence: str = "reverse_kl",
    ld_alpha: float = 1.0,
    prompt_nll: bool = False,
    **options: Any,
) -> Each:
    """`(params, batch, key) -> (losses, which are real, metrics)`, [B, P] each, for every loss in `preference.LOSSES`.

    The i-th pair of a row stands in column i; where there is none, all is 0.

    loss        its name, or {name: weight} for a sum of several: {"sigmoid": 1, "sft": 0.2}
    beta        how dear it is to leave the reference; None is the loss's own, 2 for simpo and 0.1 for the others
    reference   a function of the params: `weights.lora.without` for the model before its adapter, `itemgetter("reference")`
                for another tree that is kept frozen among them (closed over, it would be a constant of the program);
                or "batch": the batch is a data.batch.Referred; or "none": all answers are equally likely. The losses sft, cpo,
                simpo and orpo have none.
    divergence  what holds the policy to the reference: reverse_kl, forward_kl, js or alpha
    ld_alpha    LD-DPO, arXiv:2409.06411: what a token counts beyond the length of the pair's shorter answer
    prompt_nll  a term of likelihood (sft, cpo, orpo) is about the prompt too
    options     of the loss, as its function in `losses.preference` names them

    Metrics are rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen and logps/rejected. A reward
    is beta * log(pi / pi_ref), without a reference beta * log pi (per token for simpo and orpo); of a sum of losses, by the
    beta of the first. How a batch is cut into micro-batches changes nothing, but for what looks across pairs: aot,
    aot_unpaired, bco_pair with its shift, and nll_by="token". Raises UserError for an option that no loss named here reads.
    """
    parts = _parts(loss)
    fns = _chosen("loss", parts, LOSSES)
    _check_reference(reference, [name for name in parts if name not in WITHOUT_REFERENCE], list(parts))
    if not 0 <= ld_alpha <= 1:
        raise UserError(f"ld_alpha={ld_alpha}: a share of a token's log-prob, from 0 to 1")
    if ld_alpha < 1 and set(parts) == {"sft"}:
        raise UserError(f"ld_alpha={ld_alpha}: the loss sft compares no lengths; leave it out")
    if prompt_nll and not any("nll_by" in inspect.signature(fn).parameters for fn in fns):
        raise UserError(f"prompt_nll: {', '.join(parts)} has no term of likelihood; leave it out or use sft, cpo or orpo")
    if divergence != "reverse_kl":
        [measure] = _chosen("divergence", [divergence], DIVERGENCES)
        [options["divergence"]] = _bound([measure], {"alpha": options.pop("alpha")} if "alpha" in options else {})
    own = [inspect.signature(fn).parameters["beta"].default for fn in fns if fn is not preference.sft]
    strength: float = beta if beta is not None else (own or [0.1])[0]
    bound = _bound(fns, options, **({} if beta is None else {"beta": beta}))
    one = Answers(*[jnp.ones(1)] * 5)
    jax.eval_shape(lambda: [fn(Pairs(one, one, one.length > 0)) for fn in bound])  # an option out of range is told of here

    def run(params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Array, dict[str, Array]]:
        logps, refs, weights = _predicted(forward, reference, params, batch, key)
        slots = partial(_slots, batch.segments, 2, batch.tokens.shape[1] // 2)
        lengths = slots(weights)
        real = (lengths[0] > 0) & (lengths[1] > 0)
        likely = _inside(batch) if prompt_nll else weights
        text, tokens = slots(likely * logps), slots(likely)
        if ld_alpha < 1:
            shorter = jnp.repeat(jnp.minimum(*slots(jnp.sign(weights))), 2, axis=1)
            weights = weights * jnp.where(_shared(batch.segments, weights, shorter), 1, ld_alpha)
        sides = zip(slots(weights * logps), slots(weights * (logps - refs)), lengths, text, tokens)
        chosen, rejected = (_where(real, Answers(*side)) for side in sides)
        pairs = Pairs(chosen, rejected, real)
        total = sum(weight * fn(pairs) for weight, fn in zip(parts.values(), bound))
        return jnp.where(real, total, 0), real, metrics(pairs)

    def metrics(pairs: Pairs) -> dict[str, Array]:
        averaged = reference is None and any(name in PER_TOKEN for name in parts)
        ranked = pairs.each(Answers.per_token) if averaged else pairs
        chosen, rejected = strength * ranked.chosen.ratio, strength * ranked.rejected.ratio
        each = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (1 + jnp.sign(chosen - rejected)) / 2,  # equal at the start of a run: half right
            "logps/chosen": pairs.chosen.logp,
            "logps/rejected": pairs.rejected.logp,
        }
        return {name: jax.lax.stop_gradient(jnp.where(pairs.real, x, 0)) for name, x in each.items()}

    return run


def kto(forward: Forward, **options: Any) -> Loss:
    """`(params, batch, key) -> (sum over examples, examples, metrics)`: `each_answer`, whose options these are, summed.

    Metrics: rewards/chosen and rewards/rejected are the means over what is desirable and what is not, rewards/margins their
    difference, each times the examples of the micro-batch; logps/ likewise; kl, the baseline.
    """
    each = each_answer(forward, **options)

    def run(params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Array, dict[str, Array]]:
        losses, real, found = each(params, batch, key)
        count = real.sum().astype(jnp.float32)
        shown = {"kl": count * found["kl"]} if "kl" in found else {}
        for name in ("rewards", "logps"):
            shown[f"{name}/chosen"] = count * preference.mean(found[name], found["desirable"])
            shown[f"{name}/rejected"] = count * preference.mean(found[name], real & ~found["desirable"])
        shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
        return losses.sum(), count, shown

    return run


def each_answer(forward: Forward, *, loss: str = "kto", beta: float = 0.1, reference: Reference, **options: Any) -> Each:
    """`(params, batch, key) -> (losses, which are real, what they are made of)`, [B, N] each, for `preference.UNPAIRED`.

    The i-th example of a row is one segment, 3i + 1 where its answer is desirable and 3i + 2 where it is not. Segment 3i + 3
    is its prompt with another example's answer: the log-ratios of those, averaged over the micro-batch and never below 0, are
    the baseline of the loss kto, as in the paper; the loss depends on the cut by that alone. apo_zero_unpaired needs none.

    `reference` and `options` as `each_pair` takes them. Beside the losses: rewards, logps, desirable; kl [], the baseline.
    """
    fns = _chosen("loss", [loss], UNPAIRED)
    _check_reference(reference, [loss], [loss])
    [bound] = _bound(fns, options, beta=beta)

    def run(params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Array, dict[str, Array]]:
        logps, refs, weights = _predicted(forward, reference, params, batch, key)
        slots = partial(_slots, batch.segments, 3, batch.tokens.shape[1])
        sums = map(slots, (weights * logps, weights * (logps - refs), weights))
        (good, bad, _), (good_ratio, bad_ratio, other_ratio), (good_length, bad_length, other_length) = sums
        length, logp = good_length + bad_length, good + bad
        desirable, real = good_length > 0, length > 0
        answers = _where(real, Answers(logp, good_ratio + bad_ratio, length, logp, length))
        found = {"rewards": beta * answers.ratio, "logps": answers.logp, "desirable": desirable}
        if loss == "kto":
            found["kl"] = jnp.maximum(preference.mean(other_ratio, other_length > 0), 0)
            losses = bound(answers, desirable, jax.lax.stop_gradient(found["kl"]))
        else:
            losses = bound(answers, desirable)
        return jnp.where(real, losses, 0), real, jax.lax.stop_gradient(found)

    return run


def token_logps(forward: Forward) -> Callable[[Any, Any], Array]:
    """`(params, batch) -> [B, T]` float32: log pi(token | those before it in its segment), 0 for a segment's first.

    A reference's, kept beside the examples and packed as their weights are, make the batch a `Referred`.
    """

    def run(params: Any, batch: Any) -> Array:
        targets, _ = shift(batch)
        return jnp.roll(_inside(batch) * _logps(forward(params, batch, None), targets), 1, axis=1)

    return run


def _predicted(
    forward: Forward, reference: Reference | None, params: Any, batch: Any, key: Array | None
) -> tuple[Array, Array, Array]:
    """Log-probs, the reference's, and weights of the tokens by the position that predicts them, each [B, T]."""
    targets, weights = shift(batch)
    logps = _logps(forward(params, batch, key), targets)
    if reference is None or reference == "none":
        return logps, jnp.zeros_like(logps), weights
    if isinstance(reference, str):
        if not hasattr(batch, "reference"):
            raise UserError('reference="batch": this batch carries no reference; make it a losses.Referred')
        return logps, jnp.roll(batch.reference, -1, axis=1), weights
    base = jax.lax.stop_gradient(reference(params))
    return logps, _logps(forward(base, batch, None), targets), weights


def _logps(output: Output, targets: Array) -> Array:
    return logprobs(output.hidden, output.head, targets)


def _inside(batch: Any) -> Array:
    """1.0 where a position predicts the next token of its own segment, [B, T]."""
    return shift(batch._replace(weights=jnp.ones_like(batch.weights)))[1]


def _by_segment(segments: Array, x: Array, count: int) -> Array:
    """x [B, T] -> [B, count]: summed over each of the segments 1 .. count of its row."""
    return jax.vmap(partial(jax.ops.segment_sum, num_segments=count + 1))(x, segments)[:, 1:]


def _slots(segments: Array, every: int, groups: int, x: Array) -> tuple[Array, ...]:
    """x [B, T] -> `every` arrays [B, groups]: its sums over segments 1, 2, ... `every` of each group of so many."""
    sums = _by_segment(segments, x, every * groups)
    return tuple(sums[:, i::every] for i in range(every))


def _shared(segments: Array, weights: Array, limit: Array) -> Array:
    """[B, T] bool: is this among the first `limit` [B, S] of the tokens that count in its segment?"""
    counts = weights > 0
    before = jnp.cumsum(counts, axis=1) - counts  # in the row
    own = _by_segment(segments, counts.astype(jnp.int32), limit.shape[1])
    start = jnp.cumsum(own, axis=1) - own  # a row's segments lie in order
    at = jnp.maximum(segments - 1, 0)
    return before - jnp.take_along_axis(start, at, 1) < jnp.take_along_axis(limit, at, 1)


def _where(real: Array, answers: Answers) -> Answers:
    """Where there is no pair, one token of log-prob -1: finite under every loss, and in every gradient."""
    return Answers(*(jnp.where(real, x, nothing) for x, nothing in zip(answers, (-1, -1, 1, -1, 1))))


def _chosen(what: str, names: Iterable[str], table: Mapping[str, Callable[..., Array]]) -> list[Callable[..., Array]]:
    for name in names:
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            raise UserError(f"{what} {name}: not known{f'; did you mean {near[0]}?' if near else ''} (known: {', '.join(table)})")
    return [table[name] for name in names]


def _parts(loss: Any) -> dict[str, float]:
    """{name: weight}. Raises UserError."""
    if not isinstance(loss, (str, Mapping)):
        raise UserError(f"loss {loss!r}: needs a name, or {{name: weight}} for a sum")
    parts = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    for name, weight in parts.items():
        if not (isinstance(weight, Real) and math.isfinite(weight)):
            raise UserError(f"loss {name}: its weight is {weight!r}, must be a number")
    return parts


def _bound(fns: Iterable[Callable[..., Array]], options: Mapping[str, Any], **shared: Any) -> list[Callable[..., Array]]:
    """Each function with those of `options` that it names. One that none of them names is the user's mistake."""
    fns = list(fns)
    named = [inspect.signature(fn).parameters for fn in fns]
    for option in options:
        if not any(option in names for names in named):
            raise UserError(f"{option}: {', '.join(fn.__name__ for fn in fns)} does not use it; leave it out")
    both = {**shared, **options}
    for option, value in both.items():
        if option in RANGES and not (isinstance(value, Real) and RANGES[option][0](value)):
            raise UserError(f"{option}={value!r}: needs {RANGES[option][1]}")
    return [partial(fn, **{k: v for k, v in both.items() if k in names}) for fn, names in zip(fns, named)]


def _check_reference(reference: Reference | None, need: list[str], losses: list[str]) -> None:
    if need and reference is None:
        raise UserError(f"loss {need[0]} needs a reference; give one, or a loss without: {', '.join(WITHOUT_REFERENCE)}")
    if not need and reference is not None:
        raise UserError(f"reference: the loss {', '.join(losses)} has none; leave it out")
    if isinstance(reference, str) and reference not in ("batch", "none"):
        raise UserError(f'reference={reference}: use "batch", "none", a function of the params, or params')
