"""The model card of an export: what the Hub reads of it, and nothing of where things lay."""

import json

import pytest
from fake_run import SUMMARY, fake_run
from huggingface_hub import ModelCard

from sftjax.train.card import card


@pytest.fixture
def run(tmp_path):
    return fake_run(tmp_path / "secret" / "run", steps=40)


def changed(run, file, change):
    (run / file).write_text(json.dumps(change(json.loads((run / file).read_text()))))


@pytest.mark.parametrize("form, library", [("hf", "transformers"), ("peft", "peft"), ("vllm", "peft"), ("sftjax", "sftjax")])
def test_the_hub_reads_its_metadata(run, form, library):
    read = ModelCard(card(run, "mine", form, 40)).data.to_dict()
    assert read == {
        "base_model": "base/Qwen3-0.6B",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["sftjax", "sft", "lora"],
    }


def test_data_of_the_hub_is_named_and_that_of_a_disk_is_not(run):
    def sources(manifest):
        paths = {
            "org/rows:subset:train": True,
            "org/rows": True,
            "org/others": True,
            "/home/me/mine.jsonl": False,
            "a/folder": False,
        }
        found = [{"path": path, "on_hub": on_hub, "held_out": False} for path, on_hub in paths.items()]
        found += [{"path": "org/benchmark", "on_hub": True, "held_out": True}]
        return manifest | {"data": manifest["data"] | {"sources": found}, "labels": ["spam", "ham"]}

    changed(run, "manifest.json", sources)
    text = card(run, "mine", "hf", 40)
    data = ModelCard(text).data
    assert (data.datasets, data.pipeline_tag) == (["org/others", "org/rows"], "text-classification")
    assert "4,100 rows of `org/rows:subset:train`, `org/rows`, `org/others`, `mine.jsonl`, `folder`" in text
    assert "benchmark" not in text


def test_where_a_base_lay_is_not_told(run):
    def moved(config):
        config["model"] |= {"path": str(run.parent), "adapter": str(run)}
        config["grpo"]["rewards"] = ["exact_match", "format:<a>.*/.*", f"model:{run}", f"{run}/own.py:own"]
        config["ppo"]["rewards"] = f"model:{run},length:20"
        return config | {"data": config["data"] | {"train": [str(run / "rows.jsonl")]}}

    changed(run, "config.json", moved)
    text = card(run, "mine", "hf", 40)
    assert "base_model" not in text and "`secret` with the adapter `run` after 40 steps" in text and str(run.parent) not in text
    assert '`["exact_match", "format:<a>.*/.*", "model:run", "own.py:own"]`' in text and '`["model:run", "length:20"]`' in text


def test_figures_and_settings_are_the_runs(run):
    text = card(run, "mine", "hf", 40)
    assert "after 40 steps of training" in text and "| held out | before | after |" in text
    assert f"| Evaluation loss | {SUMMARY['eval_loss_before']} | {SUMMARY['eval_loss']} |" in text
    assert "| Exact match | 2.1 % | 91.7 % |" in text
    assert "| `optim.lr` | `5e-4` |" in text and "optim.b1" not in text and "jax 0.10.2" in text
    assert all("before" not in card(run, "mine", "hf", step, measured=measured) for step, measured in ((20, True), (40, False)))
    (run / "summary.json").unlink()
    assert "before" not in card(run, "mine", "hf", 40)
