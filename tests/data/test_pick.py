"""Rows are picked by what they say: their fates add up, what is written reads as what it was, a split is that of training."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from tiny_chat import chat, config, write

from sftjax.config import UserError, default
from sftjax.data.example import Example
from sftjax.data.formats import read_examples
from sftjax.data.pick import PARTS, clean, select, split, tally
from sftjax.data.pipeline import build, wanted
from sftjax.data.survey import asked_too, disputed, earlier, fates, sift, survey

QUIET = {"say": lambda _: None}


def row(i, answer=None):
    return {"id": i, "question": f"q{i}", "answer": answer or f"a{i}"}


def pair(prompt, chosen, rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def held(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def look(tmp_path, rows, held_out=None, want="any"):
    spec = write(tmp_path / "rows.jsonl", rows)
    other = held_out and write(tmp_path / "held.jsonl", held_out)
    return sift(spec, other, default().data, lambda _: None, want)


def test_every_row_has_one_fate_and_the_first_of_those_that_say_the_same_is_good(tmp_path):
    rows = [row(1), row(2), row(1) | {"id": 7, "tags": ["x"]}, row(3) | {"answer": 5}, row(4), row(1, "other"), row(4), row(5)]
    found, fate, _ = look(tmp_path, rows, [row(4), row(5, "other")])
    assert tally(fate) == {"good": 4, "bad": 1, "equals": 0, "held_out": 2, "again": 1} and sum(tally(fate).values()) == len(rows)
    assert fate.tolist() == [0, 0, 4, 1, 3, 0, 3, 0]
    assert [(found.where(i)[-1], found.where(j)[-1]) for i, j in earlier(found, fate)] == [("3", "1")]
    assert [rows.tolist() for rows in disputed(found, fate)] == [[0, 5]]
    assert asked_too(*look(tmp_path, rows, [row(4), row(5, "other")])).tolist() == [7]
    assert (found.formats, found.roles) == ({"alpaca": 7}, {"user": 7, "assistant": 7})
    assert [(bad.line, bad.field) for bad in found.bad] == [(4, "answer")]


TURN = {"role": "user", "content": "q1"}
ASKS = {  # one question in every kind of row
    "answered": {"messages": [TURN, {"role": "assistant", "content": "a"}]},
    "answered, raw": {"prompt": "q1", "completion": "b"},
    "asked": {"question": "q1"},
    "compared": {"prompt": [TURN], "chosen": [{"role": "assistant", "content": "c"}], "rejected": "d"},
    "compared, raw": {"prompt": "q1", "chosen": "e", "rejected": "f"},
    "judged": {"prompt": "q1", "completion": "g", "label": True},
}


@pytest.mark.parametrize("mine", ASKS)
@pytest.mark.parametrize("other", ASKS)
def test_a_held_out_question_is_one_in_rows_of_any_kind(tmp_path, mine, other):
    found, fate, held_out = look(tmp_path, [ASKS[mine]], [ASKS[other]])
    answers = mine.startswith("answered") and other.startswith("answered")  # whose answers may well differ
    assert fate.tolist() == [0 if answers and mine != other else 3]
    assert len(asked_too(found, fate, held_out)) == (answers and mine != other)


def test_held_out_rows_that_cannot_be_used_are_told(tmp_path):
    spec, other = (
        write(tmp_path / name, rows) for name, rows in (("1.jsonl", [row(1)]), ("2.jsonl", [row(1), {"question": "q"}]))
    )
    said = []
    assert sift(spec, other, default().data, said.append)[1].tolist() == [3]
    assert said[-1].startswith(f"{other}: 1 row cannot be used, and nothing is held against it: {other}:2: answer: is missing")


def test_preferences_are_held_out_by_their_prompts_and_those_between_equals_are_not_good(tmp_path):
    rows = [pair("p", "yes"), pair("p", "yes", "never"), pair("q", "yes"), pair("r", "no"), pair("s", ""), pair("s", "")]
    found, fate, other = look(tmp_path, rows, [pair("q", "other"), pair("r", "yes")])
    assert fate.tolist() == [0, 0, 3, 2, 0, 4]
    assert found.rows["silent"].tolist() == [False] * 4 + [True] * 2
    assert not disputed(found, fates(found)) and not len(asked_too(found, fate, other))


def test_one_prompt_with_two_right_answers_beside_it_is_two_rows_and_once_too_often_where_one_is_held_out(tmp_path):
    rows = [{"prompt": "q", "truth": 4}, {"prompt": "q", "truth": 5}, {"prompt": "q", "truth": 4}]
    assert look(tmp_path, rows)[1].tolist() == [0, 0, 4]
    assert look(tmp_path, rows, [{"prompt": "q", "truth": 6}])[1].tolist() == [3, 3, 3]


def test_a_tree_is_good_where_any_of_its_rankings_is_new_and_is_not_split(tmp_path):
    def tree(*under):
        replies = [{"text": text, "role": "assistant", "rank": rank} for rank, text in enumerate("ab")]
        return {"text": "u", "role": "prompter", "replies": [replies[0] | {"replies": under}, replies[1]]}

    rows = [{"message_tree_id": "t", "prompt": root} for root in (tree(), tree(tree()), tree(tree()), tree())]
    found, fate, _ = look(tmp_path, rows)
    assert fate.tolist() == [0, 0, 4, 4] and found.formats == {"tree": 4}
    assert list(earlier(found, fate)) == [(2, 0), (3, 0)]
    shallow, deep = (
        {"messages": [{"role": role, "content": text} for role, text in turns], "answers": ["a", "b"], "ranks": [1, 2]}
        for turns in ([("user", "u")], [("user", "u"), ("assistant", "a"), ("user", "u")])
    )
    spec = [str(tmp_path / "rows.jsonl"), write(tmp_path / "deep.jsonl", [deep])]
    _, fate, _ = sift(spec, write(tmp_path / "held.jsonl", [shallow]), default().data, lambda _: None)
    assert fate.tolist() == [3, 3, 3, 3, 0]  # what stood in a tree that is held out is not said before
    with pytest.raises(UserError, match=r"rows.jsonl:1: a tree holds several prompts.*: sftjax data convert"):
        split(str(tmp_path / "rows.jsonl"), str(tmp_path / "parts"), **QUIET)
    assert not (tmp_path / "parts").exists()


def test_what_is_clean_is_the_good_rows_as_they_stood_and_is_clean(tmp_path):
    rows = [row(1) | {"score": 0.5}, row(2) | {"tools": "[]"}, row(1), row(3) | {"answer": ""}, row(4)]
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    clean(path, str(out), held=write(tmp_path / "held.jsonl", [row(4)]), **QUIET)
    assert held(out) == rows[:2]
    first = [found for found in read_examples(path, default().data) if isinstance(found, Example)][:2]
    assert [e.messages for e in read_examples(str(out), default().data)] == [e.messages for e in first]
    assert fates(survey(str(out), default().data)).tolist() == [0, 0]
    with pytest.raises(UserError, match=r"no row is good, so there is none to write \(1 bad, 4 held out\)"):
        clean(path, str(tmp_path / "no.jsonl"), held=path, **QUIET)
    assert not (tmp_path / "no.jsonl").exists()


def test_sources_that_differ_in_what_rows_may_lack_go_into_one_file(tmp_path):
    spec = (write(tmp_path / "1.jsonl", [row(1)]), write(tmp_path / "2.jsonl", [row(2) | {"tags": "t"}]))
    clean(spec, str(tmp_path / "out.jsonl"), **QUIET)
    assert [example.tags for example in read_examples(str(tmp_path / "out.jsonl"), default().data)] == [(), ("t",)]


def test_what_json_has_no_word_for(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def parquet(name, of):
        pq.write_table(pa.table({"question": ["q"], "answer": ["a"], "more": of}), tmp_path / name)
        return str(tmp_path / name), str(tmp_path / "out.jsonl")

    scores = pa.array([[("x", float("nan")), ("y", 1.0)]], pa.map_(pa.string(), pa.float64()))
    clean(*parquet("map.parquet", scores), **QUIET)
    assert held(tmp_path / "out.jsonl")[0]["more"] == [["x", None], ["y", 1.0]]
    with pytest.raises(UserError, match="a row holds bytes"):
        clean(*parquet("bytes.parquet", pa.array([b"\xff"])), force=True, **QUIET)
    assert held(tmp_path / "out.jsonl")[0]["more"] == [["x", None], ["y", 1.0]]


def test_a_link_to_a_directory_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    split(write(tmp_path / "rows.jsonl", [row(i) for i in range(30)]), str(tmp_path / "link"), **QUIET)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "train.jsonl").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real", "rows.jsonl"]


TASKS = [
    ("sft", [row(i % 50, f"a{i % 70}") for i in range(150)]),
    ("dpo", [pair(f"p{i % 40}", f"yes {i}") for i in range(100)]),
    ("dpo", [{"prompt": f"p{i}", "answers": ["a", "b", "c"]} for i in range(30)]),
    ("kto", [{"prompt": f"p{i % 30}", "completion": f"a{i}", "label": i % 3 > 0} for i in range(90)]),
    ("grpo", [{"prompt": f"q{i % 30}", "truth": i} for i in range(60)]),
    ("grpo", [row(i % 30, f"a{i}") for i in range(60)]),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("task", "rows"), TASKS)
def test_a_split_is_the_one_that_training_makes(tmp_path, task, rows, seed):
    c = config(tmp_path, rows, split=(6, 3, 1), on_bad_row="skip", max_length=1024)
    c.task, c.seed = task, seed
    trained = build(c, chat(), **QUIET)
    _, part = split(c.data.train, str(tmp_path / "parts"), c, want=wanted(c), **QUIET)
    for number, name in enumerate(PARTS):
        kept = getattr(trained, name)
        lines = sorted({int(kept.where(i).rpartition(":")[2]) - 1 for i in range(len(kept))})
        assert lines == np.flatnonzero(part == number).tolist() and lines
        assert held(tmp_path / "parts" / f"{name}.jsonl") == [rows[i] for i in lines]
    whole = {(json.dumps(row) if task == "sft" else row.get("prompt", row.get("question")), p) for row, p in zip(rows, part)}
    assert len(whole) == len(dict(whole))  # no row, or prompt of a preference or of a row that asks, is on two sides


def test_a_split_is_replaced_as_a_whole_and_nothing_else_is(tmp_path):
    path, out = write(tmp_path / "rows.jsonl", [row(i) for i in range(20)]), tmp_path / "parts"
    split(path, str(out), **QUIET)
    assert {file.name: len(held(file)) for file in out.iterdir()} == {"train.jsonl": 16, "eval.jsonl": 2, "test.jsonl": 2}
    with pytest.raises(UserError, match="exists already; give --force"):
        split(path, str(out), **QUIET)
    two, broken = config(tmp_path, split=(9, 1)), write(tmp_path / "bad.jsonl", [row(1), {"question": "q"}])
    with pytest.raises(UserError, match=r"1 row cannot be used:\n.*bad.jsonl:2"):
        split(broken, str(out), two, force=True, **QUIET)
    assert len(held(out / "test.jsonl")) == 2
    split(path, str(out), two, force=True, **QUIET)
    assert {file.name: len(held(file)) for file in out.iterdir()} == {"train.jsonl": 18, "eval.jsonl": 2}
    (out / "mine.txt").write_text("")
    for place, told in ((out, "a directory with other files"), (out / "train.jsonl", "a file")):
        with pytest.raises(UserError, match=f"is {told}; name a new directory"):
            split(path, str(place), force=True, **QUIET)
    assert not list(tmp_path.glob(".*"))


def test_the_same_rows_are_selected_wherever_they_stand_and_one_more_changes_one_at_most(tmp_path):
    rows = [row(i // 2) for i in range(60)]  # each twice

    def chosen(rows, n=20, seed=0):
        c = config(tmp_path)
        c.seed = seed
        _, taken = select(write(tmp_path / "in.jsonl", rows), str(tmp_path / "out.jsonl"), n, c, force=True, **QUIET)
        assert held(tmp_path / "out.jsonl") == [row for row, take in zip(rows, taken) if take]
        return sorted(row["id"] for row in held(tmp_path / "out.jsonl"))

    first = chosen(rows)
    assert first == chosen(random.Random(0).sample(rows, 60)) != chosen(rows, seed=1)
    assert len(set(first)) > 10  # and not each with its double
    for more in range(60, 90):
        assert (Counter(chosen([row(more), *rows])) - Counter(first)).total() <= 1
    assert len(chosen(rows, 100)) == 60


def test_rows_that_are_read_in_different_ways_are_not_put_into_one_file(tmp_path):
    one, other = write(tmp_path / "1.jsonl", [row(1)]), write(tmp_path / "2.jsonl", [{"instruction": "q", "output": "a"}])
    for act in (clean, split, lambda spec, out, **more: select(spec, out, 1, **more)):
        with pytest.raises(UserError, match=r"1.jsonl is read as alpaca .*2.jsonl as alpaca, and one file is read in one way"):
            act((one, other), str(tmp_path / "out.jsonl"), **QUIET)
