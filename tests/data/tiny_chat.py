"""A byte-level tokenizer with ChatML, and rows for it: what the pipeline's tests run on."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sftjax.config import default
from sftjax.data.chat import prepare


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    out.add_tokens(["</s>"], special_tokens=True)
    return out


def chat(template="chatml", loss_on="answers"):
    return prepare(tokenizer(), template, loss_on=loss_on)[0]


def row(i, words=3):
    return {"instruction": f"Question {i}?", "output": f"Answer {i}" + ", and so on" * (i % words) + "."}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def config(tmp_path, rows=None, **data):
    c = default()
    c.data.cache_dir = str(tmp_path / "cache")
    c.data.max_length = 256
    c.data.workers = 1
    if rows is not None:
        c.data.train = (write(tmp_path / "train.jsonl", rows),)
    with c.data.ignore_type():
        c.data.update(data)
    return c
