"""Laws of the pipeline: the sum adds up, duplicates stay on one side, the cache knows content, a batch is its step number."""

import os
import pickle
import subprocess
import tracemalloc
from collections import Counter
from datetime import datetime
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_chat
from tiny_chat import chat, config, row, write

from sftjax.config import UserError
from sftjax.data import cache, encode
from sftjax.data.chat import Chat
from sftjax.data.example import Example, Message
from sftjax.data.formats import Rejected
from sftjax.data.pipeline import build, data_hash
from sftjax.data.rows import split
from sftjax.data.stream import Stream, eval_batches, prefetch


def run(c, said=None, **kwargs):
    return build(
        c,
        kwargs.pop("chat", None) or chat(loss_on=c.data.loss_on),
        say=said.append if said is not None else (lambda _: None),
    )


def texts(rows):
    return [tuple(rows.row(i)[0].tolist()) for i in range(len(rows))]


def documents(batch):
    """The token ids of every segment of a batch."""
    out = []
    for tokens, segments in zip(batch.tokens, batch.segments):
        out += [tuple(tokens[segments == s].tolist()) for s in range(1, segments.max(initial=0) + 1)]
    return out


# -- the day


def test_rows_are_of_no_particular_day(tmp_path, monkeypatch):
    dated = "{{ strftime_now('%d %b %Y') }}\n" + chat().template
    hashes, keys, shown = set(), set(), set()
    for day in (1, 2):
        on(monkeypatch, day)
        c = config(tmp_path, [row(i) for i in range(9)], cache_dir=str(tmp_path / str(day)))
        hashes.add(data_hash(run(c, chat=Chat(chat().tokenizer, template=dated)).report))
        keys.add(os.listdir(tmp_path / str(day))[0])
        shown.add(Chat(chat().tokenizer, template=dated, day=None).render([Message("user", "a")]).partition("<|")[0])
    assert len(hashes) == len(keys) == 1 and shown == {"01 Feb 2030", "02 Feb 2030"}
    run(c, chat=Chat(chat().tokenizer, template=dated, day=None))  # nor is one day's cache another's
    assert len(os.listdir(tmp_path / "2")) == 2


def on(monkeypatch, day):
    """Makes it a day in 2030 for templates."""
    clock = SimpleNamespace(now=lambda: datetime(2030, 2, day))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)


# -- what becomes of rows


def test_the_sum_adds_up_and_every_dropped_row_is_named(tmp_path):
    rows = [row(i) for i in range(20)]
    rows[3] = {"instruction": "No answer", "output": None}
    rows[5] = {"instruction": "Long", "output": "x" * 500}
    rows[7] = {"instruction": "", "output": "Answer"}
    c = config(tmp_path, rows, on_bad_row="skip")
    said = []
    got = run(c, said)
    report = got.report
    assert report["read"] == 20 and report["kept"] == 17
    assert report["dropped"] == {"bad_row": 2, "overlong": 1}
    assert report["kept"] == sum(report[s]["rows"] for s in ("train", "eval", "test"))
    assert sorted(r.line for r in got.rejected) == [4, 6, 8]
    assert all(r.source.endswith("train.jsonl") and r.reason for r in got.rejected)
    assert any("train.jsonl:6" in line and "data.max_length=256" in line for line in said)


def test_bad_rows_are_an_error_with_the_first_ten_and_the_total(tmp_path):
    c = config(tmp_path, [row(0)] + [{"instruction": "q", "output": 3} for _ in range(12)])
    with pytest.raises(UserError, match="12 rows") as e:
        run(c)
    assert str(e.value).count("train.jsonl:") == 10 and "train.jsonl:2: output" in str(e.value)


