"""Every shape of a preference becomes a prompt and its answers, best first; what is wrong is told by file, line and field."""

import json

import pytest

from sftjax.config import UserError, default
from sftjax.data.example import Answer, Example, Message
from sftjax.data.formats import Rejected, read_examples
from sftjax.data.pairs import sides

USER, GOOD, BAD = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")
Q, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
H, G, W = ({"from": who, "value": said} for who, said in (("human", "q"), ("gpt", "a"), ("gpt", "b")))
PAIR = (Answer((GOOD,), 1), Answer((BAD,), 2))
RAW = (Answer("a", 1), Answer("b", 2))


@pytest.fixture
def load(tmp_path):
    def run(*rows, want="pairs", path=None, say=None, **changes):
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        config = default().data
        for key, value in changes.items():
            with config.unlocked(), config.ignore_type():
                config[key] = value
        return list(read_examples(str(path or file), config, say, want))

    return run


def one(found):
    (example,) = found
    assert isinstance(example, Example), str(example)
    return example


def reason(found):
    (bad,) = found
    assert isinstance(bad, Rejected), bad
    return f"{bad.field}: {bad.reason}"


# -- shapes


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"prompt": [Q], "chosen": "a", "rejected": "b"},
        {"prompt": [Q], "chosen": A, "rejected": "b", "id": 7},
        {"prompt": "q", "chosen": [A], "rejected": [B]},
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A], "score_chosen": 8.0},
        {"chosen": [Q, A], "rejected": [Q, B]},
        {"chosen_messages": [Q | {"loss_weight": 0.0}, A], "rejected_messages": [Q, B]},
        {"messages": [Q], "chosen": A, "rejected": B},
        {"conversations": [H], "chosen": G, "rejected": W},
        {"instruction": "q", "input": "", "history": [], "chosen": "a", "rejected": "b"},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ],
)
def test_one_pair_in_every_dialect_is_one_example(load, row):
    example = one(load(row))
    assert (example.messages, example.answers) == ((USER,), PAIR)


def test_text_after_a_prompt_of_text_is_raw_and_an_instruction_is_a_users_turn(load):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    raw = one(load(row))
    assert (raw.text, raw.messages, raw.answers) == ("q", None, RAW)
    asked = one(load(row, columns={"instruction": "prompt"}))
    assert (asked.text, asked.messages, asked.answers) == (None, (USER,), PAIR)


def test_a_system_prompt_has_no_place_beside_raw_text(load):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "system": "Be terse."}
    assert reason(load(row)).startswith("system: has no place beside a prompt of raw text; ")
    assert one(load(row, columns={"instruction": "prompt"})).messages[0].content == "Be terse."


def test_the_turns_before_the_answers_are_the_prompt_with_system_and_tools(load):
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    row = {
        "system": "s",
        "history": [["h", "i"]],
        "instruction": "q",
        "input": "in",
        "chosen": "a",
        "rejected": "b",
        "tools": [tool],
    }
    example = one(load(row))
    assert [(m.role, m.content) for m in example.messages] == [
        ("system", "s"),
        ("user", "h"),
        ("assistant", "i"),
        ("user", "q\nin"),
    ]
    assert example.tools == (tool,)
    assert one(load({"prompt": [Q], "chosen": "a", "rejected": "b"}, system="config")).messages[0].content == "config"


def test_the_prompt_is_the_longest_common_prefix_of_turns_but_for_an_answer_each(load):
    example = one(load({"chosen": [Q, B, Q, A], "rejected": [Q, B, Q, B, Q, A]}))
    assert example.messages == (USER, BAD, USER)
    assert [a.said for a in example.answers] == [(GOOD,), (BAD, USER, GOOD)]
    shorter = one(load({"chosen": [Q, A], "rejected": [Q, A, Q, B]}))
    assert (shorter.messages, shorter.answers[0].said) == ((USER,), (GOOD,))


def test_a_transcripts_turns_begin_after_blank_lines_and_a_speakers_turns_in_a_row_are_one(load):
    said = "\n\nHuman: x\nHuman: y \n\n\n\nAssistant: one\n\ntwo\n\nAssistant:three\n\nHuman: z\n\nAssistant: "
    example = one(load({"chosen": said, "rejected": said + "no"}))
    assert [(m.role, m.content) for m in example.messages] == [
        ("user", "x\nHuman: y"),
        ("assistant", "one\n\ntwo\n\nthree"),
        ("user", "z"),
    ]
    assert [a.said[0].content for a in example.answers] == ["", "no"]  # to say nothing is an answer too


