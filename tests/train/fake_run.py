"""A run's directory as training leaves it, made up: curves with noise, held-out answers, counts."""

from __future__ import annotations

import math
import random
from pathlib import Path

from sftjax.config import default
from sftjax.train.manifest import leaves, length_histogram
from sftjax.train.run import Run, clean

REVIEW = "the parcel arrived late but the colours are lovely and I would buy it again from this shop without a thought"


def fake_run(workdir: Path, *, steps: int = 400, shape: str = "good", hostile: str = "") -> Path:
    """`shape` is the evaluation curve's: good, overfit or underfit. `hostile` is put wherever text comes from data."""
    rng = random.Random(0)
    config = default()
    config.model.path = "base/Qwen3-0.6B" + hostile
    config.optim.lr, config.train.epochs, config.data.max_length = 5e-4, 3.0, 512
    config.data.train = ("data/reviews.jsonl",)
    lengths = [min(512, round(rng.lognormvariate(4.6, 0.55))) for _ in range(4100)]
    with Run(workdir, writer=True) as run:
        run.resume_from(-1)
        run.write_json("config.json", config)
        run.write_json("manifest.json", fake_manifest(leaves(clean(config)[0]), lengths, hostile))
        curves(run, rng, steps, shape)
        run.write_lines("samples.jsonl", [sample(rng, i, hostile) for i in range(48)])
        run.write_json("summary.json", SUMMARY | {"steps": steps})
    return workdir


def curves(run: Run, rng: random.Random, steps: int, shape: str) -> None:
    def loss(step: float) -> float:
        return {"good": 0.5 + 2.6 * math.exp(-9 * step / steps), "overfit": 0.2 + 2.9 * math.exp(-5 * step / steps)}.get(
            shape, 3.1 - 1.9 * step / steps
        )

    for step in range(0, steps + 1, 5):
        share = step / steps
        if step:
            rate = 5e-4 * min(1, share / 0.05) * 0.5 * (1 + math.cos(math.pi * share))
            norm = 0.6 + 2 * math.exp(-12 * share) + abs(rng.gauss(0, 0.15)) + (6 if step == 205 else 0)
            value = math.inf if step == 150 else loss(step) + rng.gauss(0, 0.1) * (0.3 + loss(step) / 3)
            run.log(step, {"loss": value, "lr": rate, "grad_norm": norm, "tokens_per_s": 8123 + rng.gauss(0, 160)})
        if step % (steps // 10) == 0:
            over = max(0.0, share - 0.4) * 0.9 if shape == "overfit" else 0
            run.log(step, {"loss": loss(step) + 0.06 + over, "ppl": math.exp(loss(step))}, kind="eval")


def fake_manifest(config: dict, lengths: list[int], hostile: str) -> dict:
    trained = [max(1, n // 3) for n in lengths]
    return {
        "created": "2026-01-20T09:30:12+00:00",
        "versions": {"sftjax": "0.1.0", "python": "3.12.4", "jax": "0.10.2", "flax": "0.12.8", "transformers": "5.23.0"},
        "device": {"kind": "NVIDIA H200", "count": 1, "processes": 1},
        "config": config,
        "hashes": {"data": "9f2c" * 16, "template": "41d0" * 16, "tokenizer": "77aa" * 16, "base": "c0de" * 16},
        "data": {
            "read": 5213,
            "kept": 5125,
            "dropped": {"overlong": 61, "bad_row": 19, "trains_nothing": 8},
            "truncated": 0,
            "train": {"rows": 4100, "tokens": 512345, "trained_tokens": 171022},
            "eval": {"rows": 512, "tokens": 63901, "trained_tokens": 21377},
            "test": {"rows": 513, "tokens": 64012, "trained_tokens": 21401},
            "sources": [
                {"path": "data/reviews.jsonl" + hostile, "weight": 1.0, "rows": 5194, "sha256": "9f2c" * 16, "on_hub": False}
            ],
            "lengths": length_histogram(lengths, trained),
        },
    }


def sample(rng: random.Random, i: int, hostile: str) -> dict:
    label = rng.choice(["positive", "negative", "mixed"])
    review = " ".join(rng.choices(REVIEW.split(), k=rng.randint(8, 40)))
    good_base, good_tuned = rng.random() < 0.12, rng.random() < 0.9
    wrong = "I think that this review expresses a feeling which may be considered, on the whole, as follows:\n" + review
    tuned = label if good_tuned else "neutral"
    return {
        "prompt": f"Label this review as positive, negative or mixed.\n\n{review}{hostile}",
        "expected": label,
        "base": label if good_base else wrong + hostile,
        "tuned": tuned + (hostile if i == 0 else ""),
        "base_stopped": good_base,
        "tuned_stopped": i % 20 != 3,
        "exact_base": good_base,
        "exact_tuned": good_tuned,
    }


SUMMARY = {
    "eval_loss_before": 3.164,
    "eval_loss": 0.561,
    "exact_match_before": 0.021,
    "exact_match": 0.917,
    "tokens": 1537035,
    "trained_tokens": 513066,
    "tokens_per_s": 8123.0,
    "mfu": 0.412,
    "compile_s": 11.2,
    "first_step_s": 14.8,
    "total_s": 212.6,
    "peak_memory_mib": 9120,
}
