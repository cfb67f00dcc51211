"""Every format becomes the same few Examples, and every row is checked: what is wrong is told by file, line and field."""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from sftjax.config import UserError, default
from sftjax.data.example import Example, Message
from sftjax.data.formats import Rejected, fail_on, read_examples, sources

USER, ANSWER = Message("user", "q"), Message("assistant", "a")
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


@pytest.fixture
def load(tmp_path):
    """Examples and Rejecteds of rows (or a file's text), with config.data changed by keywords."""

    def run(*rows, name="rows.jsonl", data=None, spec=None, say=None, want="answers", **changes):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)) if data is None else data)
        config = default().data
        config.train = (str(path),) if spec is None else spec
        for key, value in changes.items():
            with config.unlocked(), config.ignore_type():
                config[key] = value
        return list(read_examples(config.train, config, say, want))

    return run


def one(found):
    (example,) = found
    assert isinstance(example, Example), str(example)
    return example


def reason(found):
    (bad,) = found
    assert isinstance(bad, Rejected)
    return f"{bad.field}: {bad.reason}"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a", "history": [], "system": None, "tools": "[]"},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
        {"prompt": "q", "output": "a", "id": 7},
        {"input": "q", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [Q, A], "system": ""},
        {"conversation": json.dumps([Q, A])},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "role": "x", "content": "y"},
        {"messages": [Q, A]},
        {"messages": [Q | {"name": None, "tool_calls": None}, A | {"tool_calls": [], "function_call": None}], "tools": None},
        {"messages": [Q, {"role": "assistant", "content": [{"type": "text", "text": "a", "image_url": None}]}], "images": []},
        {"messages": [Q, {"role": "assistant", "content": [{"type": "text", "value": "a"}]}]},
    ],
)
def test_one_question_and_answer_in_every_dialect_is_one_example(load, row):
    assert one(load(row)).messages == (USER, ANSWER)


def test_alpaca_with_everything(load):
    row = {"system": "s", "history": [["h", "i"]], "instruction": "q", "input": "in", "output": "a", "tools": [TOOL["function"]]}
    example = one(load(row))
    assert [(m.role, m.content) for m in example.messages] == [
        ("system", "s"),
        ("user", "h"),
        ("assistant", "i"),
        ("user", "q\nin"),
        ("assistant", "a"),
    ]
    assert example.tools == (TOOL,)


def test_prompt_and_completion_are_raw_text_or_turns_of_which_only_the_completion_is_trained(load):
    assert one(load({"prompt": "q ", "completion": "a"})).completion == ("q ", "a")
    for completion in ("a", [A]):
        asked, before, again, answer = one(load({"prompt": [Q, A, Q], "completion": completion})).messages
        assert (asked.loss, before.loss, again.loss, answer) == (0.0, 0.0, 0.0, ANSWER)


def test_plain_text_in_every_shape(load):
    assert one(load({"text": "a b"})).text == "a b"
    assert one(load(data='["a b"]', name="a.json")).text == "a b"
    assert one(load(data="a b\n", name="a.txt")).text == "a b"


def test_labels_are_answers_to_the_prompt(load):
    data = "label,review\n10,a {labels}\n2,b\n"
    columns, prompt = {"text": "review"}, "{text} ({labels})"
    first, second = load(data=data, name="a.csv", columns=columns, label_prompt=prompt)
    assert first.messages == (Message("user", "a {labels} (2, 10)"), Message("assistant", "10"))
    assert (first.label, second.label, second.line) == ("10", "2", 3)


@pytest.mark.parametrize(("label", "text"), [(0, "0"), (1.0, "1"), ("spam ", "spam"), (True, "True")])
def test_a_label_is_a_word_or_a_whole_number(load, label, text):
    assert one(load({"text": "t", "label": label})).label == text


@pytest.mark.parametrize("label", [None, "", 0.5, ["x"]])
def test_a_label_is_nothing_else(load, label):
    assert "label: is" in reason(load({"text": "t", "label": label}))


