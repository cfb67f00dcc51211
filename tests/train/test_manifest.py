"""The manifest knows a run by content, and says each way in which another differs."""

import json
import struct

import numpy as np
import pytest

from sftjax.config import default
from sftjax.data.pipeline import data_hash
from sftjax.train import manifest as m
from sftjax.train.run import clean


def safetensors(path, *, data: bytes, name: str = "w"):
    header = json.dumps({name: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "tokenizer.json").write_text("{}")
    safetensors(folder / "model.safetensors", data=bytes(3 * m.MIB))
    return folder


def make(base, config=None, **changes):
    known = {"data_report": {"read": 3, "kept": 3}, "data_hash": "d1", "template": "{{ messages }}", "base_dir": base}
    return m.manifest(config or default(), **(known | changes))


def reread(value):
    return json.loads(json.dumps(clean(value)[0]))


def test_same_run_differs_in_nothing_even_after_json(base):
    assert m.difference(reread(make(base)), make(base)) == []


def test_each_kind_of_difference_is_named(base):
    old = reread(make(base))
    config = default()
    config.optim.lr, config.train.epochs, config.data.train = 1e-4, 2.0, ("a.jsonl",)
    assert m.difference(old, make(base, config)) == [
        'config.data.train: [] -> ["a.jsonl"]',
        "config.optim.lr: 2e-4 -> 1e-4",
        "config.train.epochs: 1.0 -> 2.0",
    ]
    assert m.difference(old, make(base, data_hash="d2")) == ["data: contents changed"]
    assert m.difference(old, make(base, template="other")) == ["template: contents changed"]
    (base / "tokenizer.json").write_text("{ }")
    assert m.difference(old, make(base)) == ["tokenizer: contents changed"]


def test_a_run_of_an_older_version_is_known_by_its_tokens(base):
    def of(**hashes):
        report = {"sources": [hashes]}
        return make(base, data_report=report, data_hash=data_hash(report))

    old, new = of(tokens_sha256="a"), of(tokens_sha256="a", rows_sha256="b")
    assert m.difference(old, new) == m.difference(old, of(tokens_sha256="a", rows_sha256="c")) == []
    assert m.difference(old, of(tokens_sha256="b", rows_sha256="b")) == ["data: contents changed"]
    assert m.difference(new, of(tokens_sha256="a", rows_sha256="c")) == ["data: contents changed"]


@pytest.mark.parametrize("place", ["first", "last", "header", "size", "config"])
def test_changed_base_is_noticed(base, place):
    old = make(base)
    data = bytearray(3 * m.MIB)
    data[0], data[-1] = place == "first", place == "last"
    safetensors(base / "model.safetensors", data=bytes(data) + b"0" * (place == "size"), name="v" if place == "header" else "w")
    if place == "config":
        (base / "config.json").write_text('{"model_type": "llama"}')
    assert m.difference(old, make(base)) == ["base: contents changed"]


def test_a_base_that_only_moved_is_no_change(base, tmp_path):
    config = default()
    config.model.path = str(base)
    old = make(base, config)
    moved = base.rename(tmp_path / "elsewhere")
    config.model.path = str(moved)
    assert m.difference(old, make(moved, config)) == []
    (moved / "config.json").write_text("{}")
    assert m.difference(old, make(moved, config)) == [f"config.model.path: {base} -> {moved}", "base: contents changed"]


def test_another_adapter_is_a_change(base, tmp_path):
    old = make(base)
    config = default()
    config.model.adapter = str(tmp_path)
    assert m.difference(old, make(base, config, adapter_dir=tmp_path)) == [
        f"config.model.adapter: None -> {tmp_path}",
        "adapter: contents changed",
    ]


def test_watching_differently_is_no_change(base):
    old = make(base)
    config = default()
    config.train.log_every, config.train.keep, config.train.tensorboard = 1, 9, False
    config.data.workers, config.data.cache_dir = 3, "/elsewhere"
    assert m.difference(old, make(base, config)) == []
    assert set(m.leaves(clean(default())[0])) >= m.FREE


def test_a_key_from_a_newer_version_counts_as_its_default(base):
    old = make(base)
    del old["config"]["optim.clip"]
    old["config"]["optim.gone"] = 3
    assert m.difference(old, make(base)) == ["config.optim.gone: 3 -> None"]


def test_manifest_is_json_and_names_what_it_was_made_of(base):
    lengths = m.length_histogram([3, 4, 100], trained=[1, 2, 50])
    made = reread(make(base, lengths=lengths))
    assert {"jax", "flax", "optax", "orbax-checkpoint", "transformers", "python", "sftjax"} <= made["versions"].keys()
    assert "not installed" not in made["versions"].values()
    assert made["device"]["count"] >= 1 and made["device"]["kind"]
    assert all(len(made["hashes"][part]) == 64 for part in ("template", "tokenizer", "base"))
    assert made["data"] == {"read": 3, "kept": 3, "lengths": lengths}


@pytest.mark.parametrize("lengths", [[], [0], [1], [5] * 9, list(range(1, 2000, 7))])
def test_histogram_counts_every_row_once(lengths):
    made = m.length_histogram(lengths, trained=np.array(lengths) // 2)
    assert sum(made["counts"]) == sum(made["trained_counts"]) == len(lengths)
    assert len(made["edges"]) == len(made["counts"]) + 1 <= 26


@pytest.mark.parametrize(
    "value, shown",
    [
        (1e-4, "1e-4"),
        (2.5e-5, "2.5e-5"),
        (1e-12, "1e-12"),
        (0.1, "0.1"),
        (0.0, "0.0"),
        (None, "None"),
        ("a", "a"),
        ([8, 1], "[8, 1]"),
    ],
)
def test_values_are_shown_as_one_types_them(value, shown):
    assert m.show(value) == shown
