"""What is scored is what was meant: a shape that would be read as something else is refused in a sentence."""

import dataclasses

import numpy as np
import pytest

import sftjax
from sftjax.config import UserError
from sftjax.data.example import Message
from sftjax.models.decoder import Decoder
from sftjax.models.heads import scored


@pytest.fixture(scope="module")
def base(toy):
    return sftjax.load(toy.base)


def headed(model, *labels):
    params, config = scored(model.params, model.config, labels)
    return dataclasses.replace(model, module=Decoder(config), params=params, config=config)


ASKED, ANSWERED = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


def test_a_conversation_is_read_as_training_reads_it(base):
    model = headed(base, "reward")
    model.params["score"]["kernel"] += np.linspace(-1, 1, model.config.width, dtype=np.float32)[:, None]
    other = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    found = sftjax.rewards(model, [[ASKED, ANSWERED], (Message("user", "2 + 2?"), Message("assistant", "4")), other])
    assert found[0] == found[1] == found[2] != 0


@pytest.mark.parametrize(
    "conversations, sentence",
    [
        ([[]], "conversations[0]: is empty"),
        ([[ASKED, {"role": "assistant"}]], "conversations[0][1].content: is missing"),
        ([[ASKED, ANSWERED], [{"role": "judge", "content": "a"}]], "conversations[1][0].role: 'judge' is not a role known here"),
        ([ASKED, ANSWERED], "conversations[0]: is an object, must be a list of messages"),
        (["text"], "conversations[0]: is the text 'text', must be a list of messages"),
        ([[ASKED]], "conversations[0]: ends with no answer"),
        ([["text"]], "conversations[0][0]: is the text 'text'"),
    ],
)
def test_what_is_no_conversation_is_refused(conversations, sentence, base):
    with pytest.raises(UserError) as refused:
        sftjax.rewards(headed(base, "reward"), conversations)
    assert str(refused.value).startswith(f"rewards: {sentence}") and "--config" not in str(refused.value)


@pytest.mark.parametrize(
    "texts, sentence",
    [
        ("one text", "needs several texts, not one; put it in a list"),
        (["a", None], "text 1 is null, must be text"),
        ([1], "text 0 is the number 1, must be text"),
    ],
)
def test_what_is_no_text_is_refused(texts, sentence, base):
    with pytest.raises(UserError, match=sentence):
        sftjax.classify(headed(base, "a", "b"), texts)