def test_the_configs_system_prompt_is_for_rows_without_one(load):
    own = {"messages": [{"role": "system", "content": "own"}, Q, A]}
    found = load(own, {"messages": [Q, A]}, {"messages": [Q, A], "system": "column"}, system="config")
    assert [(e.messages[0].role, e.messages[0].content) for e in found] == [("system", x) for x in ("own", "config", "column")]
    assert "keep one" in reason(load(own | {"system": "other"}))


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "tool_calls": json.dumps([{"name": "f", "arguments": {"x": 1}}])},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "function_call", "value": '[{"name": "f", "arguments": {"x": 1}}]'},
    ],
)
def test_a_tool_call_in_every_dialect_is_one_call_with_a_dict(load, turn):
    result = {"from": "observation", "value": "1"} if "from" in turn else {"role": "tool", "content": "1"}
    example = one(load({"messages": [Q, turn, result], "functions": json.dumps([TOOL])}))
    assert example.messages[1:] == (Message("assistant", None, extra={"tool_calls": [CALL]}), Message("tool", "1"))
    assert example.tools == (TOOL,)


def test_what_a_template_may_know_is_passed_on(load):
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]
    found = one(load({"messages": [Q | {"name": "Ann"}, {"role": "assistant", "content": parts}]})).messages
    assert found == (Message("user", "q", extra={"name": "Ann"}), Message("assistant", "a", extra={"reasoning_content": "hm"}))


@pytest.mark.parametrize(
    ("key", "value", "loss"), [("loss", False, 0.0), ("loss", 0.5, 0.5), ("loss_weight", 1.0, 1.0), ("weight", 0, 0.0)]
)
def test_a_turn_may_weigh_its_own_loss(load, key, value, loss):
    assert one(load({"messages": [Q, A | {key: value}, A]})).messages[1] == Message("assistant", "a", loss)


@pytest.mark.parametrize("role", ["background", "narrator", "event", "observation"])
def test_any_role_can_be_mapped_or_passed_on(load, role):
    row = {"messages": [{"role": role, "content": "x"}, Q, A]}
    assert one(load(row, roles={role: role})).messages[0].role == role
    assert one(load(row, roles={role: "system"})).messages[0].role == "system"
    if role != "observation":  # which is what others call a tool's answer
        told = reason(load(row))
        assert "messages[0].role" in told and f"--config.data.roles.{role}=user" in told and f"roles.{role}={role}" in told


def test_a_turn_with_a_loss_of_its_own_answers_in_any_role(load):
    row = {"messages": [Q, {"role": "narrator", "content": "x", "loss": 1}]}
    assert one(load(row, roles={"narrator": "narrator"})).messages[1].loss == 1.0


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "q"}, "output: is missing or null"),
        ({"instruction": "q", "output": None}, "output: is missing or null"),
        ({"instruction": "q", "output": 5}, "output: is the number 5, must be text (put it in quotes)"),
        ({"instruction": "q", "output": ["a"]}, "output: is a list of 1, must be text"),
        ({"instruction": "q", "output": " \n"}, "output: is empty"),
        ({"instruction": "", "output": "a"}, "instruction: is empty"),
        ({"instruction": "q", "output": "a", "input": 1}, "input: is the number 1, must be text (put it in quotes)"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "history[0]: is a list of 1, must be a pair"),
        ({"instruction": "q", "output": "a", "history": "x"}, "history: holds text that is not JSON"),
        ({"instruction": "q", "output": "a", "image": "a.png"}, "image: holds image, audio or video input"),
        ([1], ": the row is a list of 1, must be an object"),
        (7, ": the row is the number 7, must be an object"),
    ],
)
def test_a_bad_alpaca_row_is_told_wherever_it_stands(load, row, told):
    good = {"instruction": "q", "output": "a"}
    first, bad, last = load(good, row, good)
    assert isinstance(first, Example) and isinstance(last, Example)
    assert bad.line == 2 and f"{bad.field}: {bad.reason}".startswith(told)


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([Q], "messages: has no assistant turn, so there is nothing to train on (roles: user)"),
        ([], "messages: is empty: it has no turns"),
        (None, "messages: is missing or null"),
        ("hi", "messages: holds text that is not JSON"),
        ({"a": 1}, "messages: is an object, must be a list"),
        ([None, A], "messages[0]: is null, must be an object"),
        ([{"content": "x"}, A], "messages[0]: has no role or from; its keys are content"),
        ([{"role": 1, "content": "x"}, A], "messages[0].role: is the number 1, must be text"),
        ([{"role": "user"}, A], "messages[0].content: is missing or null"),
        ([{"from": "human"}, A], "messages[0].value: is missing or null"),
        ([Q, A | {"content": ""}], "messages[1].content: is an empty answer"),
        ([Q, A | {"content": 3.5}], "messages[1].content: is the number 3.5, must be text"),
        ([Q, A | {"content": [{"type": "image", "image": "x"}]}], "messages[1].content[0]: holds image"),
        ([Q, A | {"content": [{"type": "hologram"}]}], "messages[1].content[0]: has the type 'hologram'"),
        ([Q, A | {"content": [None]}], "messages[1].content[0]: is null"),
        ([Q, A | {"loss": "no"}], "messages[1].loss: is the text 'no', must be true, false or a number"),
        ([Q, A | {"loss": -1}], "messages[1].loss: is the number -1"),
        ([Q, A | {"tool_calls": [None]}], "messages[1].tool_calls: is not a tool call"),
        (
            [Q, A | {"tool_calls": [{"name": "f", "arguments": "{x"}]}],
            "messages[1].tool_calls.arguments: holds text that is not JSON",
        ),
        ([Q, A | {"tool_calls": [{"name": "f", "arguments": [1]}]}], "messages[1].tool_calls.arguments: is a list of 1"),
    ],
)
def test_a_bad_turn_is_told_by_its_place(load, turns, told):
    first, bad = load({"messages": [Q, A]}, {"messages": turns})
    assert isinstance(first, Example)
    assert f"{bad.field}: {bad.reason}".startswith(told)


