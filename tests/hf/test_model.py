"""A model that one looks at: what it says of itself, and what it refuses to look at."""

import jax.numpy as jnp
import numpy as np
import pytest

import sftjax
from sftjax.config import UserError


@pytest.fixture(scope="module")
def model(toy):
    return sftjax.load(toy.base, dtype=jnp.float32)


def test_it_prints_in_a_line(model, toy):
    assert repr(model) == f"Model({toy.base}: 39,824 parameters, 3 layers, {model.config.vocab} tokens)"


def test_rows_of_tokens_are_looked_at_and_nothing_else(model):
    vocab = model.config.vocab
    one = model.logits([1, 2, 3])
    np.testing.assert_allclose(model.logits(np.array([[1, 2, 3], [4, 5, 6]]))[:1], one, atol=1e-5)
    for wrong, sentence in (
        ([1, vocab], f"token {vocab}, but the model knows only {vocab}"),
        ([[1, -1]], "token -1"),
        ([[1, 2], [3]], "every row as long as the others"),
        ([1.5], "needs one text, or whole numbers"),
        ("", "none of them empty"),
        (["a", "b"], "needs one text"),
    ):
        with pytest.raises(UserError, match=sentence):
            model.logits(wrong)


@pytest.mark.parametrize("dtype, sentence", [("bf16", "did you mean bfloat16?"), ("int32", "needs one of"), (jnp.int8, "int8")])
def test_a_dtype_that_nothing_computes_in_is_refused(dtype, sentence, toy):
    with pytest.raises(UserError, match=sentence):
        sftjax.load(toy.base, dtype=dtype)
