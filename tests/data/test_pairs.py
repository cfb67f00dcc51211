"""Laws of several answers to one prompt: encoded as alone, side by side in a batch, whole or dropped, split by their prompts."""

import io
import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from rich.console import Console
from tiny_chat import chat, config, tokenizer, write

from sftjax.config import UserError, default
from sftjax.data import cache, encode, pairs
from sftjax.data.example import Answer, Example, Message
from sftjax.data.formats import read_examples
from sftjax.data.pipeline import build, data_hash
from sftjax.data.preview import preview
from sftjax.data.rows import OTHER, split_keys
from sftjax.data.stream import Stream, eval_batches


def pair(i, words=3):
    good, bad = f"Good {i}" + ", and so on" * (i % words), f"Bad {i}" + ", or not" * (i % 4)
    return {"prompt": [{"role": "user", "content": f"Question {i}?"}], "chosen": good, "rejected": bad}


def ranking(i, **more):
    return {"instruction": f"Question {i}?", "answers": [f"{letter}{i}" for letter in "BACD"]} | more


def labelled(i):
    return {"instruction": f"Question {i}?", "output": f"Answer {i}" + ", and so on" * (i % 3), "label": i % 3 > 0}


def run(c, task="dpo", said=None, **kwargs):
    c.task = task
    return build(c, chat(loss_on=c.data.loss_on), say=said.append if said is not None else (lambda _: None), **kwargs)


def bins(batch):
    """The segments of each row of a batch: {number: (ids, weights)}."""
    for tokens, weights, segments, positions in zip(*batch):
        found = {}
        for s in sorted(set(segments.tolist()) - {0}):
            at = np.flatnonzero(segments == s)
            assert (np.diff(at) == 1).all() and positions[at].tolist() == list(range(len(at)))
            found[s] = tuple(tokens[at].tolist()), tuple(weights[at].tolist())
        yield found


def stored(rows, i):
    return tuple((tuple(p.ids.tolist()), tuple(p.weights.tolist())) for p in rows.parts(i))


# -- which answers are compared


def test_an_order_of_four_makes_six_pairs_in_order_and_one_ranking():
    answers = [Answer(letter, rank) for rank, letter in enumerate("BACD", 1)]
    made = [tuple(answers[k].said for k in side) for side in pairs.sides(answers, "pairs")]
    assert made == [("B", "A"), ("B", "C"), ("B", "D"), ("A", "C"), ("A", "D"), ("C", "D")]
    assert pairs.sides(answers, "rankings") == [{0: 1, 1: 3, 2: 5, 3: 7}]


def test_equals_make_no_pair_and_have_even_slots_in_a_ranking():
    answers = [Answer("a", 1), Answer("b", 1), Answer("c", 2), Answer("d", 2)]
    assert pairs.sides(answers, "pairs") == [{0: 1, 2: 2}, {0: 1, 3: 2}, {1: 1, 2: 2}, {1: 1, 3: 2}]
    assert pairs.sides(answers, "rankings") == [{0: 1, 1: 4, 2: 5, 3: 8}]
    for nothing in ([Answer("a", 1), Answer("b", 1)], [Answer("a", 1), Answer("a", 2)]):
        assert all(pairs.sides(nothing, want) == [] for want in ("pairs", "rankings", "labels"))


# -- encoding and the cache