def test_an_empty_answer_that_is_not_trained_may_stand(load):
    assert one(load({"messages": [Q, A | {"content": "", "loss": False}, Q, A]})).messages[1].content == ""


def test_bad_tools_are_told(load):
    assert reason(load({"messages": [Q, A], "tools": [{"x": 1}]})).startswith("tools[0]: is not a tool")
    assert reason(load({"messages": [Q, A], "tools": "["})).startswith("tools: holds text that is not JSON")


ONE_OF_EACH = {
    "messages": {"messages": [Q, A]},
    "sharegpt": {"conversations": [Q, A]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "t"},
}


@pytest.mark.parametrize("pair", [*permutations(ONE_OF_EACH, 2)], ids="-".join)
def test_rows_of_two_formats_in_one_file_are_told_of_the_other(load, pair):
    alone, said = [ONE_OF_EACH[format] for format in pair], []
    columns = dict.fromkeys(alone[0] | alone[1])
    for rows in (alone, [columns | row for row in alone]):  # the second with the other's columns, null
        ((n, bad),) = [(n, found) for n, found in enumerate(load(*rows, say=said.append)) if isinstance(found, Rejected)]
        assert f"by its columns it is {pair[n]}, and the source is read as {pair[1 - n]}: give each" in bad.reason
    assert all(f"read as {pair[1 - n]}" in line for line in said)


@pytest.mark.parametrize(
    "row", [{"instruction": "", "output": "", "text": ""}, {"instruction": "q", "output": "", "text": "t"}, {"x": 1}, [1]]
)
def test_a_bad_row_of_the_sources_own_format_is_told_of_no_other(load, row):
    assert "by its columns" not in load({"instruction": "q", "output": "a", "text": "t"}, row)[1].reason


def test_columns_of_any_name_even_inside_others(load):
    row = {"task": {"ask": "q"}, "tries": [{"said": "a"}]}
    assert one(load(row, columns={"instruction": "task.ask", "output": "tries.0.said"})).messages == (USER, ANSWER)
    turns = {"dialog": [{"who": "user", "says": "q"}, {"who": "assistant", "says": "a"}]}
    assert one(load(turns, columns={"messages": "dialog", "role": "who", "content": "says"})).messages == (USER, ANSWER)
    (example,) = load(data="good film\t1\n", name="a.tsv", columns={"text": "0", "label": "1"})
    assert (example.label, example.line) == ("1", 1)


