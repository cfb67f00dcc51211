"""What a run exports is what it trained: in torch, transformers and PEFT give the same log-probs. What cannot be is refused."""

import gc
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy as worlds
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

from sftjax import tasks, tree
from sftjax.config import UserError
from sftjax.generate.open import open_engine
from sftjax.hf.load import load_config, load_params
from sftjax.hf.model import load
from sftjax.hf.verify import score
from sftjax.sharding import make_mesh
from sftjax.tasks.base import Base
from sftjax.tasks.export import export, read_config, restore
from sftjax.weights.kinds import dense
from sftjax.weights.quantize import nf4

ROWS = [[256, 5, 9, 33, 2, 60, 7, 200, 31, 31, 4, 257], [1, 2, 3, 100, 99]]
SHORT = {"train.steps": 4, "train.eval_every": 0}


@pytest.fixture(scope="module")
def lora_run(toy, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    tasks.train(toy.config(**SHORT, **{"lora.rank": 4, "lora.alpha": 8.0}), workdir)
    return workdir


@pytest.fixture(scope="module")
def full_run(toy, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("full") / "run"
    tasks.train(toy.config(**SHORT, **{"method": "full", "optim.lr": 3e-3}), workdir)
    return workdir


@pytest.fixture(scope="module")
def ours():
    """`ours(workdir)`: the run's own log-probs of ROWS, with the adapter beside the base."""

    def scores(workdir):
        config = read_config(workdir)
        base = Base(config)
        decoder, params, mask = base.build(make_mesh(1, 1, 1))
        restored = restore(workdir, params, mask, "last", print)[0]
        assert all(x.is_deleted() for x in jax.tree.leaves(tree.split(params, mask)[0]))  # one model at a time
        return score(restored, decoder.config, ROWS)

    return scores


@pytest.fixture(scope="module")
def half(toy, tmp_path_factory):
    """The toy's base in bfloat16."""
    base = shutil.copytree(toy.base, tmp_path_factory.mktemp("half") / "base")
    tensors = {name: x.astype(jnp.bfloat16) for name, x in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.fixture(scope="module")
def theirs(torch_scores):
    """`theirs(directory, adapter)`: torch's."""

    def scores(directory, adapter=None, dtype="float32"):
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        if adapter:
            import peft

            model = peft.PeftModel.from_pretrained(model, adapter).eval()
        return torch_scores(model, ROWS)

    return scores


def test_merged_lora_says_in_transformers_what_the_adapter_says_here(toy, lora_run, ours, theirs, tmp_path):
    export(lora_run, out=tmp_path / "out")
    want = ours(lora_run)
    np.testing.assert_allclose(theirs(tmp_path / "out"), want, atol=1e-4)
    assert np.abs(theirs(toy.base) - want).max() > 0.1  # training did something


def test_full_says_in_transformers_what_it_says_here(full_run, ours, theirs, tmp_path):
    export(full_run, out=tmp_path / "out")
    np.testing.assert_allclose(theirs(tmp_path / "out"), ours(full_run), atol=1e-4)


@pytest.mark.parametrize("to", ["peft", "vllm"])
def test_an_adapter_says_in_peft_what_it_says_here(toy, lora_run, ours, theirs, tmp_path, to):
    export(lora_run, to=to, out=tmp_path / "out")
    np.testing.assert_allclose(theirs(toy.base, tmp_path / "out"), ours(lora_run), atol=1e-5, rtol=1e-5)


def test_ollama_has_what_hf_writes_and_a_modelfile(lora_run, tmp_path):
    said = []
    export(lora_run, out=tmp_path / "hf" / "mine")
    export(lora_run, to="ollama", out=tmp_path / "ollama" / "mine", say=said.append)
    hf, ollama = ({f.name: f.read_bytes() for f in (tmp_path / to / "mine").iterdir()} for to in ("hf", "ollama"))
    modelfile, theirs = ollama.pop("Modelfile").decode(), json.loads(ollama.pop("tokenizer_config.json"))
    assert theirs == json.loads(hf.pop("tokenizer_config.json")) | {"add_bos_token": False}
    assert ollama == hf
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>\n" in modelfile and 'PARAMETER stop """<|im_end|>"""' in modelfile
    assert len(said) == 1  # the toy's template does nothing that Ollama's cannot


def test_what_vllm_reads_has_one_rank_and_no_scale(toy, lora_run, tmp_path):
    export(lora_run, to="vllm", out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert not config.get("rank_pattern") and not config.get("alpha_pattern") and not config["use_rslora"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {min(t.shape) for t in tensors.values()} == {4}


def test_peft_keeps_the_runs_rank_and_alpha(toy, lora_run, tmp_path):
    export(lora_run, to="peft", out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(toy.base))


def test_an_adapter_is_asked_through_the_template_it_was_trained_with(toy, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(worlds.CHATML.replace("\n", " : "))
    tasks.train(toy.config(**SHORT, **{"data.template": str(template)}), tmp_path / "run")
    export(tmp_path / "run", to="peft", out=tmp_path / "out")
    asked = [{"role": "user", "content": "what?"}]
    _, alone = open_engine(str(toy.base))
    for others in ((), ("tokenizer.json", "tokenizer_config.json")):  # files that an adapter from elsewhere may lack
        for name in others:
            (tmp_path / "out" / name).unlink()
        _, chat = open_engine(str(toy.base), str(tmp_path / "out"))
        assert chat.template == template.read_text() != alone.template
        assert chat.prompt(asked) != alone.prompt(asked)


def test_bfloat16(lora_run, theirs, ours, tmp_path):
    export(lora_run, out=tmp_path / "out", dtype="bfloat16")
    assert {x.dtype.name for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {"bfloat16"}
    np.testing.assert_allclose(theirs(tmp_path / "out"), ours(lora_run), atol=0.5)


def changed(base, out):
    """Names of the tensors whose bytes are not the base's."""
    before, after = (load_file(directory / "model.safetensors") for directory in (base, out))
    assert {name: x.dtype for name, x in before.items()} == {name: x.dtype for name, x in after.items()}
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


def test_a_base_in_bfloat16_keeps_its_bytes_where_nothing_trained(toy, half, tmp_path):
    changes = {"model.path": str(half), "method": "freeze", "freeze.last_n_layers": 1, "freeze.train": ("final_norm",)}
    tasks.train(toy.config(**SHORT, **changes), tmp_path / "run")
    export(tmp_path / "run", out=tmp_path / "out")
    names = load_file(half / "model.safetensors")
    assert changed(half, tmp_path / "out") == {name for name in names if "layers.2." in name or name == "model.norm.weight"}


def test_trained_tokens_change_their_own_rows_and_no_other_byte(toy, half, tmp_path):
    changes = {"model.path": str(half), "method": "tokens", "tokens.train": ("<|im_start|>", "<|im_end|>"), "optim.lr": 0.1}
    tasks.train(toy.config(**SHORT, **changes), tmp_path / "run")
    export(tmp_path / "run", out=tmp_path / "out")
    assert changed(half, tmp_path / "out") == {"model.embed_tokens.weight", "lm_head.weight"}
    before, after = (load_file(directory / "model.safetensors") for directory in (half, tmp_path / "out"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = [i for i, (x, y) in enumerate(zip(before[name], after[name])) if x.tobytes() != y.tobytes()]
        assert rows == [256, 257]


# Over a quantised base


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def quantised_run(request, toy, half, tmp_path_factory):
    """LoRA or DoRA on two of seven kernels, over NF4 of a base in bfloat16."""
    workdir = tmp_path_factory.mktemp("quantised") / "run"
    changes = {
        "model.path": str(half),
        "model.quantize": "nf4",
        "lora.targets": ("q_proj", "up_proj"),
        "lora.dora": request.param,
    }
    tasks.train(toy.config(**SHORT, **changes), workdir)
    return workdir


KERNELS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_a_quantised_base_merges_as_it_was_trained_over(half, quantised_run, ours, theirs, tmp_path):
    said = []
    export(quantised_run, out=tmp_path / "out", say=said.append)
    assert "log-probs differ by at most" in said[-1]
    kernels = {name for name in load_file(half / "model.safetensors") if name.endswith(tuple(f"{k}.weight" for k in KERNELS))}
    assert changed(half, tmp_path / "out") == kernels
    w = load_params(half, load_config(half))["layers"]["attn"]["k"]["kernel"]
    got = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(got, np.asarray(nf4(w[1]).dequantise()).T)
    export(quantised_run, out=tmp_path / "wide", dtype="float32")
    np.testing.assert_allclose(theirs(tmp_path / "wide"), ours(quantised_run), atol=1e-4)


def test_a_quantised_base_gives_way_to_the_original_and_says_what_that_changes(half, quantised_run, ours, theirs, tmp_path):
    said = []
    most = export(quantised_run, out=tmp_path / "out", base="original", say=said.append)
    assert most > 1e-2  # in nats: more than rounding, and no error
    assert re.search(r"over the original base .* nf4 one: log-probs differ by \S+ nats on average and \S+ at most$", said[-1])
    names = load_file(half / "model.safetensors")
    assert changed(half, tmp_path / "out") == {name for name in names if re.search(r"(q|up)_proj", name)}
    export(quantised_run, out=tmp_path / "wide", base="original", dtype="float32")
    apart = np.abs(theirs(tmp_path / "wide") - ours(quantised_run))
    assert apart.max() == pytest.approx(most, rel=0.5)  # of other tokens, and without the rounding to bfloat16


def test_an_adapter_over_a_quantised_base_is_read_back_over_the_same(half, quantised_run, ours, tmp_path):
    assert export(quantised_run, to="peft", out=tmp_path / "out") < 1e-5
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(half)
    model = load(half, adapter=tmp_path / "out", quantize="nf4")
    np.testing.assert_allclose(score(model.params, model.config, ROWS), ours(quantised_run), atol=1e-5)


def test_options_of_a_merged_checkpoint_are_refused_for_an_adapter(quantised_run, tmp_path):
    sentence = "--base=original: --to=peft writes an adapter, which merges into no base; leave --base out, or use --to=hf"
    with pytest.raises(UserError) as told:
        export(quantised_run, to="peft", base="original", out=tmp_path / "out")
    assert str(told.value) == sentence


# What a form has no words for


UNSERVED = {
    "DoRA": {"lora.dora": True},
    "modules_to_save": {"lora.modules_to_save": ("lm_head",)},
    "trained tokens": {"tokens.train": ("<tool>",)},
}


@pytest.mark.parametrize("name", UNSERVED)
def test_what_vllm_would_refuse_is_merged_for_it(name, toy, ours, theirs, tmp_path):
    tasks.train(toy.config(**SHORT, **UNSERVED[name]), tmp_path / "run")
    said = []
    export(tmp_path / "run", to="vllm", out=tmp_path / "out", say=said.append)
    assert f"vLLM serves no adapter with {name}: {tmp_path / 'out'} becomes the whole model, merged" in said[-2]
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    np.testing.assert_allclose(theirs(tmp_path / "out"), ours(tmp_path / "run"), atol=1e-4)
    export(tmp_path / "run", to="peft", out=tmp_path / "adapter")
    model = load(toy.base, adapter=tmp_path / "adapter")
    np.testing.assert_allclose(score(model.params, model.config, ROWS), ours(tmp_path / "run"), atol=1e-5)


def test_a_bottleneck_adapter_has_a_form_of_its_own(toy, ours, tmp_path):
    tasks.train(toy.config(**SHORT, **{"method": "adapter", "adapter.width": 4}), tmp_path / "run")
    assert export(tmp_path / "run", to="sftjax", out=tmp_path / "out") < 1e-5
    model = load(toy.base, adapter=tmp_path / "out")
    np.testing.assert_allclose(score(model.params, model.config, ROWS), ours(tmp_path / "run"), atol=1e-5)
    for to in ("hf", "peft", "vllm"):
        with pytest.raises(UserError, match=rf"--to={to}: the run trained by method adapter, .*; use --to=sftjax$"):
            export(tmp_path / "run", to=to, out=tmp_path / "other")


def test_llama_with_new_tokens(toy, theirs, ours, tmp_path):
    """A base without a template is given ChatML; the rows of its tokens are trained and exported."""
    base = worlds.make_base(tmp_path / "base", "llama", attention_bias=True, tie_word_embeddings=True)
    (base / "chat_template.jinja").unlink()
    changes = {"model.path": str(base), "data.template": "llama3", "data.max_length": 128}
    tasks.train(toy.config(**SHORT, **changes), tmp_path / "run")
    export(tmp_path / "run", out=tmp_path / "out")
    np.testing.assert_allclose(theirs(tmp_path / "out"), ours(tmp_path / "run"), atol=1e-4)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert "<|start_header_id|>" in text
    assert len(tokenizer) > len(AutoTokenizer.from_pretrained(base))
    export(tmp_path / "run", to="peft", out=tmp_path / "adapter")
    cards = [(tmp_path / out / "README.md").read_text() for out in ("out", "adapter")]
    assert [ModelCard(text).data.library_name for text in cards] == ["transformers", "peft"]
    assert ["## Loading with PEFT" in text for text in cards] == [False, True]  # which has to make room for the tokens
    model = load(base, adapter=tmp_path / "adapter")
    assert len(model.tokenizer) == len(tokenizer) == model.config.vocab
    np.testing.assert_allclose(score(model.params, model.config, ROWS), ours(tmp_path / "run"), atol=1e-5)


def test_new_tokens_in_a_padded_vocabulary_start_as_the_mean(toy, theirs, ours, tmp_path):
    base = worlds.make_base(tmp_path / "base", vocab_size=272)
    changes = {"model.path": str(base), "data.template": "llama3", "data.max_length": 128}
    started = Base(toy.config(**changes))
    (first, *_) = new = started.chat.tokenizer.convert_tokens_to_ids(started.new_tokens)
    assert len(new) == 3 and first < max(new) < 272
    _, params, _ = started.build(make_mesh(1, 1, 1))
    table = np.asarray(dense(params["embed"]["embedding"]))
    np.testing.assert_allclose(table[new], np.tile(table[:first].mean(0), (3, 1)), rtol=1e-5, atol=1e-6)
    tasks.train(toy.config(**SHORT, **changes), tmp_path / "run")
    export(tmp_path / "run", out=tmp_path / "out")
    np.testing.assert_allclose(theirs(tmp_path / "out"), ours(tmp_path / "run"), atol=1e-4)


def test_an_exported_adapter_trains_further_from_where_it_was(toy, lora_run, tmp_path):
    export(lora_run, to="peft", out=tmp_path / "adapter")
    was = json.loads((lora_run / "summary.json").read_text())
    got = tasks.train(toy.config(**SHORT, **{"model.adapter": str(tmp_path / "adapter")}), tmp_path / "further")
    assert got["eval_loss_before"] == pytest.approx(was["eval_loss"], rel=1e-5)
    assert got["eval_loss"] < was["eval_loss"]
    export(tmp_path / "further", out=tmp_path / "out")


def test_the_peft_fixture_trains_further(toy, shared, tmp_path):
    models = shared / "data" / "hf_models"
    data = worlds.write_rows(tmp_path / "texts.jsonl", [{"text": f"Lily had {i} red balls and a cat. " * 6} for i in range(40)])
    changes = {"task": "pretrain", "model.path": str(models / "stories260K"), "data.train": (str(data),), "optim.lr": 1e-2}
    changes |= {"model.adapter": str(models / "lora_fixture" / "adapter")}
    got = tasks.train(toy.config(**SHORT, **changes), tmp_path / "run")
    assert got["eval_loss"] < got["eval_loss_before"]
    assert export(tmp_path / "run", to="peft", out=tmp_path / "out") < 1e-3


def test_an_earlier_export_is_replaced_and_anything_else_is_not(lora_run, tmp_path):
    export(lora_run, out=tmp_path / "out")
    export(lora_run, out=tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is not an export of sftjax"):
        export(lora_run, out=tmp_path / "mine")
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    assert {d.name for d in tmp_path.iterdir()} == {"out", "mine"}  # nothing left beside them


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"to": "peft"}, "--to=peft: the run trained by method full, which makes no adapter; use --to=hf or --to=ollama"),
        ({"to": "sftjax"}, "--to=sftjax: the run trained by method full, which makes no adapter; use --to=hf or --to=ollama"),
        ({"to": "gguf"}, "--to=gguf: needs one of hf, ollama, peft, sftjax, vllm"),
        ({"checkpoint": "newest"}, "--checkpoint=newest: needs last, best or one of 4"),
        ({"checkpoint": 3}, "--checkpoint=3: needs last, best or one of 4"),
        ({"dtype": "bf16"}, "dtype=bf16: needs one of float32, bfloat16, float16; did you mean bfloat16?"),
        ({"base": "original"}, "--base=original: the run's base was not quantised (model.quantize); leave --base out"),
        ({"base": "bf16"}, "--base=bf16: needs dequantised or original"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(full_run, tmp_path, changes, sentence):
    with pytest.raises(UserError) as told:
        export(full_run, out=tmp_path / "out", **changes)
    assert str(told.value) == sentence
    assert not (tmp_path / "out").exists()


def test_no_run_and_no_checkpoint_are_told(toy, lora_run, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json there, so it is no run's directory"):
        export(tmp_path, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"the config\.json there is not a run's, which has no \w+$"):
        export(toy.base, out=tmp_path / "out")
    workdir = shutil.copytree(lora_run, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(UserError, match="the run has saved no checkpoint yet"):
        export(workdir, out=tmp_path / "out")
    assert not (workdir / "checkpoints").exists()  # looking leaves no trace


def test_exporting_does_not_disturb_a_run_that_is_saving(lora_run, tmp_path):
    workdir = shutil.copytree(lora_run, tmp_path / "run")
    writing = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    writing.mkdir()
    export(workdir, out=tmp_path / "out")
    assert writing.exists()


def test_an_adapter_has_no_dtype(lora_run, tmp_path):
    with pytest.raises(UserError, match="an adapter is always float32"):
        export(lora_run, to="vllm", out=tmp_path / "out", dtype="bfloat16")


def test_a_base_that_was_changed_since_is_not_merged_into(toy, tmp_path):
    base = shutil.copytree(toy.base, tmp_path / "base")
    tasks.train(toy.config(**SHORT, **{"model.path": str(base)}), tmp_path / "run")
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-2] ^= 64
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"the base is not what the run in .* was trained from"):
        export(tmp_path / "run", out=tmp_path / "out")


def test_a_template_that_was_changed_since_is_not_exported(toy, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(worlds.CHATML)
    tasks.train(toy.config(**SHORT, **{"data.template": str(template)}), tmp_path / "run")
    template.write_text(worlds.CHATML.replace("user", "human") + "\n")
    with pytest.raises(UserError, match=r"mine\.jinja: the template is not what the run in .* was trained from"):
        export(tmp_path / "run", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_moved_is_found_by_export_once_the_run_has_found_it(toy, tmp_path):
    base = shutil.copytree(toy.base, tmp_path / "base")
    tasks.train(toy.config(**SHORT, **{"model.path": str(base)}), tmp_path / "run")
    moved = base.rename(tmp_path / "moved")
    tasks.train(toy.config(**SHORT, **{"model.path": str(moved)}), tmp_path / "run")
    export(tmp_path / "run", out=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_home_directory_is_one(lora_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(lora_run, tmp_path / "run")
    export("~/run", out="~/out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("base", [None, "original"])
def test_what_was_written_is_read_back_once_the_run_is_gone(base, quantised_run, tmp_path, monkeypatch):
    """Bytes on the device when a second model is read, beyond those before the export: of the run's, none of any size."""

    def alive():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    before, seen = alive(), []

    def watched(*args, **options):
        seen.append(alive() - before)
        return load_params(*args, **options)

    monkeypatch.setattr("sftjax.hf.verify.load_params", watched)
    export(quantised_run, base=base, out=tmp_path / "out")
    size = sum(x.nbytes for x in load_file(tmp_path / "out" / "model.safetensors").values())
    assert len(seen) == 1 and seen[0] < 0.05 * size


@pytest.mark.parametrize(
    "kind, changes, told",
    [
        ("qwen3", {"lora.targets": ("q_proj", "lm_head")}, "LoRA on lm_head of a Qwen3ForCausalLM"),
        ("llama", {"lora.targets": ("q_proj", "lm_head")}, None),
        ("llama", {"lora.targets": ("q_proj",), "lora.rank": 513}, "rank 513 (at most 512)"),
    ],
)
def test_vllm_is_served_by_family_and_rank(kind, changes, told, toy, theirs, ours, tmp_path):
    base = worlds.make_base(tmp_path / "base", kind)
    tasks.train(toy.config(**SHORT | {"model.path": str(base)} | changes), tmp_path / "run")
    said = []
    export(tmp_path / "run", to="vllm", out=tmp_path / "out", say=said.append)
    merged = f"vLLM serves no adapter with {told}: {tmp_path / 'out'} becomes the whole model, merged, as --to=hf writes it"
    assert said[:-1] == ([merged] if told else [])
    got = theirs(tmp_path / "out") if told else theirs(base, tmp_path / "out")
    np.testing.assert_allclose(got, ours(tmp_path / "run"), atol=1e-4)