USER, SYSTEM = Message("user", "q?"), Message("system", "s")
EXAMPLES = [
    Example(
        "f", 3, messages=(USER,), answers=(Answer((Message("assistant", "yes"),), 1), Answer((Message("assistant", ""),), 2))
    ),
    Example(
        *("f", 3),
        messages=(SYSTEM, USER, Message("assistant", "before"), USER),
        tools=({"type": "function"},),
        answers=tuple(Answer((Message("assistant", x), USER, Message("assistant", "é", 0.5, {"name": "n"})), 1) for x in "ab"),
    ),
    Example("f", 3, text="Raw: ", answers=(Answer("one", 1), Answer("two", 2), Answer("three", 3))),
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_answer_is_encoded_as_its_conversation_alone_would_be(example):
    (row,) = encode.encode_one(chat(), example, "rankings")
    at = 0
    for alone, (length, _) in zip(example.alone(), row.parts):
        encoded = chat().encode(alone)
        assert np.array_equal(row.ids[at : at + length], encoded.ids)
        assert np.array_equal(row.weights[at : at + length], encoded.weights)
        at += length
    assert at == len(row.ids) and row.terminated


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_preference_comes_back_from_the_cache_as_it_was(example, tmp_path):
    assert cache.loads(cache.dumps(example), "f", 3) == example
    made = encode.encode_one(chat(), example, "pairs")
    cache.write(tmp_path, made, ["f"])
    store = cache.Store(tmp_path, ["f"])
    assert [store.part(i)[["length", "slot"]].tolist() for i in range(len(store))] == [row.parts for row in made]
    assert [store.rows["tied"][i] for i in range(len(store))] == [row.tied for row in made]


def test_only_the_answers_are_trained_and_each_with_its_terminator(tmp_path):
    turns = [*pair(0)["prompt"], {"role": "assistant", "content": "Before."}, {"role": "user", "content": "And?"}]
    rows = run(config(tmp_path, [{"prompt": turns, "chosen": "Yes.", "rejected": "No."}], split=(1, 0, 0))).train
    decode = chat().tokenizer.decode
    said = [decode(ids[weights > 0]) for ids, weights, _ in rows.parts(0)]
    assert said == ["Yes.<|im_end|>", "No.<|im_end|>"]
    raw = run(config(tmp_path, [{"prompt": "q", "chosen": "Yes.", "rejected": "No."}], split=(1, 0, 0))).train
    assert [decode(ids[weights > 0]) for ids, weights, _ in raw.parts(0)] == ["Yes.</s>", "No.</s>"]


def test_workers_give_what_one_process_gives(tmp_path):
    c = config(tmp_path, [ranking(i) for i in range(300)])
    alone = run(c)
    c.data.cache_dir, c.data.workers = str(tmp_path / "other"), 2
    many = run(c)
    assert alone.report == many.report and alone.report["read"] == 1800


# -- the ledger and the splits


def test_the_sum_adds_up_and_a_pair_is_dropped_as_a_pair(tmp_path):
    rows = [pair(i) for i in range(20)]
    rows[2]["rejected"] = None
    rows[4]["rejected"] = "x" * 300
    rows[6]["chosen"], rows[6]["rejected"] = "x" * 130, "y" * 130  # either would fit alone
    rows[8]["rejected"] = rows[8]["chosen"]
    said = []
    got = run(config(tmp_path, rows, on_bad_row="skip", split=(1, 0, 0)), said=said)
    assert got.report["read"] == 20 and got.report["kept"] == len(got.train) == 16
    assert got.report["dropped"] == {"bad_row": 1, "overlong": 2, "all_equal": 1}
    assert sorted(r.line for r in got.rejected) == [3, 5, 7, 9]
    assert any("equally good or the same" in line and "train.jsonl:9" in line for line in said)
    assert any("raise data.max_length" in line and "train.jsonl:5, " in line for line in said)
    assert all(len(got.train.parts(i)) == 2 for i in range(16))


def test_a_pair_with_an_answer_that_trains_nothing_is_dropped(tmp_path):
    rows = [pair(i) for i in range(3)]
    rows[1]["rejected"] = {"role": "assistant", "content": "No.", "loss": 0}
    assert run(config(tmp_path, rows, split=(1, 0, 0))).report["dropped"] == {"trains_nothing": 1}


def test_rankings_count_as_the_pairs_they_make_or_as_themselves(tmp_path):
    rows = [ranking(i) for i in range(10)] + [ranking(10, scores=[1, 1, 1, 1]), ranking(11, scores=[3, 3, 1, 2])]
    c = config(tmp_path, rows, split=(1, 0, 0))
    report = run(c).report
    assert (report["kept"], report["dropped"]) == (65, {"all_equal": 1})
    whole = run(c, want="rankings")
    assert (whole.report["kept"], whole.report["dropped"], whole.train.slots) == (11, {"all_equal": 1}, 8)
    assert Counter(tuple(p.slot for p in whole.train.parts(i)) for i in range(11)) == {(1, 3, 5, 7): 10, (1, 4, 5, 7): 1}


def test_prompts_never_straddle_splits(tmp_path):
    c = config(tmp_path, [pair(i) | more for i in range(60) for more in ({}, {"chosen": "Other."})])
    c.data.train += (write(tmp_path / "rankings.jsonl", [ranking(i) for i in range(60)]),)
    got = run(c)
    sides = [{s.example(i).messages[0].content for i in range(len(s))} for s in (got.train, got.eval, got.test)]
    assert [len(s) for s in sides] == [48, 6, 6]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_one_prompt_for_all_is_split_by_answers_and_a_rankings_pairs_stay_together(tmp_path):
    rows, said = [ranking(0) | {"answers": [f"{letter}{i}" for letter in "BACD"]} for i in range(20)], []
    got = run(config(tmp_path, rows), said=said)
    sides = [{s.example(i).answers[0].said[0].content[1:] for i in range(len(s))} for s in (got.train, got.eval, got.test)]
    assert [len(s) for s in sides] == [16, 2, 2] and len(set.union(*sides)) == 20
    assert any("one prompt has more rows than the held-out share" in line for line in said)
    few, keys = np.repeat(np.arange(10), 2), np.arange(20)
    assert split_keys(few, keys, (8, 1, 1)) is few and split_keys(few, keys, (98, 1, 1)) is keys
    assert split_keys(keys[:3], keys[:3], (8, 1, 1)) is not None


# -- batches


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_unpacks_to_the_pairs(tmp_path, packing):
    c = config(tmp_path, [pair(i, words=9) for i in range(80)], split=(1, 0, 0), max_length=512, packing=packing)
    rows = run(c).train
    stream = Stream(rows, c)
    seen = Counter()
    for found in chain.from_iterable(bins(stream.batch(s)) for s in range(stream.steps_total)):
        assert list(found) == list(range(1, len(found) + 1)) and len(found) % 2 == 0
        seen.update((found[s], found[s + 1]) for s in range(1, len(found), 2))
    assert seen == Counter(stored(rows, i) for i in range(80))
    assert not packing or stream.fullness > 0.9
    held = chain.from_iterable(map(bins, eval_batches(rows, 4, 512)))
    assert sum(len(found) for found in held) == 160


def test_a_ranking_has_its_answers_in_order_in_a_group_of_segments(tmp_path):
    rows = [ranking(0), *(ranking(i) | {"answers": ["x", "y"]} for i in range(1, 4))]
    c = config(tmp_path, rows, split=(1, 0, 0), max_length=1024)
    rows = run(c, want="rankings").train
    (found, *_) = bins(Stream(rows, c).batch(0))
    groups = sorted(sorted((s - 1) % 8 + 1 for s in found if (s - 1) // 8 == n) for n in range(4))
    assert groups == [[1, 3], [1, 3], [1, 3], [1, 3, 5, 7]]


def test_a_labelled_answer_tells_its_label_by_its_segment_and_stands_beside_its_prompt_with_anothers_answer(tmp_path):
    c = config(tmp_path, [labelled(i) for i in range(40)], split=(1, 0, 0), max_length=512)
    rows = run(c, "kto").train
    stream = Stream(rows, c)
    seen = Counter()
    for found in chain.from_iterable(bins(stream.batch(s)) for s in range(stream.steps_total)):
        for s in found:
            if s % 3 == OTHER % 3:
                own = found.get(s - 2) or found[s - 1]
                begins = [np.flatnonzero(weights)[0] for _, weights in (own, found[s])]
                assert begins[0] == begins[1] and own[0][: begins[0]] == found[s][0][: begins[1]]  # the prompt
                assert own[0] != found[s][0] and found[s][1][: begins[0]] == (0.0,) * begins[0]
            else:
                seen[found[s], s % 3 == 1] += 1
    labels = [rows.example(i).answers[0].rank == 1 for i in range(40)]
    assert seen == Counter((stored(rows, i)[0], label) for i, label in enumerate(labels)) and sum(labels) == 26
    answers = {tuple(np.asarray(ids)[np.asarray(w) > 0]) for i in range(40) for ids, w in stored(rows, i)[:1]}
    assert all(tuple(np.asarray(ids)[np.asarray(w) > 0]) in answers for i in range(40) for ids, w in stored(rows, i)[1:])


def test_anothers_answer_is_to_another_prompt_where_there_is_one(tmp_path):
    for each in ([3] * 4, [6, 1, 1, 1], [1, 9, 2], [3]):  # rows of each prompt
        rows = [labelled(i) | {"output": f"{i}{k}"} for i, n in enumerate(each) for k in range(n)]
        got = run(config(tmp_path, rows, split=(1, 0, 0)), "kto").train
        prompts = np.array([got.example(i).messages[0].content for i in range(len(got))])
        assert ((prompts != prompts[got.other]) == (len(each) > 1)).all()
        assert {len(got.parts(i)) for i in range(len(got))} == {2 if len(each) > 1 else 1}


def test_anothers_answer_never_makes_a_row_too_long_and_a_row_alone_has_none(tmp_path):
    rows = [labelled(i) | {"output": "x" * (40 * i % 210)} for i in range(1, 30)]
    c = config(tmp_path, rows, split=(1, 0, 0))
    got = run(c, "kto").train
    assert got.lengths.max() <= 256 and {len(got.parts(i)) for i in range(len(got))} == {1, 2}
    assert all(sum(len(p.ids) for p in got.parts(i)) == got.lengths[i] for i in range(len(got)))
    c.kto.loss = "apo_zero_unpaired"  # which has no baseline to make of them
    without = run(c, "kto").train
    assert {len(without.parts(i)) for i in range(len(without))} == {1} and len(without) == len(got)
    alone = run(config(tmp_path, [labelled(1)], split=(1, 0, 0)), "kto").train
    assert len(alone.parts(0)) == 1


@pytest.mark.parametrize(
    ("task", "row", "other"),
    [
        ("kto", labelled(1), {"label": False}),
        ("reward", ranking(1, ranks=[1, 2, 3, 4]), {"ranks": [1, 2, 2, 3]}),
        ("grpo", {"prompt": "q", "answer": "4"}, {"answer": "5"}),
        ("sft", {"instruction": "q", "output": "a", "tags": "x"}, {"tags": "y"}),
    ],
)
def test_what_rows_say_beside_their_tokens_is_of_the_datas_hash(tmp_path, task, row, other):
    c = config(tmp_path, split=(1, 0, 0), max_length=1024)
    c.reward.loss = "plackett_luce"
    reports = []
    for i, held in enumerate((row, row | other, row)):
        c.data.train = (write(tmp_path / f"{i}.jsonl", [held]),)
        reports.append(run(c, task).report)
    assert len({report["sources"][0]["tokens_sha256"] for report in reports}) == 1
    one, changed, again = map(data_hash, reports)
    assert one == again != changed


# -- what a task asks for


def test_a_task_without_preferences_refuses_them_and_a_task_with_refuses_rows_without(tmp_path):
    with pytest.raises(UserError, match=r"holds preferences \(chosen, rejected\)"):
        run(config(tmp_path, [pair(0)]), "sft")
    with pytest.raises(UserError, match="no format with pairs, which this task learns from"):
        run(config(tmp_path, [{"instruction": "q", "output": "a"}]))
    for key, value in (("loss_on", "all"), ("on_overlong", "truncate")):
        with pytest.raises(UserError, match=f"--config.data.{key}={value}: .*use"):
            run(config(tmp_path, [pair(0)], **{key: value}))


def test_the_same_file_is_cached_for_each_use_of_it(tmp_path):
    c = config(tmp_path, [ranking(i) for i in range(5)], split=(1, 0, 0))
    assert [len(run(c, want=want).train) for want in ("pairs", "rankings", "pairs")] == [30, 5, 30]
    assert sum(1 for _ in (tmp_path / "cache").iterdir()) == 2


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        ("dpo", pair(0), ["chosen", "[[Good 0<im_end>]]", "rejected", "[[Bad 0<im_end>]]"]),
        ("kto", labelled(1), ["good", "[[Answer 1, and so on<im_end>]]"]),
    ],
)
def test_a_preview_shows_every_answer(tmp_path, task, row, told):
    tokenizer().save_pretrained(tmp_path / "model")
    c = config(tmp_path, [row], split=(1, 0, 0))
    c.task, c.model.path = task, str(tmp_path / "model")
    out = Console(record=True, width=200, file=io.StringIO())
    preview(c, out, 1)
    text = out.export_text(styles=False).replace("|", "")
    at = [text.index(part) for part in told]
    assert at == sorted(at)


# -- writing


def test_written_pairs_read_back_as_the_same_pairs(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    call = {"role": "assistant", "content": None, "tool_calls": [tool | {"function": {"name": "f", "arguments": {"x": 1}}}]}
    ask = {"role": "user", "content": "q"}
    called = {"chosen": [ask, call], "rejected": [ask, {"role": "gpt", "content": "é"}], "tools": [tool]}
    raw = {"prompt": "q ", "chosen": "a", "rejected": ""}
    read = lambda path: list(read_examples(path, default().data, want="pairs"))  # noqa: E731
    for k, rows in enumerate(([ranking(0, scores=[1, 1, 3, 2])], [called], [raw])):
        examples = read(path := write(tmp_path / f"{k}.jsonl", rows))
        count = pairs.write(str(path), str(tmp_path / f"pairs{k}.jsonl"), say=lambda _: None)["pairs"]
        again = read(str(tmp_path / f"pairs{k}.jsonl"))
        made = [(e.messages, e.text, e.tools, *(a.said for a in e.answers)) for e in again]
        assert made == [
            (e.messages, e.text, e.tools, *(e.answers[i].said for i in side))
            for e in examples
            for side in pairs.sides(e.answers, "pairs")
        ]
        assert count == len(made) == (5, 1, 1)[k]
    assert json.loads((tmp_path / "pairs2.jsonl").read_text()) == raw


def test_what_was_written_is_counted_and_whole_or_not_there(tmp_path):
    rows = [ranking(0), ranking(1, scores=[1, 1, 3, 2]) | {"tags": ["hard"]}, ranking(2, scores=[1, 1, 1, 1])]
    out = tmp_path / "pairs.jsonl"
    given = [str(write(tmp_path / "rankings.jsonl", rows)), str(out)]
    said = []
    assert pairs.write(*given, say=said.append) == {"rows": 3, "pairs": 11, "ties": 7, "without": 1, "bad": 0}
    assert "read as ranking" in said[0]
    held = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("tags") for row in held] == [None] * 6 + [["hard"]] * 5
    with pytest.raises(UserError, match="exists already; give --force"):
        pairs.write(*given)
    bad = write(tmp_path / "bad.jsonl", [ranking(0), {"instruction": "q", "answers": ["a"]}])
    with pytest.raises(UserError, match=r"bad.jsonl:2.*a ranking needs two answers"):
        pairs.write(str(bad), str(out), force=True, say=said.append)
    assert len(out.read_text().splitlines()) == 11 and not list(tmp_path.glob(".*"))
    c = default().data
    c.on_bad_row = "skip"
    assert pairs.write(str(bad), str(out), c, force=True, say=said.append)["bad"] == 1
    for name, sentence in (("tied", "no row of it has an answer that is better"), ("no/such", "there is no directory")):
        with pytest.raises(UserError, match=sentence):
            pairs.write(str(write(tmp_path / "equal.jsonl", rows[2:])), str(tmp_path / name), say=said.append)