@pytest.mark.parametrize(
    ("row", "changes", "told"),
    [
        ({"id": 1, "turns": []}, {}, ("id, turns", "prompt, completion", "--config.data.columns.instruction=NAME")),
        ({"review": "r", "label": 1}, {}, ("to read it as label", "--config.data.columns.text=NAME")),
        ({"a": "b"}, {"format": "sharegpt"}, ("is not of the format sharegpt", "--config.data.columns.conversations=NAME")),
        ({"a": "b"}, {"columns": {"text": "c"}}, ("columns.text=c", "has no such column; it has a")),
        ({"a": "b"}, {"columns": {"txt": "a"}}, ("no format has a column txt; did you mean text?",)),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}, ("preferences (chosen, rejected)", "columns.completion=chosen")),
        ({"prompt": "q", "completion": "a", "label": False}, {}, ("KTO", "--config.data.format=prompt_completion")),
        ({"instruction": "q", "output": "a", "kto_tag": True}, {}, ("its kto_tag column", "--config.data.format=alpaca")),
        ({"text": "t", "label": 1}, {"label_prompt": "no place"}, ("label_prompt='no place': has no {text}",)),
    ],
)
def test_a_source_that_is_not_understood_is_answered_with_what_to_do(load, row, changes, told):
    with pytest.raises(UserError) as e:
        load(row, **changes)
    assert all(part in str(e.value) for part in told), str(e.value)


def test_what_was_refused_can_be_asked_for(load):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert one(load(pair, columns={"completion": "chosen"})).completion == ("q", "a")
    marked = {"prompt": "q", "completion": "a", "label": True}
    assert one(load(marked, format="prompt_completion")).completion == ("q", "a")


@pytest.mark.parametrize(
    ("plain", "more"),
    [
        ({"question": "q", "answer": "a"}, {"system_prompt": "s", "functions": [TOOL], "context": "i", "history": [["x", "y"]]}),
        ({"conversations": [Q, A]}, {"system": "s", "tools": json.dumps([TOOL]), "tags": ["t"]}),
        ({"messages": [Q, A], "id": 1}, {"tools": [TOOL], "tags": "t"}),
        ({"text": "x", "label": "y"}, {"system": "s", "tags": "t"}),
        ({"text": "x"}, {"tags": ["t", "u"]}),
    ],
)
def test_a_column_that_comes_late_is_read_as_one_that_was_there_from_the_first(load, plain, more):
    late, first = load(*[plain] * 120, plain | more)[-1], load(plain | more, plain)[0]
    assert isinstance(late, Example) and late != load(*[plain] * 121)[-1]
    assert replace(late, line=1) == first


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({"messages": [Q, A], "system": "s", "tools": [TOOL]}, {"messages": [Q, A], "system_prompt": "s", "functions": [TOOL]}),
        ({"messages": [Q, A], "system_prompt": "s"}, {"messages": [Q, A], "system": "s"}),
        ({"question": "q", "answer": "a"}, {"query": "q", "response": "a"}),
        ({"question": "q", "context": None, "answer": "a"}, {"input": "q", "answer": "a"}),
    ],
)
def test_a_row_with_another_usual_name_for_a_column_says_the_same(load, first, later):
    here, there = load(*[first] * 100, later)[-2:]
    assert isinstance(there, Example) and replace(there, line=here.line) == here


def test_a_row_with_two_names_for_one_column_is_refused_where_the_better_one_comes_late(load):
    *_, bad = load(*[{"input": "q", "output": "a"}] * 100, {"instruction": "Translate", "input": "q", "output": "a"})
    assert isinstance(bad, Rejected)
    assert (bad.field, bad.line, bad.reason.split(",")[0]) == ("instruction", 101, "stands beside input")
    given = {"instruction": "input", "output": "output"}  # the config knows better
    *_, good = load(*[{"input": "q", "output": "a"}] * 100, {"instruction": "x", "input": "q", "output": "a"}, columns=given)
    assert isinstance(good, Example)


def test_a_row_that_is_none_has_no_label(load):
    prompt = "{text} ({labels})"
    found = load(data="text,label\nx,1\ny,2,3\nz,2\n", name="a.csv", label_prompt=prompt)
    assert [isinstance(row, Rejected) for row in found] == [False, True, False]
    assert found[0].messages[0].content == "x (1, 2)"
    found = load(data='[{"text": "x", "label": "1"}, "bare"]', name="a.json", label_prompt=prompt)
    assert [isinstance(row, Rejected) for row in found] == [False, True]


def test_how_a_source_was_understood_is_said(load):
    said: list[str] = []
    load({"question": "q", "answer": "a"}, say=said.append)
    assert [line.split(": ", 1)[1] for line in said] == ["read as alpaca (question as instruction, answer as output)"]


def test_a_source_without_a_readable_row_is_all_rejected(load):
    assert [bad.line for bad in load(data="{x\n{y\n")] == [1, 2]


