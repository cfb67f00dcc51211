"""The text that comes token by token is that of all tokens decoded at once, whatever the tokenizer makes of them."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sftjax.data.chat import load_tokenizer
from sftjax.generate.text import Writer, splits

METASPACE = ["a", "▁a", "▁", "▁▁", "x▁", ".", "n't", "##b", "é", "\ufffd", *(f"<0x{b}>" for b in ("E2", "82", "AC", "20", "FF"))]
BYTES = ["a", "Ġ", "â", "Ĥ", "¬", "Ġâ", "Ĥ¬", "¬Ġ", "ð", "ï", "¿½", "ĠÃ", "©", "é€"]
SPACES = decoders.Replace("▁", " ")
FALLBACK = [SPACES, decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "bytes": decoders.ByteLevel(),
    "Gemma's": decoders.Sequence(FALLBACK),
    "Llama 2's": decoders.Sequence([*FALLBACK, decoders.Strip(" ", 1, 0)]),
    "Metaspace": decoders.Metaspace(),
    "of spaces cleaned": decoders.WordPiece(cleanup=True),
    "none": None,
    "over tokens' edges": decoders.Sequence([SPACES, decoders.Fuse(), decoders.Replace("a.", "A")]),
    "by repetition": decoders.CTC(".", "▁"),
}
REAL = ["tokenizers/mistral/mistral_v3", "tokenizers/minimind_chatml", "hf_models/stories260K"]


def made_of(pieces, decoder):
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    if decoder:
        backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(["<s>"], special_tokens=True)
    tokenizer.add_tokens(["<think>", "€ x"])
    return tokenizer


def differs(tokenizer, rng, times):
    """Whether tokens at random ever have another text than all at once, or take back what was shown."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    rare = [i for i, token in enumerate(tokens) if token and (token.startswith("<") or len(token) == 1)]
    for _ in range(times):
        drawn = [rng.choice([rng.randrange(len(tokenizer)), rng.choice(rare)]) for _ in range(30)]
        before, rest = drawn[: rng.randrange(6)], drawn[6:]
        stops = rng.sample(["END", "é", "a ", "  ", "a  a", "aéa"], 3)
        quick, slow = Writer(tokenizer, stops, before), Writer(tokenizer, stops, before)
        slow.splits, shown = False, []
        while rest and not slow.stopped:
            new = [rest.pop() for _ in range(min(len(rest), rng.choice([1, 1, 2, 5])))]
            quick.add(new)
            slow.add(new)
            if (quick.text, quick.shown, quick.ids, quick.stopped) != (slow.text, slow.shown, slow.ids, slow.stopped):
                return True
            shown.append(quick.shown)
        if splits(tokenizer) and not all(quick.text.startswith(text) for text in shown):
            return True
    return False


@pytest.mark.parametrize("kind", DECODERS)
def test_as_it_comes_is_as_at_once(kind):
    tokenizer = made_of(BYTES if kind == "bytes" else METASPACE, DECODERS[kind])
    assert splits(tokenizer) == (kind not in ("over tokens' edges", "by repetition"))
    assert not differs(tokenizer, random.Random(0), 150)


@pytest.mark.parametrize("name", REAL)
def test_as_it_comes_is_as_at_once_of_real_tokenizers(shared, name):
    tokenizer = load_tokenizer(shared / "data" / name)
    assert splits(tokenizer) and not differs(tokenizer, random.Random(1), 100)


@pytest.mark.parametrize("kind", ["bytes", "Llama 2's"])
def test_a_token_costs_the_same_wherever_it_comes(kind, monkeypatch):
    tokenizer = made_of(BYTES if kind == "bytes" else METASPACE, DECODERS[kind])
    pieces = ["a", "Ġâ", "Ĥ¬"] if kind == "bytes" else ["▁a", "▁", "é", "<0xE2>", "<0x82>", "<0xAC>"]
    ids = tokenizer.convert_tokens_to_ids(pieces) * 100
    decode, read = Writer._decode, []
    monkeypatch.setattr(Writer, "_decode", lambda self, ids: (read.append(len(ids)), decode(self, ids))[1])
    writer = Writer(tokenizer, ["END"])
    for i in ids:
        writer.add([i])
    assert max(read) < 9 and writer.text == tokenizer.decode(ids)


def test_a_line_before_a_character_of_bytes_is_shown_once():
    tokenizer = made_of([*METASPACE, "<0x0A>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"], DECODERS["Gemma's"])
    writer, shown = Writer(tokenizer), []
    for piece in ("a", "<0x0A>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "."):
        writer.add([tokenizer.convert_tokens_to_ids(piece)])
        shown.append(writer.shown)
    assert shown == [*["a"] * 6, "a\n\U0001f600."] and writer.text == shown[-1]


def test_what_is_stripped_at_the_end_is_read_whole():
    assert not splits(made_of(METASPACE, decoders.Sequence([*FALLBACK, decoders.Strip(" ", 0, 1)])))


def test_of_stop_strings_the_first_to_end_stops_however_many_tokens_come_at_a_time():
    tokenizer = made_of(METASPACE, DECODERS["Llama 2's"])
    ids = tokenizer.convert_tokens_to_ids(["x▁", "a", "é", "."])
    at_once, one_by_one = (Writer(tokenizer, ["aé.", "é"]) for _ in range(2))
    at_once.add(ids)
    for i in ids[:3]:
        one_by_one.add([i])
    assert at_once.stopped and (at_once.text, at_once.ids) == (one_by_one.text, one_by_one.ids) == ("x a", ids[:2])
