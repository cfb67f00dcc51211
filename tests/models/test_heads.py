"""Score heads: what transformers' classifiers say, padded and packed; the last token by position, whatever token it is."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sftjax.config import UserError
from sftjax.data.batch import Batch
from sftjax.hf.load import load_config, load_params
from sftjax.hf.save import save
from sftjax.models.decoder import Decoder, forward
from sftjax.models.families import FAMILIES, config_from_hf, config_to_hf
from sftjax.models.heads import last, scored, segment_scores, token_scores

LABELS = ("no", "perhaps", "yes")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
ROWS = [[5, 9, 33, 2, 60, 7], [1, 2], [11, 12, 13, 14, 15, 16, 17, 18, 19]]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """`make(family, labels=3) -> (directory, what transformers scores ROWS with)`."""
    import torch
    import transformers

    def make(family, labels=LABELS, **changes):
        torch.manual_seed(0)
        named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        config = transformers.CONFIG_MAPPING[family](**SHAPE | named | changes)
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
        directory = tmp_path_factory.mktemp(family)
        model.save_pretrained(directory)
        width = max(map(len, ROWS))
        with torch.no_grad():
            said = model(input_ids=torch.tensor([row + [0] * (width - len(row)) for row in ROWS])).logits.numpy()
        return directory, said

    return make


def packed(rows, T=20):
    """All rows in one, with padding after them whose tokens are those of a text."""
    tokens, segments, positions = (np.full((1, T), 7, np.int32), *np.zeros((2, 1, T), np.int32))
    at = 0
    for i, row in enumerate(rows, 1):
        here = slice(at, at + len(row))
        tokens[0, here], segments[0, here], positions[0, here] = row, i, np.arange(len(row))
        at += len(row)
    return Batch(*map(jnp.asarray, (tokens, np.ones_like(tokens, np.float32), segments, positions)))


def padded(rows, T=12):
    tokens, segments = np.zeros((2, len(rows), T), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    return Batch(*map(jnp.asarray, (tokens, np.ones_like(tokens, np.float32), segments, positions)))


SCORED = [name for name, family in FAMILIES.items() if len(family.classes) == 2]


@pytest.mark.parametrize("family", SCORED)
def test_scores_are_those_of_transformers_padded_and_packed(family, classifier):
    directory, said = classifier(family, tie_word_embeddings=family in ("qwen2", "gemma2"))
    config = load_config(directory)
    assert config.labels == LABELS and not config.tied
    params = load_params(directory, config)
    run = forward(Decoder(config))
    for batch, count in ((packed(ROWS), 3), (padded(ROWS), 1)):
        scores, real = segment_scores(run(params, batch), batch.segments, count)
        assert real.all()
        np.testing.assert_allclose(scores.reshape(3, 3), said, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_comes_out_as_it_went_in(classifier, tmp_path):
    directory, _ = classifier("qwen3")
    config = load_config(directory)
    save(load_params(directory, config), config, source=directory, out=tmp_path / "out", pad_id=5)
    again = load_config(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "out", again), load_params(directory, config))
    assert '"pad_token_id": 5' in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_head_scores_nothing_and_leaves_the_body_alone(tied):
    config = tiny.config(tied=tied)
    params = tiny.params(config)
    new, as_scored = scored(params, config, LABELS)
    batch = tiny.batch([[4, 7], [9]], 12)
    output = forward(Decoder(as_scored))(new, batch)
    np.testing.assert_array_equal(output.hidden, forward(Decoder(config))(params, batch).hidden)
    assert token_scores(output).shape == (2, 12, 3) and not token_scores(output).any()
    assert "head" not in new and new["embed"] is params["embed"]


def test_a_segment_scores_as_it_does_alone_and_an_absent_one_nothing():
    config = replace(tiny.config(), labels=("reward",))
    params = tiny.params(config)
    run = jax.jit(lambda batch: segment_scores(forward(Decoder(config))(params, batch), batch.segments, 4))
    batch = tiny.batch([[5, 3, 4], [-2, 6], []], 16)
    scores, real = run(batch)
    assert real.tolist() == [[True, True, True, False], [False, True, False, False], [False] * 4]
    alone = tiny.unpacked(batch)
    np.testing.assert_allclose(scores[real], run(alone)[0][:, 0], atol=1e-5)
    assert not scores[~real].any()


def test_the_last_token_is_the_last_of_its_segment():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 3, 3, 5, 5, 5], [0, 0, 0, 0, 0, 0]])
    assert last(segments).astype(int).tolist() == [[0, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1], [0] * 6]


def raw(**changes):
    return {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]} | SHAPE | changes


def test_labels_are_named_as_config_json_names_them():
    assert config_from_hf(raw(id2label={"1": "b", "0": "a"})).labels == ("a", "b")
    assert config_from_hf(raw()).labels == ("LABEL_0", "LABEL_1")  # as transformers has it
    assert config_from_hf(raw(num_labels=1)).labels == ("LABEL_0",)
    with pytest.raises(UserError, match="id2label"):
        config_from_hf(raw(id2label={"0": "a", "2": "b"}))


def test_config_to_hf_says_what_transformers_reads():
    import transformers

    source = raw(architectures=["LlamaForCausalLM"])
    config = replace(config_from_hf(source), labels=LABELS, tied=False)
    theirs = transformers.LlamaConfig(**config_to_hf(config, source))
    assert theirs.architectures == ["LlamaForSequenceClassification"] and theirs.num_labels == 3
    assert theirs.id2label == dict(enumerate(LABELS)) and theirs.label2id["yes"] == 2
