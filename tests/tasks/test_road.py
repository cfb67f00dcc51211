"""The whole road on real files, as the README walks it: a checkpoint and public data in, a checkpoint that answers out."""

import json
from pathlib import Path

import pytest

from sftjax import cli

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "sft_lora.py"


def sftjax(*argv):
    """The command line in this process; it must end well."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in argv])
    assert end.value.code == 0


@pytest.mark.parametrize("data", ["llamafactory/alpaca_en_demo.json", "gsm8k/test.jsonl"])
def test_from_a_public_file_to_answers(shared, tmp_path, data):
    base, file, work, out = shared / "data/hf_models/stories260K", shared / "data" / data, tmp_path / "run", tmp_path / "out"
    small = {
        "model.path": base,
        "data.train": file,
        "data.max_length": 512,
        "data.on_overlong": "drop",
        "data.workers": 1,
        "data.cache_dir": tmp_path / "cache",
        "data.split": "0.98,0.01,0.01",
        "optim.lr": 2e-3,
        "train.steps": 4,
        "train.batch_size": 4,
        "train.tensorboard": "false",
        "mesh.data": 1,
        "eval.generate": 2,
        "eval.max_new_tokens": 8,
    }
    keys = [f"--config.{key}={value}" for key, value in small.items()]
    sftjax("train", f"--config={CONFIG}", f"--workdir={work}", *keys)
    summary = json.loads((work / "summary.json").read_text())
    assert summary["eval_loss"] < summary["eval_loss_before"] and summary["steps"] == 4

    sftjax("export", f"--workdir={work}", "--to=hf", f"--out={out}")
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "What is 1 + 1?"}\n{"question": "Name a colour."}\n')
    sftjax("generate", f"--model={out}", f"--data={questions}", f"--out={tmp_path / 'answers.jsonl'}", "--max-new-tokens=8")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [a["messages"][0]["content"] for a in answers] == ["What is 1 + 1?", "Name a colour."]
    assert any(a["answer"] for a in answers)
