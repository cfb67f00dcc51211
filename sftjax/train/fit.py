"""A word on over- and under-fitting, read from the curves by stated rules.

    overfit    the lowest evaluation is none of the last fifth of them, and the last one is more than 2 % and 0.01 above it
    worse      the last evaluation loss is more than 2 % above the first
    underfit   the evaluation loss was still falling: by more than 3 % over the last fifth of the run
    unknown    fewer than three evaluations, or too far apart to say whether it was still falling
    flat       it was never more than 2 % below the first
    good       none of these

What the loss was a fifth of the run before the end is read between evaluations: on a straight line, and on a curve that
goes on slowing down as it did. Where they are few, the line finds a fall at the end that may have been over long before.

A note is added where the training loss ends at less than 70 % of the evaluation loss (and 0.1 below): the rows are being
memorised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

RISE, RISE_NATS, EARLY, FALL, GAP, GAP_NATS = 0.02, 0.01, 0.8, 0.03, 0.7, 0.1
Points = Sequence[tuple[int, float]]  # (step, loss) in order of steps


class Fit(NamedTuple):
    kind: str  # good | overfit | underfit | worse | flat | unknown
    title: str
    text: str
    best_step: int | None = None


def judge(train: Points, evals: Points, total: int | None = None) -> Fit:
    """The verdict on a run of `total` steps (None: up to the last point)."""
    if len(evals) < 3:
        text = (
            f"{len(evals)} evaluation{'' if len(evals) == 1 else 's'}: a curve needs three. Set --config.train.eval_every lower."
        )
        return Fit("unknown", "Too few evaluations to tell", text)
    first, last = evals[0][1], evals[-1][1]
    nth, (best_step, best) = min(enumerate(evals), key=lambda point: point[1][1])
    end = max(total or 0, evals[-1][0])
    rise = last / best - 1
    fall, least = (1 - last / max(read(evals, EARLY * end), 1e-12) for read in (at, slowing))
    if last > first * (1 + RISE):
        text = f"Evaluation loss rose from {first:.3f} to {last:.3f}. Lower --config.optim.lr, and look at the rows."
        fit = Fit("worse", "The model got worse on held-out rows", text, best_step)
    elif nth <= EARLY * (len(evals) - 1) and rise > RISE and last - best > RISE_NATS:
        text = (
            f"Evaluation loss was lowest at step {best_step} ({best:.3f}) and ended {100 * rise:.1f} % higher ({last:.3f}). "
            f"The best checkpoint is from step {best_step}; use fewer epochs, more rows or --config.train.patience=3."
        )
        fit = Fit("overfit", f"Over-fitting after step {best_step}", text, best_step)
    elif least > FALL:
        text = (
            f"Evaluation loss still fell by {100 * least:.1f} % over the last fifth of the run, to {last:.3f}. "
            "More epochs, or a higher learning rate, should lower it further."
        )
        fit = Fit("underfit", "Under-fitted: still improving at the end", text, best_step)
    elif fall > FALL:
        text = (
            f"Evaluation loss fell from {first:.3f} to {last:.3f}, by {100 * least:.1f} to {100 * fall:.1f} % in the last fifth "
            f"of the run: {len(evals)} evaluations cannot say whether it levelled off. Set --config.train.eval_every lower."
        )
        fit = Fit("unknown", "Too few evaluations to tell", text, best_step)
    elif best >= first * (1 - RISE):
        text = (
            f"Evaluation loss went from {first:.3f} to {last:.3f} and was never more than {100 * RISE:.0f} % lower. "
            "Raise --config.optim.lr, or look whether the rows hold anything that the model does not know."
        )
        fit = Fit("flat", "Hardly anything was learnt", text, best_step)
    else:
        moved = "fell" if fall >= 0 else "rose"
        text = (
            f"Evaluation loss went from {first:.3f} to {last:.3f} and levelled off: "
            f"it {moved} {abs(100 * fall):.1f} % in the last fifth of the run."
        )
        fit = Fit("good", "A good fit", text, best_step)
    tail = [loss for step, loss in train if step >= EARLY * end]
    mean = sum(tail) / len(tail) if tail else last
    if mean < GAP * last and last - mean > GAP_NATS:
        note = f" Training loss ended at {mean:.3f}, far below evaluation loss: the training rows are being memorised."
        fit = fit._replace(text=fit.text + note)
    return fit


def at(points: Points, step: float) -> float:
    """The loss at `step`, on straight lines between points."""
    before = max((p for p in points if p[0] <= step), default=points[0])
    after = min((p for p in points if p[0] >= step), default=points[-1])
    if after[0] == before[0]:
        return before[1]
    return before[1] + (after[1] - before[1]) * (step - before[0]) / (after[0] - before[0])


def slowing(points: Points, step: float) -> float:
    """As `at`, but between three points whose fall slows down the loss goes on slowing down, exponentially."""
    after = next((i for i, point in enumerate(points) if point[0] >= step), 0)
    (x0, y0), (x1, y1), (x2, y2) = points[max(after - 2, 0)], points[max(after - 1, 0)], points[after]
    if not (x0 < x1 < x2 and y0 > y1 > y2 and (y0 - y1) * (x2 - x1) > (y1 - y2) * (x1 - x0)):
        return at(points, step)
    slower = (y1 - y2) * (x1 - x0) / ((y0 - y1) * (x2 - x1))  # slope by slope, from the middle of one stretch to the other's
    ratio = slower ** (2 * (x2 - x1) / (x2 - x0))  # the same from x1 to x2
    return y2 + (y1 - y2) * (ratio ** ((step - x1) / (x2 - x1)) - ratio) / (1 - ratio)


def rewarded(evals: Points) -> Fit:
    """The verdict on a policy, by the rewards of held-out prompts' answers."""
    (_, first), (_, last) = evals[0], evals[-1]
    best_step, best = max(evals, key=lambda point: point[1])
    told = f"from {first:.3f} to {last:.3f}"
    if len(evals) < 2:
        return Fit("unknown", "Too few evaluations to tell", "One evaluation: set --config.train.eval_every lower.")
    if last > first:
        end = "" if f"{last:.3f}" == f"{best:.3f}" else f"; it was highest at step {best_step}, {best:.3f}"
        text = f"It rose {told}{end}. Read the answers too: a policy finds what a reward pays for, and not what was meant."
        return Fit("good", "The held-out reward rose", text, best_step)
    text = f"It went {told}. Where the spread of rewards is near 0 there is nothing to learn from; else raise --config.optim.lr."
    return Fit("flat" if last == first else "worse", "The held-out reward did not rise", text, best_step)