@pytest.mark.parametrize(("data", "told"), [("", "the file is empty"), ("text\n", "the file has a header line and no rows")])
def test_a_source_without_rows_is_refused_and_a_file_of_it_is_a_row_that_is_none(load, tmp_path, data, told):
    with pytest.raises(UserError, match=rf"a.csv: {told}; name one with rows"):
        load(data=data, name="a.csv")
    (tmp_path / "b.csv").write_text("text\nfine\n")
    empty, row = load(spec=str(tmp_path / "*.csv"))
    assert (empty.source, empty.reason, row.text) == (str(tmp_path / "a.csv"), told, "fine")


def test_sources_of_every_kind_of_spec(load, tmp_path):
    (tmp_path / "a.csv").write_text("review,label\nfine,1\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "plain"}))
    csv = {"path": str(tmp_path / "a.csv"), "columns": {"text": "review"}, "weight": 2}
    label, text = load(spec=(csv, {"path": str(tmp_path / "b.jsonl"), "format": "text"}))
    assert (label.label, label.source, text.text) == ("1", str(tmp_path / "a.csv"), "plain")
    assert [(s.path, s.weight) for s in sources(("x", [csv], None))] == [("x", 1.0), (str(tmp_path / "a.csv"), 2.0)]


def test_commas_part_sources_unless_a_file_is_called_so(tmp_path):
    one, other = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    for given in (f"{one},{other}", f"{one}, {other}", [Path(one), Path(other)]):
        assert [s.path for s in sources(given)] == [one, other]
    both = tmp_path / "a, b.jsonl"
    both.write_text("")
    assert [s.path for s in sources(str(both))] == [str(both)]


def test_rows_in_memory_are_told_how_to_become_a_file():
    class Dataset:
        """As that of datasets, by its name."""

    for given, call in (
        ([{"instruction": "a", "output": "b"}], "json.dumps"),
        (Dataset(), "dataset.to_json"),
        (iter([]), "json"),
    ):
        with pytest.raises(UserError, match=rf"rows in memory .* are not read; write them to a file, .*{call}"):
            sources(given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"path": "x", "wieght": 1}, "no such key 'wieght'; did you mean weight?"),
        ({"weight": 1}, "needs a path"),
        ({"path": "x", "weight": 0}, "weight 0 needs to be a number above 0"),
        ({"path": "x", "weight": float("nan")}, "weight nan needs to be a number above 0"),
        ({"path": "x", "format": "alpacca"}, "needs to be one of"),
        ({"path": "x", "columns": "text"}, "needs to be a dict"),
        (3, "needs a path"),
    ],
)
def test_a_bad_source_is_refused(given, told):
    with pytest.raises(UserError, match=told):
        sources((given,))


def test_the_error_shows_the_first_ten_and_the_total():
    fail_on([])
    with pytest.raises(UserError) as e:
        fail_on([Rejected("f.jsonl", line, "output", "is empty") for line in range(1, 13)])
    lines = str(e.value).splitlines()
    assert lines[0] == "12 rows cannot be used:" and lines[1] == "  f.jsonl:1: output: is empty"
    assert lines[10:12] == ["  f.jsonl:10: output: is empty", "  ... and 2 more"] and "on_bad_row=skip" in lines[12]