@pytest.mark.parametrize(
    ("marks", "answers", "ranks"),
    [
        ({}, "BACD", (1, 2, 3, 4)),
        ({"ranks": [2, 0, 1, 3]}, "ACBD", (1, 2, 3, 4)),
        ({"scores": [9, 8.5, 9, -1]}, "BCAD", (1, 1, 2, 3)),
        ({"ranks": [1, 1, 1, 1]}, "BACD", (1, 1, 1, 1)),
    ],
)
def test_a_rankings_answers_come_best_first(load, marks, answers, ranks):
    example = one(load({"prompt": "q", "answers": list("BACD")} | marks))
    assert ["".join(a.said) for a in example.answers] == list(answers)
    assert tuple(a.rank for a in example.answers) == ranks


def test_a_rankings_answers_are_texts_or_turns(load):
    assert one(load({"messages": [Q], "answers": ["a", [B]], "ranks": [0, 1]})).answers == PAIR
    assert one(load({"answers": [[Q, A], [Q, B]], "prompt": "q"})).messages == (USER,)


@pytest.mark.parametrize("label", [True, 1, "True", 1.0])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [Q], "completion": [A]},
        {"prompt": [Q], "completion": "a"},
        {"messages": [Q, A]},
        {"conversations": [H, G]},
        {"instruction": "q", "output": "a"},
    ],
)
def test_an_answer_with_a_label_in_every_dialect_is_one_example(load, row, label):
    label = int(label) if label == 1.0 else label
    example = one(load(row | {"label": label}, want="labels"))
    assert (example.messages, example.answers) == ((USER,), (Answer((GOOD,), 1),))
    assert one(load(row | {"kto_tag": False}, want="labels")).answers == (Answer((GOOD,), 2),)


def test_a_raw_answer_may_have_a_label_and_pairs_are_answers_with_labels_too(load):
    raw = one(load({"prompt": "q", "completion": "a", "label": 0}, want="labels"))
    assert (raw.text, raw.answers) == ("q", (Answer("a", 2),))
    pair = one(load({"prompt": "q", "chosen": "a", "rejected": "b"}, want="labels"))
    assert sides(pair.answers, "labels") == [{0: 1}, {1: 2}]


def test_a_tree_is_a_ranking_wherever_two_replies_have_a_rank(load):
    def node(text, role, rank=None, *replies, **more):
        return {"text": text, "role": role, "rank": rank, "replies": list(replies), **more}

    answered = node("u2", "prompter", None, node("x", "assistant", 1), node("y", "assistant", 0), node("z", "assistant"))
    gone = node("gone", "assistant", 0, deleted=True)
    root = node("u1", "prompter", None, node("a1", "assistant", 0, answered), gone, node("b1", "assistant", 1))
    first, second = load({"message_tree_id": "t", "prompt": root})
    assert [m.content for m in first.messages] == ["u1"] and [a.said[0].content for a in first.answers] == ["a1", "b1"]
    assert [m.content for m in second.messages] == ["u1", "a1", "u2"]
    assert [a.said[0].content for a in second.answers] == ["y", "x"] and (first.line, second.line) == (1, 1)
    assert "nowhere in this tree" in reason(load({"message_id": "t", **answered["replies"][0]}))


# -- what is wrong


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected: is missing or null"),
        ({"prompt": "q", "chosen": 5, "rejected": "b"}, "chosen: is the number 5, must be a list"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt: is empty: it has no turns"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt: is missing or null"),
        ({"prompt": [Q], "chosen": [A], "rejected": [Q, B]}, "rejected[0]: is a turn of the role user: an answer begins with"),
        ({"prompt": "other", "chosen": [Q, A], "rejected": [Q, B]}, "prompt: says other than the turns that the answers begin"),
        ({"chosen": "a", "rejected": "b"}, "chosen: is text without a prompt"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"}, "rejected: is text without a prompt"),
        ({"chosen": [A], "rejected": [B]}, "chosen: has no prompt: it begins with no turn that rejected begins with too"),
        ({"chosen": [Q, A], "rejected": [Q, Q]}, "rejected[1]: is a turn of the role user, where the prompt ends"),
        ({"chosen": [Q, A], "rejected": [Q, {"role": "x", "content": "b"}]}, "rejected[1].role: 'x' is not a role known here"),
        ({"instruction": "", "chosen": "a", "rejected": "b"}, "instruction: is empty"),
        ({"prompt": "q", "answers": ["a"]}, "answers: is a list of 1, and a ranking needs two answers"),
        ({"prompt": "q", "answers": ["a", None]}, "answers[1]: is missing or null"),
        ({"prompt": "q", "answers": ["a", "b"], "ranks": [1]}, "ranks: has 1 numbers for 2 answers"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1, "x"]}, "scores[1]: is the text 'x', must be a number"),
        ({"message_tree_id": "t", "prompt": {"text": "q", "role": "nobody"}}, "prompt: is not a message of a tree"),
    ],
)
def test_a_bad_preference_is_told_by_its_place(load, row, told):
    assert reason(load(row)).startswith(told)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "completion": "a", "label": "maybe"}, "label: is the text 'maybe', must be true or false"),
        ({"prompt": "q", "completion": "a", "label": None}, "label: is missing or null"),
        ({"prompt": "q", "completion": None, "label": True}, "completion: is missing or null"),
        ({"messages": [Q], "label": True}, "messages[0]: is a turn of the role user, where the prompt ends"),
        ({"messages": [A], "label": True}, "messages: has no prompt: it begins with the answer"),
    ],
)
def test_a_bad_labelled_answer_is_told_by_its_place(load, row, told):
    assert reason(load(row, want="labels")).startswith(told)


