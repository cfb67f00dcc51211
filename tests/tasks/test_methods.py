"""Every method on an untied Llama and a tied Qwen3.

It starts from what the base says, lowers the loss and comes out as trained; over Qwen3 it also goes on after a stop as if
there had been none, which is nothing of the base's.
"""

import shutil

import pytest
import toy as worlds

from sftjax import tasks
from sftjax.tasks.export import export

METHODS = {
    "full": {"method": "full", "optim.lr": 3e-3},
    "lora": {},
    "rslora": {"lora.rslora": True, "lora.rank": 4, "lora.alpha": 8.0},
    "dora": {"lora.dora": True},
    "pissa": {"lora.init": "pissa", "lora.rank": 4},
    "olora": {"lora.init": "olora", "lora.rank": 4, "lora.alpha": 4.0},
    "lora+": {"lora.lr_ratio": 16.0, "optim.lr": 3e-3},
    "qlora": {"model.quantize": "nf4"},
    "int8": {"model.quantize": "int8"},
    "qdora": {"model.quantize": "nf4", "lora.dora": True},
    "adapter": {"method": "adapter", "adapter.width": 16},
    "tokens": {"method": "tokens", "tokens.train": ("<|im_start|>", "<|im_end|>"), "optim.lr": 0.1},
    "bias": {"method": "freeze", "freeze.train": ("bias",), "optim.lr": 0.05},
}
STARTS_ELSEWHERE = ("qlora", "int8", "qdora")  # by the error of quantising
FORMS = {"adapter": ["sftjax"], "full": ["hf"], "bias": ["hf"]}
BASES = {"llama": {}, "qwen3": {"tie_word_embeddings": True}}
STEPS, HALF = 6, 3


@pytest.fixture(scope="module", params=BASES)
def world(request, toy, tmp_path_factory):
    """(a base's family, settings of a run from it, the evaluation loss of the base itself)."""
    root = tmp_path_factory.mktemp(request.param)
    base = worlds.make_base(root / "base", request.param, attention_bias=True, **BASES[request.param])
    settings = {"model.path": str(base), "train.steps": STEPS, "train.save_every": HALF, "train.eval_every": 0}
    one = tasks.train(toy.config(**settings | METHODS["full"] | {"train.steps": 1}), root / "one")
    return request.param, settings, one["eval_loss_before"]


@pytest.mark.parametrize("name", METHODS)
def test_method(name, toy, world, tmp_path):
    family, settings, untrained = world
    config = toy.config(**settings | METHODS[name])
    summary = tasks.train(config, tmp_path / "run")
    assert summary["eval_loss"] < 0.95 * summary["eval_loss_before"]
    if name not in STARTS_ELSEWHERE:
        assert summary["eval_loss_before"] == pytest.approx(untrained, rel=1e-5)

    forms = FORMS.get(name, ["hf", "peft"])
    for form in forms:  # it raises where what is read back is not what was trained
        assert export(tmp_path / "run", to=form, out=tmp_path / form) < 1e-3

    if family != "qwen3":
        return
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    resumed = tasks.train(config, again)
    assert (resumed["steps"], resumed["eval_loss"]) == (STEPS, summary["eval_loss"])
    export(again, to=forms[0], out=tmp_path / "resumed")
    written = sorted((tmp_path / forms[0]).glob("*.safetensors"))
    assert written and all(f.read_bytes() == (tmp_path / "resumed" / f.name).read_bytes() for f in written)
