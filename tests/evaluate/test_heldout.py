"""Held-out rows are asked without their last answer, and scored on it."""

import json
from dataclasses import asdict

import pytest

from sftjax.data.example import Answer, Example, Message
from sftjax.evaluate import heldout
from sftjax.generate.engine import Engine, Generated
from sftjax.generate.open import open_engine


@pytest.fixture(scope="module")
def opened(toy):
    return open_engine(str(toy.base))


def talk(*turns, **more):
    return Example("f", 1, messages=tuple(Message(role, text) for role, text in turns), **more)


def test_the_question_is_the_row_up_to_its_last_answer(opened):
    _, chat = opened
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    q = heldout.question(chat, talk(*turns))
    assert q.expected == "d" and q.prompt == "user: a\nassistant: b\nuser: c"
    assert q.ids == chat.prompt([Message(*turn) for turn in turns[:3]])
    assert heldout.question(chat, talk(*turns[:3])) == q._replace(expected=None)  # it ends with a question
    whole = chat.encode(talk(*turns)).ids.tolist()
    assert whole[: len(q.ids)] == q.ids  # what the model was trained to go on from
    raw = heldout.question(chat, Example("f", 1, completion=("x", "y")))
    assert (chat.tokenizer.decode(raw.ids), raw.prompt, raw.expected) == ("x", "x", "y")


def test_a_preference_asks_once_for_its_best_answer(opened):
    _, chat = opened

    def preference(prompt, *answers):
        return Example("f", 1, text=prompt, answers=tuple(Answer(said, rank) for said, rank in answers))

    rows = [preference("q", ("b", 2), ("c", 3)), preference("q", ("a", 1), ("c", 3)), preference("q", ("a", 1), ("b", 2))]
    rows += [preference("bad", ("x", 2)), preference("good", ("y", 1))]  # answers that stand alone
    found = list(heldout.questions(chat, rows))
    assert [(q.prompt, q.expected) for q in found] == [("q", "a"), ("good", "y")]
    assert found[0] == heldout.question(chat, Example("f", 1, completion=("q", "a")))
    assert len(list(heldout.questions(chat, [talk(("user", "q"), ("assistant", "a"))] * 2))) == 2


def test_answers_are_the_engines_and_compared_after_strip(opened):
    engine, chat = opened
    said = engine.generate([chat.prompt([Message("user", "hi")])], max_new_tokens=5, tokenizer=chat.tokenizer)[0]
    examples = [
        talk(("user", "hi"), ("assistant", f" {said.text}\n")),
        talk(("user", "hi"), ("assistant", "something else")),
        talk(("user", "hi")),  # nothing to compare with
        Example("f", 1, text="plain"),
        talk(("user", "x" * 200), ("assistant", "leaves no room")),
    ]
    asked = list(heldout.questions(chat, examples))
    right, wrong, long = heldout.answers(engine, asked, chat=chat, max_new_tokens=5)
    assert (right.exact, wrong.exact, long.exact) == (True, False, False)
    assert right.text == wrong.text == said.text and right.tokens == len(said.ids) and not long.text
    got = heldout.summary([right, wrong, long], ["contains"])
    assert got == {
        "exact_match": 1 / 3,
        "contains": 1 / 3,
        "stop_rate": 2 * said.stopped / 3,
        "empty": 1 / 3,
        "repeated": 0,
        "overlong": 0,
        "mean_length": pytest.approx(2 * len(said.ids) / 3),
    }
    assert heldout.Answer(**json.loads(json.dumps(asdict(right)))) == right
    (row,) = heldout.samples([wrong], [right])
    assert row["exact_tuned"] and not row["exact_base"] and row["base"] == row["tuned"] == said.text


def test_a_thought_is_neither_asked_for_nor_scored(opened, monkeypatch):
    engine, chat = opened
    raw = "<think>\nIs it ham, or is it spam? One more look at it.\n</think>\n\nham"
    (q,) = heldout.questions(chat, [talk(("user", "hi"), ("assistant", "<think>\nhm\n</think>\n\nham"))])
    assert q.expected == "ham"
    made = Generated(chat.tokenise(raw)[0], True, raw)
    monkeypatch.setattr(Engine, "generate", lambda self, prompts, **_: [made] * len(prompts))
    (a,) = heldout.answers(engine, [q], chat=chat, max_new_tokens=9)
    assert (a.text, a.exact, a.overlong, a.raw, a.tokens) == ("ham", True, False, raw, len(made.ids))


def test_labels_add_macro_f1():
    def answer(text, label):
        return heldout.Answer("p", label, text, True, text == label, 1, label)

    got = heldout.summary([answer("a", "a"), answer("a", "b"), answer("b", "b"), answer("neither", "a")])
    assert "accuracy" not in got  # which is a preference's in summary.json, and here the exact match
    assert got["exact_match"] == 0.5
    assert got["macro_f1"] == pytest.approx((2 / 4 + 2 / 3) / 2)  # a: tp 1 fp 1 fn 1; b: tp 1 fn 1
    assert heldout.summary([]) == {}


@pytest.mark.parametrize(
    "ids, looping",
    [
        ([7] * 16, True),
        ([7] * 15, False),  # too few to be more than a rule
        ([1, 2, 3, *[4, 5, 6, 7] * 4, 8], True),
        ([1, 2, 3, *[4, 5, 6, 7] * 3, 4, 5, 6, 8], False),
        (list(range(40)), False),
        ([0, 1] * 3 + list(range(40)) + [0, 1] * 7, False),
        ([], False),
    ],
)
def test_an_answer_loops_where_an_ngram_stands_four_times_in_a_row(ids, looping):
    assert heldout.loops(ids) is looping


def test_an_answer_is_too_long_beside_the_expected():
    assert heldout.too_long(41, 20) and not heldout.too_long(40, 20)
    assert heldout.too_long(10, 1) and not heldout.too_long(9, 1)
