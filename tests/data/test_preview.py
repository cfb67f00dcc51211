"""A preview shows every token, which of them are trained, and what became of the rows."""

import json
import re
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from rich.console import Console
from tiny_chat import chat, config, row, tokenizer, write

from sftjax.config import UserError
from sftjax.data.preview import histogram, preview, row_text

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")


def shown(example_config, model, rows=2, **console):
    example_config.model.path = str(model)
    out = Console(record=True, width=200, file=open("/dev/null", "w"), **console)  # noqa: SIM115
    preview(example_config, out, rows)
    return out.export_text(styles=bool(console))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer().save_pretrained(folder)
    return folder


def test_trained_tokens_are_in_brackets_without_colour(tmp_path, model):
    text = shown(config(tmp_path, [row(i) for i in range(30)], split=(1, 0, 0)), model)
    flat = text.replace("|", "").replace("⏎\n", "⏎")
    assert "train.jsonl:1" in text and "train.jsonl:2" in text and "train.jsonl:3" not in text
    assert "<im_start>user⏎Question 0?<im_end>⏎<im_start>assistant⏎[[Answer 0.<im_end>]]⏎" in flat
    assert re.search(r"train +30", text) and "an epoch:" in text


def test_trained_tokens_are_green_in_colour(tmp_path, model):
    text = shown(config(tmp_path, [row(i) for i in range(30)]), model, rows=1, force_terminal=True, color_system="standard")
    assert "\x1b[32mA\x1b[0m" in text and "[[" not in text


def test_what_was_dropped_is_counted(tmp_path, model):
    rows = [row(i) for i in range(9)] + [{"instruction": "q", "output": "x" * 999}]
    assert re.search(r"dropped: overlong +1 *\n", shown(config(tmp_path, rows), model))


def test_a_bad_row_stops_a_preview_as_it_stops_training(tmp_path, model):
    with pytest.raises(UserError, match="1 row cannot be used"):
        shown(config(tmp_path, [row(0), {"instruction": "q", "output": ""}]), model)
    with pytest.raises(UserError, match=r"model\.path is empty"):
        shown(config(tmp_path, [row(0)]), "")


def test_rows_that_the_model_is_too_short_for_are_refused_as_training_refuses_them(tmp_path, model):
    shutil.copytree(model, other := tmp_path / "other")
    given = config(tmp_path, [row(i) for i in range(9)], max_length=200)
    for positions, refused in ((199, True), (200, False)):
        raw = {"model_type": "llama", "max_position_embeddings": positions} | dict.fromkeys(SIZES, 8)
        (other / "config.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match="max_length=200 is more than the 199 positions of") if refused else nullcontext():
            shown(given, other)
    (other / "config.json").write_text('{"model_type": "gpt2", "n_positions": 8}')  # whose rows can be seen, if not trained on
    assert "train.jsonl:1" in shown(given, other)


@pytest.mark.parametrize("sizes, first", [((9, 9), [0, 9, 1, 10]), ((1, 9, 1), [0, 1, 10, 2]), ((2,), [0, 1])])
def test_every_source_is_shown_before_any_is_shown_again(tmp_path, model, sizes, first):
    numbers = iter(range(99))
    paths = [write(tmp_path / f"{name}.jsonl", [row(next(numbers)) for _ in range(n)]) for name, n in zip("abc", sizes)]
    text = shown(config(tmp_path, train=paths, split=(1, 0, 0)), model, rows=4)
    assert [int(n) for n in re.findall(r"Question (\d+)", text.replace("|", ""))] == first


def test_characters_of_several_tokens_are_whole_and_weights_are_told():
    ids, _ = chat().tokenise("aé中😀b")
    weights = np.array([0] + [1] * (len(ids) - 2) + [0.5], np.float32)
    assert row_text(tokenizer(), np.array(ids), weights, plain=True).plain == "a[[é|中|😀]][[×0.5 b]]"


def test_long_rows_lose_their_middle_only():
    ids = np.array(chat().tokenise("a" * 500 + "b" * 300 + "c" * 200)[0])
    text = row_text(tokenizer(), ids, np.zeros(1000), plain=True).plain
    assert "300 tokens not shown" in text and text.count("a") == 500 and text.count("c") == 200


def test_the_histogram_counts_every_row():
    lengths = np.random.default_rng(0).integers(3, 1700, 500)
    lines = histogram(lengths).plain.splitlines()[1:]
    assert sum(int(line.rsplit(" ", 1)[1].replace(",", "")) for line in lines) == 500
    assert len(lines) <= 8 and max(line.count("█") for line in lines) == 40
