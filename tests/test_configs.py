"""Every config runs, shrunk: on the toy's base and rows of the kind it wants, for two steps."""

import csv
from pathlib import Path

import pytest
import toy as worlds

from sftjax import tasks
from sftjax.check import ROLLOUTS
from sftjax.config import load

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def data(toy, tmp_path_factory):
    """A file of rows for each task."""
    folder = tmp_path_factory.mktemp("rows")
    text, labels = folder / "text.txt", folder / "labels.csv"
    text.write_text("\n\n".join(f"Document {i}: " + "all that grows must sleep. " * (1 + i % 3) for i in range(40)))
    with open(labels, "w", newline="") as f:
        rows = [(f"review {i}: {'fine' if i % 2 else 'bad'}", ("no", "yes")[i % 2]) for i in range(40)]
        csv.writer(f).writerows([("text", "label"), *rows])
    pairs = [{"prompt": f"Is {i} even?", "chosen": ("Yes.", "No.")[i % 2], "rejected": "Who knows?"} for i in range(40)]
    preferences = worlds.write_rows(folder / "pairs.jsonl", pairs)
    found = {"pretrain": text, "classify": labels, **dict.fromkeys(("sft", *ROLLOUTS), toy.data)}
    return found | dict.fromkeys(("dpo", "kto", "reward"), preferences)


@pytest.mark.parametrize("name", sorted(f.stem for f in CONFIGS.glob("*.py")))
def test_config_runs(name, toy, data, tmp_path):
    config = load(CONFIGS / f"{name}.py")
    changes = {
        "model.path": toy.base,
        "data.train": data[config.task],
        "data.cache_dir": tmp_path / "cache",
        "data.max_length": 128,
        "train.steps": 2,
        "train.batch_size": 4,
        "mesh.data": 1,
    }
    task = config.task
    if task in ROLLOUTS:
        changes |= {f"{task}.rewards": "length:4", f"{task}.reward_weights": (), f"{task}.max_completion_length": 4}
        changes |= {"grpo.num_generations": 2} if task == "grpo" else {}
    else:
        changes |= {"eval.generate": min(config.eval.generate, 2), "eval.max_new_tokens": 4}
    if config.train.micro_batch:
        changes["train.micro_batch"] = 2
    summary = tasks.train(load(CONFIGS / f"{name}.py", [f"{k}={v}" for k, v in changes.items()]), tmp_path / "run")
    assert summary["steps"] == 2
    if task in ROLLOUTS:
        assert 0 < summary["reward"] <= 1
    else:
        assert summary["eval_loss"] < summary["eval_loss_before"] + 0.5
    assert (tmp_path / "run" / "report.html").is_file()
