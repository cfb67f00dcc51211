"""Adapters without a run: what they say over their base, the export says, in torch too. No sum is made of what is none."""

import json
import shutil

import jax
import numpy as np
import pytest

from sftjax import tasks
from sftjax.config import UserError
from sftjax.hf.load import load_config, load_params
from sftjax.hf.model import load
from sftjax.hf.peft import load_adapter
from sftjax.hf.verify import score
from sftjax.tasks.combine import export_adapters
from sftjax.tasks.export import export
from sftjax.weights.lora import merge

ROWS = [[256, 5, 9, 33, 2, 60, 7, 200, 31, 31, 4, 257], [1, 2, 3, 100, 99]]
RUNS = {
    "lora": {"lora.rank": 4},
    "other": {"lora.rank": 2, "lora.targets": ("q_proj", "down_proj"), "seed": 1},
    "dora": {"lora.dora": True},
    "whole": {"lora.modules_to_save": ("lm_head",)},
    "tokens": {"tokens.train": ("<|im_start|>",)},
}
BOTTLENECK = {"method": "adapter", "adapter.width": 2}


@pytest.fixture(scope="module")
def adapters(toy, tmp_path_factory):
    """{name: an adapter's directory}."""
    root, out = tmp_path_factory.mktemp("adapters"), {}
    for name, changes in (RUNS | {"bottleneck": BOTTLENECK}).items():
        tasks.train(toy.config(**{"train.steps": 4, "train.eval_every": 0}, **changes), root / f"run-{name}")
        export(root / f"run-{name}", to="sftjax" if name == "bottleneck" else "peft", out=root / name)
        out[name] = root / name
    return out


@pytest.fixture(scope="module")
def says(torch_scores):
    """`says(model, adapter)`: what torch says of ROWS, PEFT over transformers."""

    def scores(model, adapter=None):
        import peft
        from transformers import AutoModelForCausalLM

        found = AutoModelForCausalLM.from_pretrained(model).eval()
        return torch_scores(peft.PeftModel.from_pretrained(found, adapter).eval() if adapter else found, ROWS)

    return scores


@pytest.mark.parametrize("name", RUNS)
def test_one_adapter_merges_into_its_base(name, toy, adapters, says, tmp_path):
    assert export_adapters(toy.base, [adapters[name]], out=tmp_path / "out") < 1e-4
    np.testing.assert_allclose(says(tmp_path / "out"), says(toy.base, adapters[name]), atol=1e-4)


@pytest.fixture(scope="module")
def summed(toy, adapters):
    """What W + 0.7 lora + 0.3 other says, summed here as dense matrices."""
    config = load_config(toy.base)
    base = load_params(toy.base, config)
    first, second = (merge(load_adapter(base, adapters[name])) for name in ("lora", "other"))
    params = jax.tree.map(lambda w, x, y: w + 0.7 * (x - w) + 0.3 * (y - w), base, first, second)
    return score(params, config, ROWS)


@pytest.mark.parametrize("to", ["hf", "ollama", "peft", "vllm"])
def test_several_are_the_weighted_sum_of_their_updates(to, toy, adapters, summed, says, tmp_path):
    said = []
    pair = [adapters["lora"], adapters["other"]]
    export_adapters(toy.base, pair, weights=[0.7, 0.3], to=to, out=tmp_path / "out", say=said.append)
    assert said[-1].startswith(f"wrote {tmp_path / 'out'} and read it back: log-probs differ by at most")
    assert (tmp_path / "out" / "Modelfile").is_file() == (to == "ollama")
    got = says(tmp_path / "out") if to in ("hf", "ollama") else says(toy.base, tmp_path / "out")
    np.testing.assert_allclose(got, summed, atol=1e-4)
    assert np.abs(summed - says(toy.base)).max() > 0.1


def test_shares_are_equal_where_none_are_given(toy, adapters, says, tmp_path):
    pair = [adapters["lora"], adapters["other"]]
    export_adapters(toy.base, pair, to="peft", out=tmp_path / "plain")
    export_adapters(toy.base, pair, to="peft", weights=[0.5, 0.5], out=tmp_path / "told")
    np.testing.assert_allclose(says(toy.base, tmp_path / "plain"), says(toy.base, tmp_path / "told"), atol=1e-6)


def test_a_plain_adapter_takes_vllms_form_and_dora_is_merged(toy, adapters, tmp_path):
    export_adapters(toy.base, [adapters["lora"]], to="vllm", out=tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and config["base_model_name_or_path"] == str(toy.base)
    said = []
    export_adapters(toy.base, [adapters["dora"]], to="vllm", out=tmp_path / "merged", say=said.append)
    assert "vLLM serves no adapter with DoRA" in said[0]
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_what_is_asked_through_a_template_goes_along(toy, adapters, tmp_path):
    (adapters["other"] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    said = []
    export_adapters(toy.base, [adapters["lora"], adapters["other"]], out=tmp_path / "out", say=said.append)
    assert said[0] == f"the adapters' chat templates differ: {tmp_path / 'out'} has that of {adapters['lora']}"
    assert load(tmp_path / "out").tokenizer.chat_template == load(toy.base).tokenizer.chat_template


@pytest.mark.parametrize("name, told", [("some/other-8B", True), ("me/{base}", False), ("{place}", False), (None, False)])
def test_an_adapter_of_another_model_is_told_in_a_line(name, told, toy, adapters, tmp_path):
    adapter, said = shutil.copytree(adapters["lora"], tmp_path / "adapter"), []
    (tmp_path / "link").symlink_to(toy.base)
    name = name and name.format(base=toy.base.name, place=tmp_path / "link")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    export_adapters(toy.base, [adapter], to="peft", out=tmp_path / "out", say=said.append)
    line = f"{adapter}: says that it was trained over {name}, and goes over {toy.base} here"
    assert said[:-1] == ([line] if told else [])


@pytest.mark.parametrize(
    "names, options, sentence",
    [
        (["dora", "lora"], {}, r"is more than a LoRA over the one base in an adapter"),
        (["whole", "lora"], {}, r"^lm_head is more than a LoRA over the one base in an adapter"),
        (["whole"], {"weights": [0.5]}, r"^lm_head is more than a LoRA over the one base in an adapter"),
        (["bottleneck"], {}, r"--adapter=.*/bottleneck: bottleneck adapters .* can be neither merged nor added nor written"),
        (["lora", "other"], {"weights": [1.0]}, r"--weights has 1 numbers and there are 2 of --adapter"),
        (["lora", "other"], {"weights": [0.0, 0.0]}, r"^--weights=0,0: nothing is left of the adapters"),
        (["tokens", "lora"], {}, r"^embed_tokens is more than a LoRA .*trained tokens"),
        (["lora"], {"to": "sftjax"}, r"--to=sftjax: adapters over a --model are written as hf, peft, vllm or ollama"),
        (["lora"], {"to": "peft", "dtype": "bfloat16"}, r"--dtype=bfloat16: an adapter is always float32"),
        (["lora"], {"to": "vllm", "dtype": "bfloat16"}, r"--dtype=bfloat16: an adapter is always float32"),
    ],
)
def test_what_cannot_be_is_one_sentence(names, options, sentence, toy, adapters, tmp_path):
    with pytest.raises(UserError, match=sentence):
        export_adapters(toy.base, [adapters[name] for name in names], out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