RAW_PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "want", "format", "told"),
    [
        (
            {"instruction": "q", "output": "a"},
            "pairs",
            "auto",
            ("no format with pairs", "chosen, rejected", "columns.chosen=NAME"),
        ),
        ({"question": "q", "answers": []}, "labels", "auto", ("answers labelled good or bad", "label, and one of prompt")),
        ({"answers": ["a", "b"]}, "rankings", "auto", ("no format with rankings", "answers, and one of prompt")),
        ({"text": "q", "label": True}, "labels", "auto", ("no format with answers labelled",)),
        ({"messages": [Q, A]}, "pairs", "messages", ("format=messages has no pairs, which this task learns from",)),
        (RAW_PAIR, "answers", "pair", ("format=pair has no one answer a row",)),
        (RAW_PAIR, "answers", "auto", ("preferences (chosen, rejected)",)),
        ({"messages": [Q, A], "label": True}, "answers", "auto", ("(KTO)",)),
    ],
)
def test_a_source_that_holds_something_else_is_refused_whole(load, row, want, format, told):
    with pytest.raises(UserError) as e:
        load(row, want=want, format=format)
    assert all(part in str(e.value) for part in told), str(e.value)


# -- real files

REAL = [  # path, what is wanted, format, examples, pairs or answers that they make
    ("hh_rlhf", "pairs", "pair", 2312, 2312),
    ("derived/hh_harmless_pairs.jsonl", "pairs", "pair", 2303, 2303),
    ("llamafactory/dpo_en_demo.json", "pairs", "pair", 300, 300),
    ("llamafactory/dpo_zh_demo.json", "pairs", "pair", 300, 300),
    ("llamafactory/v1_dpo_demo.jsonl", "pairs", "pair", 10, 10),
    ("llamafactory/kto_en_demo.json", "labels", "unpaired", 300, 300),
    ("oasst_trees/en_100_tree.jsonl", "pairs", "tree", 212, 754),
    ("oasst_trees/en_100_message.jsonl", "rankings", "tree", 212, 212),
    ("derived/oasst_ranked.jsonl", "pairs", "ranking", 212, 754),
    ("derived/vicuna80_kway_scored.jsonl", "pairs", "ranking", 80, 626),
    ("derived/vicuna80_kway_scored.jsonl", "rankings", "ranking", 80, 80),
    ("derived/zh_sentiment_ranked4_400.jsonl", "pairs", "ranking", 400, 2400),
    ("derived/gsm8k_kto_labels.jsonl", "labels", "unpaired", 1600, 1600),
]


@pytest.mark.parametrize(("path", "want", "format", "examples", "count"), REAL)
def test_real_preferences_are_read_whole(shared, load, path, want, format, examples, count):
    said: list[str] = []
    found = load(path=shared / "data" / path, want=want, say=said.append)
    assert said[0].split(": read as ")[1].split()[0] == format
    assert sum(isinstance(row, Example) for row in found) == len(found) == examples
    assert sum(len(sides(row.answers, want)) for row in found) == count


def test_trees_and_rankings_made_of_them_are_the_same(shared, load):
    trees = load(path=shared / "data/oasst_trees/en_100_tree.jsonl")
    made = load(path=shared / "data/derived/oasst_ranked.jsonl")
    assert set(map(said, trees)) == set(map(said, made))


def said(example):
    """All that an example says, as far as it can be hashed."""
    return tuple(tuple((m.role, m.content) for m in turns) for turns in (example.messages, *(a.said for a in example.answers)))