REAL = [
    ("llamafactory/alpaca_en_demo.json", {}, "alpaca", 999),
    ("llamafactory/alpaca_zh_demo.json", {}, "alpaca", 1000),
    ("llamafactory/identity.json", {}, "alpaca", 91),
    ("llamafactory/glaive_toolcall_en_demo.json", {}, "sharegpt", 300),
    ("llamafactory/glaive_toolcall_zh_demo.json", {}, "sharegpt", 300),
    ("llamafactory/reason_tool_use_demo_50.jsonl", {}, "messages", 50),
    ("llamafactory/v1_sft_demo.jsonl", {}, "messages", 500),
    ("llamafactory/kto_en_demo.json", {"format": "messages"}, "messages", 300),
    ("llamafactory/c4_demo.jsonl", {}, "text", 300),
    ("llamafactory/wiki_demo.txt", {}, "text", 30),
    ("llamafactory/ms-swift/alpaca.csv", {}, "alpaca", 3),
    ("llamafactory/ms-swift/conversations.jsonl", {}, "sharegpt", 3),
    ("llamafactory/ms-swift/swift_multi.jsonl", {}, "alpaca", 3),
    ("gsm8k/train.jsonl", {}, "alpaca", 7473),
    ("sharegpt/dummy_conversation.json", {}, "sharegpt", 500),
    (
        "stanford_alpaca_seed/seed_tasks.jsonl",
        {"columns": {"input": "instances.0.input", "output": "instances.0.output"}},
        "alpaca",
        175,
    ),
    ("derived/bfcl_openai_tools.jsonl", {}, "messages", 800),
    ("derived/hh_harmless_pairs.jsonl", {"columns": {"completion": "chosen"}}, "prompt_completion", 2303),
    ("text_classification/ChnSentiCorp_htl_all.csv", {"columns": {"text": "review"}}, "label", 7765),
    ("text_classification/SST2_train.tsv", {"columns": {"text": "0", "label": "1"}}, "label", 6920),
    ("text_classification/sms_spam.tsv", {"columns": {"text": "1", "label": "0"}}, "label", 5574),
    ("pretrain_text", {}, "text", 10441),
]


@pytest.mark.parametrize(("path", "changes", "format", "count"), REAL)
def test_real_files_are_read_whole(shared, load, path, changes, format, count):
    said: list[str] = []
    found = load(spec=(str(shared / "data" / path),), say=said.append, **changes)
    assert said[0].split(": read as ")[1].split()[0] == format
    assert sum(isinstance(row, Example) for row in found) == count


@pytest.mark.parametrize("name", ["mllm_demo.json", "mllm_audio_demo.json", "mllm_video_demo.json", "v1_multimodal_demo.jsonl"])
def test_real_multimodal_rows_are_refused_by_name(shared, load, name):
    found = load(spec=(str(shared / "data" / "llamafactory" / name),))
    assert found and all(isinstance(row, Rejected) and "only text is supported" in row.reason for row in found)


@pytest.mark.parametrize(
    "held, tags",
    [("sums", ("sums",)), (["a/b c", " d ", "a/b c", ""], ("a/b c", "d")), ([], ()), ("", ())],
)
def test_tags_come_with_rows_of_any_format(load, held, tags):
    for row in ({"messages": [Q, A]}, {"question": "q", "answer": "a"}, {"text": "t", "label": "l"}, {"text": "t"}):
        assert one(load(row | {"tags": held})).tags == tags
        assert one(load(row | {"kind": held, "tags": 3}, columns={"tags": "kind"})).tags == tags


@pytest.mark.parametrize("beside", [{"system": "Be terse."}, {"tools": [{"type": "function", "function": {"name": "f"}}]}])
def test_what_only_a_template_has_a_place_for_is_refused_beside_raw_text(load, beside):
    row = {"prompt": "q", "completion": "a"}
    told = reason(load(row | beside))
    assert told.startswith(f"{next(iter(beside))}: has no place beside a prompt of raw text; ")
    named = dict(option.split("=") for option in told.split("--config.data.columns.")[1:])
    (example,) = load(row | beside, columns={name: own.strip() for name, own in named.items()})
    assert [m.content for m in example.messages[-2:]] == ["q", "a"] and (example.tools or example.messages[0].role == "system")
    assert one(load(row | {"system": " ", "tools": "[]"})).completion == ("q", "a")


def test_the_configs_system_prompt_is_refused_beside_a_raw_prompt_and_told_to_have_no_place_in_plain_text(load):
    for row in ({"prompt": "q", "completion": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}):
        want = "pairs" if "chosen" in row else "answers"
        assert reason(load(row, want=want, system="s")).startswith("--config.data.system: has no place beside a prompt of raw")
    said: list[str] = []
    assert one(load({"text": "t"}, say=said.append, system="s")).text == "t"
    assert said[0].endswith("read as text; plain text has no place for data.system")


def test_tags_that_are_none_are_told(load):
    for other in (3, [{"id": 1}]):  # something else that is called so, unless one is told otherwise
        assert one(load({"text": "t", "tags": other})).tags == ()
    found = load({"text": "t", "tags": 3}, columns={"tags": "tags"})
    assert reason(found) == "tags: is the number 3, must be a text or a list of texts"
    found = load({"text": "t", "kind": [{}]}, columns={"tags": "kind"})
    assert reason(found) == "kind: is a list of 1, must be a text or a list of texts"