def test_overlong_rows_can_be_an_error_or_be_cut(tmp_path):
    rows = [row(i) for i in range(8)] + [{"instruction": "q", "output": "y" * 400}, {"instruction": "z" * 400, "output": "y"}]
    with pytest.raises(UserError, match=r"2 rows are longer than data.max_length=256.*train.jsonl:9"):
        run(config(tmp_path, rows, on_overlong="error", split=(1, 0, 0)))
    said = []
    got = run(config(tmp_path, rows, on_overlong="truncate", split=(1, 0, 0)), said)
    assert got.report["dropped"] == {"truncated_to_nothing": 1} and got.report["truncated"] == 1
    assert got.train.lengths.max() == 256 and got.train.row(int(got.train.lengths.argmax()))[0].shape == (256,)
    at = int(got.train.lengths.argmax())
    assert got.train.trained[at] == np.count_nonzero(got.train.row(at)[1])
    assert any("not trained" in line and "train.jsonl:9" in line for line in said)


def test_a_row_that_trains_nothing_is_dropped_and_said(tmp_path):
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]}
    talks = [{"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "a"}]} for i in range(5)]
    said = []
    report = run(config(tmp_path, [*talks, silent]), said).report
    assert report["dropped"] == {"trains_nothing": 1}
    assert any("no token" in line and "train.jsonl:6" in line for line in said)


def test_an_untrained_terminator_is_said(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    said = []
    report = run(config(tmp_path, [row(i) for i in range(5)]), said, chat=chat(template_file(tmp_path, template))).report
    assert report["unterminated"] == 5
    assert any("learn to stop" in line and "train.jsonl:1" in line for line in said)


def template_file(tmp_path, text):
    path = tmp_path / "t.jinja"
    path.write_text(text)
    return str(path)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no rows are left to train on: 3 rows read, 0 kept, dropped: 3 overlong") as e:
        run(config(tmp_path, [row(i) for i in range(3)], max_length=8))
    assert "data.max_length=8" in str(e.value) and "the longest has 63 tokens. data.on_overlong=truncate" in str(e.value)
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": 0}]}
    with pytest.raises(UserError, match=r"on: 1 row read, 0 kept, dropped: 1 trains nothing$"):
        run(config(tmp_path, [silent]))
    with pytest.raises(UserError, match=r"data\.train names no data"):
        run(config(tmp_path))


@pytest.mark.parametrize("where", ["train", "eval"])
@pytest.mark.parametrize("format", ["auto", "alpaca"])
def test_a_source_of_its_own_format_does_not_escape_classification(tmp_path, where, format):
    c = config(tmp_path, [{"text": f"{i}", "label": "a"} for i in range(9)], format="label")
    c.task = "classify"
    other = write(tmp_path / "other.jsonl", [row(i) for i in range(9)])
    setattr(c.data, where, {"path": other, "format": format})
    with pytest.raises(UserError, match=rf"other.jsonl: format '{format}': --config.task=classify learns rows of text and label"):
        run(c)
    setattr(c.data, where, {"path": str(tmp_path / "train.jsonl"), "format": "label"})
    assert run(c).report["kept"] == (9 if where == "train" else 18)


# -- splits


def test_duplicates_never_straddle_splits(tmp_path):
    rows = [row(i % 60) for i in range(200)]
    got = run(config(tmp_path, rows))
    sides = [set(texts(s)) for s in (got.train, got.eval, got.test)]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert [len(s) for s in sides] == [48, 6, 6]
    assert len(got.train) + len(got.eval) + len(got.test) == 200


@pytest.mark.parametrize("n, parts", [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (10, (8, 1, 1)), (1000, (800, 100, 100))])
def test_shares_are_exact_and_train_comes_first(n, parts):
    part = split(np.arange(n, dtype=np.uint64) * 977, (8, 1, 1), seed=0)
    assert tuple(np.bincount(part, minlength=3)) == parts


def test_splits_depend_on_the_seed_and_on_nothing_else(tmp_path):
    rows = [row(i) for i in range(50)]
    c = config(tmp_path, rows)
    one = set(texts(run(c).eval))
    c.data.train = (write(tmp_path / "shuffled.jsonl", rows[::-1]),)
    assert set(texts(run(c).eval)) == one
    c.seed = 1
    assert set(texts(run(c).eval)) != one


def test_held_out_files_are_used_whole_and_leaks_are_told(tmp_path):
    c = config(tmp_path, [row(i) for i in range(20)])
    c.data.eval = write(tmp_path / "eval.jsonl", [row(i) for i in range(18, 25)])
    said = []
    got = run(c, said)
    assert (len(got.train), len(got.eval), len(got.test)) == (20, 7, 0)
    assert [(source["held_out"], source["on_hub"]) for source in got.report["sources"]] == [(False, False), (True, False)]
    assert got.report["eval_rows_in_train"] == 2 and any("data.train also holds 2 rows of data.eval" in line for line in said)


def test_rows_know_where_they_come_from(tmp_path):
    got = run(config(tmp_path, [row(i) for i in range(30)]))
    for i in range(len(got.eval)):
        example = got.eval.example(i)
        assert got.eval.where(i) == f"{example.source}:{example.line}"
        assert example.messages[0].content == f"Question {example.line - 1}?"
        assert np.array_equal(chat().encode(example).ids, got.eval.row(i)[0])


# -- the cache


def test_a_second_run_reads_the_cache_and_gets_the_same(tmp_path):
    c, said = config(tmp_path, [row(i) for i in range(30)]), []
    first, second = run(c, said), run(c, said)
    opened = [line for line in said if " tokens, " in line]
    assert ["tokenised in" in line for line in opened] == [True, False] and opened[1].endswith("from the cache")
    assert first.report == second.report
    for a, b in ((first.train, second.train), (first.eval, second.eval)):
        assert texts(a) == texts(b)
        assert all(np.array_equal(a.row(i)[1], b.row(i)[1]) and a.example(i) == b.example(i) for i in range(len(a)))


def test_the_cache_goes_by_content_not_by_name(tmp_path):
    c = config(tmp_path, [row(i) for i in range(10)])
    run(c)
    entries = lambda: sum(1 for _ in (tmp_path / "cache").iterdir())  # noqa: E731
    (tmp_path / "train.jsonl").rename(tmp_path / "renamed.jsonl")
    c.data.train = (str(tmp_path / "renamed.jsonl"),)
    got = run(c)
    assert entries() == 1 and got.train.where(0).startswith(c.data.train[0])
    c.data.max_length, c.data.split, c.seed = 128, (1, 1, 0), 5
    run(c)
    assert entries() == 1  # applied after the cache
    run(c, chat=chat("llama3"))
    assert entries() == 2
    run(c, chat=chat(loss_on="all"))
    assert entries() == 3
    c.data.system = "Be brief."
    run(c)
    assert entries() == 4
    write(tmp_path / "renamed.jsonl", [row(i) for i in range(11)])
    assert run(c).report["read"] == 11


def test_the_same_bytes_in_another_kind_of_file_are_other_rows(tmp_path):
    c = config(tmp_path, [{"text": f"{i}"} for i in range(9)], split=(1, 0, 0))
    c.task = "pretrain"
    first, again = tmp_path / "train.jsonl", tmp_path / "train.txt"
    again.write_bytes(first.read_bytes())
    said = []
    for path in (first, again):
        c.data.train = (str(path),)
        said.append(run(c).train.example(3).text)
    assert said == ["3", '{"text": "3"}']


def test_an_entry_is_whole_or_not_there(tmp_path):
    def rows():
        yield Rejected("f", 1, "", "bad")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), cache.entry(tmp_path, "key") as place:
        cache.write(place, rows(), ["f"])
    assert not list(tmp_path.iterdir())


def test_an_entry_is_for_all_whom_the_umask_lets_in(tmp_path):
    before = os.umask(0o027)
    try:
        with cache.entry(tmp_path, "key") as place:
            (place / "file").touch()
    finally:
        os.umask(before)
    assert [oct(p.stat().st_mode & 0o777) for p in (tmp_path / "key", tmp_path / "key" / "file")] == ["0o750", "0o640"]


def test_an_entry_outlives_a_power_cut(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    with cache.entry(tmp_path, "key") as place:
        (place / "file").touch()
        held = [path.stat().st_ino for path in (place / "file", place, tmp_path)]
    assert synced == held


def test_a_store_holds_what_was_written_and_writing_it_little(tmp_path):
    n, ids = 5000, np.arange(5)
    rows = (
        cache.Row(f"{i % 3}", 2**40 + i, 2**64 - 1 - i, i, i % 2 == 0, i % 5 == 0, ids, ids % 2, [(2, 1), (3, 2)], b"{}")
        for i in range(n)
    )
    tracemalloc.start()
    cache.write(tmp_path, rows, ["0", "1", "2"])
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 140 * n  # of a row 38, of its two parts 12 each, of its offsets 24, and what growing takes
    store, i = cache.Store(tmp_path, ["a", "b", "c"]), np.arange(n)
    assert len(store) == n and store.where(4000) == f"b:{2**40 + 4000}"
    facts = {"source": i % 3, "line": 2**40 + i, "key": 2**64 - 1 - i.astype(np.uint64), "prompt": i}
    facts |= {"trained": i * 0 + 2, "terminated": i % 2 == 0, "tied": i % 5 == 0}
    for name in cache.ROW.names:
        np.testing.assert_array_equal(store.rows[name], facts[name])
    assert all(store.part(k).tolist() == [(2, 1, 1), (3, 2, 1)] for k in (0, n - 1))
    assert (store.offsets == np.arange(n + 1) * 5).all() and (store.example_offsets == np.arange(n + 1) * 2).all()


def test_the_hash_of_tokens_is_of_what_rows_encode_to(tmp_path):
    c = config(tmp_path, [row(i) for i in range(10)])
    hashes = lambda **kw: [s["tokens_sha256"] for s in run(c, **kw).report["sources"]]  # noqa: E731
    first = hashes()
    c.data.cache_dir = str(tmp_path / "elsewhere")
    assert hashes() == first  # tokenised again
    assert len({*first, *hashes(chat=chat("llama3")), *hashes(chat=chat(loss_on="all"))}) == 3


def test_a_cache_that_cannot_be_written_is_told_with_a_way_out(tmp_path):
    c = config(tmp_path, [row(0)])
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written.*--config\.data\.cache_dir"):
        run(c)


@pytest.mark.parametrize(
    "example",
    [
        Example("f", 3, messages=(Message("user", "é\ud7ff\n"), Message("assistant", None, 0.5, {"tool_calls": [{"id": "1"}]}))),
        Example("f", 3, messages=(Message("user", "q"), Message("assistant", "a")), tools=({"type": "function"},), label="a"),
        Example("f", 3, completion=("p", "c")),
        Example("f", 3, text="plain"),
    ],
)
def test_an_example_comes_back_from_the_cache_as_it_was(example):
    assert cache.loads(cache.dumps(example), "f", 3) == example


def test_a_huge_conversation_is_refused_and_a_huge_document_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "LIMIT", 2000)
    monkeypatch.setattr(encode, "PART", 100)
    with pytest.raises(UserError, match=r"train.jsonl:2: has 3,001 characters"):
        run(config(tmp_path, [row(0), {"instruction": "q", "output": "x" * 3000}]))
    text = "One line of it.\n" * 100 + "and words without a break " * 50 + "x" * 500
    whole, (parts,) = chat().encode(Example("f", 1, text=text)), encode.encode_one(chat(), Example("f", 1, text=text))
    assert np.array_equal(whole.ids, parts.ids) and np.array_equal(whole.weights, parts.weights)


def test_workers_give_what_one_process_gives(tmp_path):
    rows = [row(i) for i in range(600)]
    rows[400] = {"instruction": "", "output": "x"}
    c, said = config(tmp_path, rows, on_bad_row="skip"), []
    alone = run(c)
    c.data.cache_dir, c.data.workers = str(tmp_path / "other"), 2
    many = run(c, said)
    assert any("2 processes" in line for line in said)
    assert texts(alone.train) == texts(many.train) and alone.report == many.report


@pytest.mark.parametrize("last", [b"", pickle.dumps([1] * 1000)[:-9]])
def test_a_worker_that_ends_is_told_and_the_pool_leaves_nothing_open(monkeypatch, last):
    program = f"import os, sys; sys.stdin.buffer.read(1); os.write(1, {last!r}); sys.exit('out of it')"
    start = subprocess.Popen
    monkeypatch.setattr(encode.subprocess, "Popen", lambda args, **kw: start([args[0], "-c", program], **kw))
    with (
        pytest.raises(UserError, match=r"ended with 1; --config.data.workers=1 does without: out of it"),
        encode.Pool(1, None, "answers") as pool,
    ):
        next(pool.map(iter([[Example("f", 1, text="a")]])))
    (worker,) = pool.workers
    assert worker.log.closed and worker.process.stdin.closed and worker.process.stdout.closed


# -- the stream


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    c = config(tmp_path_factory.mktemp("many"), [row(i, words=9) for i in range(150)], split=(1, 0, 0))
    return c, run(c).train


def test_an_epoch_holds_every_row_once(many):
    c, rows = many
    stream = Stream(rows, c)
    seen = Counter(chain.from_iterable(documents(stream.batch(s)) for s in range(stream.steps_total)))
    assert seen == Counter(texts(rows))


@pytest.mark.parametrize("packing", [True, False])
def test_several_epochs_run_on_without_a_seam(many, packing):
    c, rows = many
    c = c.copy_and_resolve_references()
    c.train.epochs, c.train.batch_size, c.data.packing = 2.0, 7, packing
    stream = Stream(rows, c)
    batches = [stream.batch(s) for s in range(stream.steps_total)]
    assert Counter(chain.from_iterable(map(documents, batches))) == Counter(texts(rows) * 2)
    assert all((b.segments[:, 0] == 1).all() for b in batches[:-1])  # only the last batch may have empty rows
    assert len({b.tokens.shape for b in batches}) == 1
    assert stream.steps_total == -(-2 * stream.bins // 7)
    assert stream.epoch(stream.steps_total) >= 2


def test_few_steps_of_many_examples_are_told(many):
    c, rows = many
    c = c.copy_and_resolve_references()
    c.train.batch_size = 8
    stream = Stream(rows, c)
    assert f"only {stream.steps_total} steps: {150 / stream.bins:.0f} examples share a row" in stream.few
    for key, value in {"train.steps": 5, "train.epochs": 200.0, "data.packing": False}.items():
        other = c.copy_and_resolve_references()
        group, name = key.split(".")
        other[group][name] = value
        assert Stream(rows, other).few is None


def test_a_batch_is_a_function_of_its_step(many):
    c, rows = many
    c = c.copy_and_resolve_references()
    c.train.steps = 60  # many epochs: plans are dropped and made again
    forward, backward = Stream(rows, c), Stream(rows, c)
    there = [forward.batch(s) for s in range(60)]
    back = [backward.batch(s) for s in reversed(range(60))][::-1]
    assert all(np.array_equal(x, y) for a, b in zip(there, back) for x, y in zip(a, b))
    assert not np.array_equal(there[0].tokens, there[30].tokens)
    c.seed = 9
    assert not np.array_equal(Stream(rows, c).batch(0).tokens, there[0].tokens)
    assert [s for s, _ in prefetch(forward.batch, 20, 40)] == list(range(20, 40))
    assert all(np.array_equal(b.tokens, there[s].tokens) for s, b in prefetch(forward.batch, 3, 9))


def test_prefetch_hands_on_an_error_and_stops_with_its_reader(many):
    c, rows = many
    stream = Stream(rows, c)
    one = prefetch(stream.batch, 0, 10**9)
    next(one)
    one.close()
    stream.batch = lambda step: 1 // 0
    with pytest.raises(ZeroDivisionError):
        next(prefetch(stream.batch, 0, 1))


def test_weights_multiply_and_take_turns(tmp_path):
    a, b = ([row(i) for i in range(s, s + 20)] for s in (0, 100))
    c = config(tmp_path, split=(1, 0, 0))
    c.data.train = (
        {"path": write(tmp_path / "a.jsonl", a), "weight": 2},
        {"path": write(tmp_path / "b.jsonl", b), "weight": 0.5},
    )
    c.train.epochs = 2.0
    rows = run(c).train
    first, second = rows.chosen(0, 0), rows.chosen(0, 1)
    assert Counter(Counter(first.tolist()).values()) == {2: 20, 1: 10}
    assert set(first) | set(second) == set(range(40))  # the other half the second time
    stream = Stream(rows, c)
    seen = Counter(chain.from_iterable(documents(stream.batch(s)) for s in range(stream.steps_total)))
    assert sorted(seen.values()) == [1] * 20 + [4] * 20


def test_the_weights_of_sources_do_not_touch_evaluation(tmp_path):
    c = config(tmp_path, split=(1, 1, 0))
    c.data.train = ({"path": write(tmp_path / "a.jsonl", [row(i) for i in range(40)]), "weight": 0.5},)
    rows = run(c).eval
    assert Counter(chain.from_iterable(map(documents, eval_batches(rows, 4, 256)))) == Counter(texts(rows))


def test_fractional_epochs_and_too_few(many):
    c, rows = many
    c = c.copy_and_resolve_references()
    c.train.epochs, c.train.batch_size = 0.5, 1
    stream = Stream(rows, c)
    assert stream.steps_total == -(-stream.bins // 2)
    c.train.epochs = 0.0
    with pytest.raises(UserError, match="makes no step"):
        Stream(rows, c)


def test_hosts_share_the_batch(many):
    c, rows = many
    whole, mine = Stream(rows, c), [[0, 1], [2, 3], [6, 7], [4, 5]]  # a TPU's hosts need not hold neighbours
    got = np.concatenate([Stream(rows, c, mine=m).batch(2).tokens for m in mine])
    assert np.array_equal(got, whole.batch(2).tokens[np.concatenate(mine)])
    held = [np.concatenate([b.tokens for b in eval_batches(rows, 8, 256, mine=m)]) for m in (mine[0], None)]
    assert np.array_equal(held[0], held[1].reshape(-1, 8, held[1].shape[1])[:, mine[0]].reshape(held[0].shape))


def test_short_rows_make_short_batches(tmp_path):
    c = config(tmp_path, [row(i, words=1) for i in range(10)], packing=False, max_length=4096, split=(1, 0, 0))
    assert Stream(run(c).train, c).length == 128
    c.data.packing = True
    rows = run(c).train
    assert Stream(rows, c).length == -(-rows.lengths.sum() // 128) * 128


def test_evaluation_sees_every_row_once(many):
    _, rows = many
    batches = list(eval_batches(rows, 4, 256))
    assert Counter(chain.from_iterable(map(documents, batches))) == Counter(texts(rows))
    assert len({b.tokens.shape for b in batches}) == 1


def test_pretraining_fills_every_row(tmp_path):
    texts_ = [{"text": f"Document {i}. " + "word " * (i * 7 % 150)} for i in range(60)]
    c = config(tmp_path, texts_, split=(1, 0, 0))
    c.task, c.train.batch_size = "pretrain", 2
    rows = run(c).train
    assert rows.lengths.max() > c.data.max_length  # cut across rows, never dropped
    stream = Stream(rows, c)
    batches = [stream.batch(s) for s in range(stream.steps_total)]
    full = np.concatenate([(b.segments > 0).sum(1) for b in batches])
    assert (full[: stream.bins - 1] == 256).all() and full.sum() == rows.lengths.sum()
    assert tiny_chat.tokenizer().eos_token_id in rows.row(0)[0]
