"""Tables that a single task brings to the report: a classifier's confusion, a reward model's calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN_LABELS = 40  # of a confusion matrix; beyond, the figures by label are shown and the matrix is in summary.json


def confusion(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row a label: its training rows, precision, recall, F1, and what its held-out texts were taken for."""
    found = summary.get("classes")
    if not found:
        return None
    labels, rows = found["labels"], []
    columns = [*labels, "no label"][: len(found["confusion"][0])]  # an answer may be none
    total = max(sum(found["counts"].values()), 1)
    for i, label in enumerate(labels):
        of = found["per_class"][label]
        cells = [
            {"n": n, "shade": round(100 * n / max(of["count"], 1)), "right": i == j, "as": columns[j]}
            for j, n in enumerate(found["confusion"][i])
        ]
        figures = [f"{of[name]:.3f}" for name in ("precision", "recall", "f1")]
        trained = found["counts"][label]
        weight = f"{found['weights'][i]:.2f}" if found["weights"] else ""
        rows.append(
            {"label": label, "trained": f"{trained:,}", "share": f"{100 * trained / total:.1f} %", "weight": weight}
            | {"count": of["count"], "figures": figures, "cells": cells}
        )
    return {"labels": columns if len(labels) <= SHOWN_LABELS else [], "rows": rows, "weighted": bool(found["weights"])}


def calibration(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row for each bin of confidence that held pairs: how sure the model was, how often it was right."""
    found = summary.get("calibration")
    if not found:
        return None
    rows = [
        {"range": f"{b['from']:.2f} - {b['to']:.2f}", "pairs": f"{b['pairs']:,}", "confidence": f"{b['confidence']:.3f}"}
        | {"accuracy": f"{b['accuracy']:.3f}", "bar": round(100 * b["accuracy"]), "mark": round(100 * b["confidence"])}
        for b in found["bins"]
    ]
    return {"ece": f"{found['ece']:.3f}", "rows": rows}
