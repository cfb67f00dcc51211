"""Classifiers' adapters as PEFT makes them: its scores are ours; a head that is missing, or not read whole, is told by name."""

import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.hf.load import load_config, load_params
from sftjax.hf.peft import adapter_labels, load_adapter, saved_modules, with_head
from sftjax.hf.tensors import Tensor, read, write
from sftjax.models.decoder import Decoder, forward
from sftjax.models.heads import token_scores

SCORE = "base_model.model.score.weight"


@pytest.fixture(scope="module")
def bare(checkpoint):
    return checkpoint("llama")


def classifier(bare):
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(bare, num_labels=3, pad_token_id=0).eval()


def adapted(bare, out, **options):
    """An adapter of PEFT's own in `out`, everything that trains in it moved."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(classifier(bare), LoraConfig(**{"r": 3, "target_modules": ["q_proj"]} | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return model


@pytest.fixture(scope="module")
def theirs(bare, tmp_path_factory):
    """(directory, the model there)."""
    out = tmp_path_factory.mktemp("theirs")
    return out, adapted(bare, out, task_type="SEQ_CLS")


@pytest.fixture
def adapter(theirs, tmp_path):
    return shutil.copytree(theirs[0], tmp_path / "adapter")


@pytest.mark.parametrize("headed", [False, True], ids=["over a language model", "over a classifier"])
def test_an_adapter_of_peft_scores_here_as_it_scores_there(headed, bare, theirs, rows, tmp_path):
    import torch

    out, model = theirs
    source = bare
    if headed:
        source = tmp_path / "base"
        classifier(bare).save_pretrained(source)
    config = load_config(source)
    params, config = with_head(load_params(source, config), config, out)
    assert len(config.labels) == len(adapter_labels(out)) == 3 and saved_modules(out) == ("score",)
    run = forward(Decoder(config))
    for row in rows:
        tokens, ones = jnp.asarray([row]), jnp.ones((1, len(row)), jnp.int32)
        batch = Batch(tokens, ones, ones, jnp.arange(len(row))[None])
        with torch.no_grad():
            said = model(input_ids=torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(token_scores(run(load_adapter(params, out), batch))[0, -1], said, atol=1e-5)
        assert np.abs(token_scores(run(params, batch))[0, -1] - said).max() > 0.01  # else the adapter proved nothing


@pytest.mark.parametrize(
    "changes, missing",
    [({}, "classifier"), ({"modules_to_save": ["score"]}, "score"), ({"modules_to_save": ["classifier"]}, "classifier")],
)
def test_a_head_that_is_not_there_is_told(changes, missing, adapter, edit_json):
    edit_json(adapter / "adapter_config.json", **changes)
    file = adapter / "adapter_model.safetensors"
    arrays = {name: np.array(stored.view()) for name, stored in read(file).items() if name != SCORE}
    write(file, {name: Tensor(x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()})
    with pytest.raises(UserError, match=f"holds no {missing}, which modules_to_save names"):
        adapter_labels(adapter)


@pytest.mark.parametrize(
    "changes, missing",
    [({"task_type": None}, "classifier"), ({"modules_to_save": ["classifier", "score", "o_proj"]}, "o_proj")],
    ids=["of no classifier", "another module"],
)
def test_only_a_classifiers_other_name_may_be_absent(changes, missing, adapter, edit_json):
    edit_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=f"holds no {missing}, which modules_to_save names"):
        adapter_labels(adapter)


def test_lora_on_the_head_is_told_with_a_way_out(bare, tmp_path):
    adapted(bare, tmp_path, target_modules=["q_proj", "score"])
    for read_it in (adapter_labels, saved_modules):
        with pytest.raises(UserError, match="score has lora_A and lora_B, and a score head is read only as a whole; merge"):
            read_it(tmp_path)
