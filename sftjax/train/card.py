"""README.md of an export: the model card that the Hugging Face Hub shows, from what the run's directory says of it.

The block between the dashes is the Hub's own metadata (https://huggingface.co/docs/hub/model-cards). A base and data that lie on
a disk are told by their last name alone: where they lay is nobody else's affair.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftjax.config import parts
from sftjax.data.readers import HUB_ID, kind
from sftjax.train.manifest import leaves
from sftjax.train.report import config_rows, headlines
from sftjax.train.run import read_json

LIBRARY = {"hf": "transformers", "peft": "peft", "vllm": "peft", "sftjax": "sftjax"}
REWARDS = ("grpo.rewards", "ppo.rewards")
PLACES = ("model.path", "model.adapter", "data.train", "data.eval", "data.template", "data.cache_dir")


def card(workdir: Path, name: str, form: str, step: int, *, measured: bool = True) -> str:
    """The card of a run's weights at `step`, exported as `name` in one of LIBRARY's forms. It has the run's last figures where
    these are the weights that were `measured` for them."""
    from huggingface_hub import ModelCardData

    summary, manifest, config = (read_json(workdir / f"{file}.json") or {} for file in ("summary", "manifest", "config"))
    config = leaves(config)
    task, method, base = config["task"], config["method"], config["model.path"]
    data = manifest["data"]
    learnt_from = [source for source in data["sources"] if not source.get("held_out")]
    adapter = f" with the adapter {called(config['model.adapter'])}" if config["model.adapter"] else ""
    metadata = ModelCardData(
        base_model=base if on_hub(base) else None,
        datasets=sorted({source["path"].split(":")[0] for source in learnt_from if source.get("on_hub")}) or None,
        library_name=LIBRARY[form],
        pipeline_tag="text-classification" if manifest.get("labels") else "text-generation",
        tags=["sftjax", task, method],
    )
    named = dict.fromkeys(called(source["path"], source.get("on_hub")) for source in learnt_from)
    learnt = f"{data['train']['rows']:,} rows of {', '.join(named)}"
    told = {key: unplaced(value) if key in REWARDS else value for key, value in config.items() if key not in PLACES}
    versions = ", ".join(f"{package} {version}" for package, version in manifest["versions"].items())
    return "\n".join(
        [
            "---",
            metadata.to_yaml(),
            "---",
            "",
            f"# {name}",
            "",
            f"{called(base)}{adapter} after {step:,} steps of training on {learnt} (task {task}, method {method}) with sftjax.",
            *(figures(summary) if measured and summary.get("steps") == step else ()),
            "",
            "## Settings",
            "",
            "Those that are not sftjax's defaults:",
            "",
            "| | |",
            "|---|---|",
            *(f"| `{key}` | {cell(value)} |" for key, value, _ in config_rows(told)["changed"]),
            "",
            f"Made with {versions}.",
            "",
        ]
    )


def put_card(text: str, directory: Path) -> None:
    """The card, and after it what already stands in the README.md there."""
    file = directory / "README.md"
    own = "\n" + file.read_text(encoding="utf-8") if file.exists() else ""
    file.write_text(text + own, encoding="utf-8")


def figures(summary: Mapping[str, Any]) -> list[str]:
    """What held-out rows said before training and after it."""
    table = [f"| {one['label']} | {one['before']} | {one['after']} |" for one in headlines(summary)]
    return ["", "| held out | before | after |", "|---|---:|---:|", *table] if table else []


def unplaced(rewards: Any) -> Any:
    """Rewards without the folders of what lies on a disk: model:DIR, FILE.py:FUNCTION."""
    each = parts(rewards) if isinstance(rewards, str) else rewards
    return [re.sub(r"^(model:)?.*/(?=.)", r"\1", x) if x.startswith("model:") or ".py:" in x else x for x in each]


def on_hub(path: str) -> bool:
    return bool(HUB_ID.fullmatch(path)) and not kind(path) and not os.path.exists(path)


def called(path: str, hub: bool | None = None) -> str:
    """A hub id as it is, of anything else the last part; None: by what lies there now."""
    return f"`{path if (on_hub(path) if hub is None else hub) else Path(path).name}`"


def cell(value: str) -> str:
    return f"`{value}`".replace("|", r"\|").replace("\n", " ")
