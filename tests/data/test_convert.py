"""What is converted reads as what it was made of: content, loss weights, tools, tags, whatever the format."""

import json
from dataclasses import replace

import pytest
from tiny_chat import write

from sftjax.config import UserError, default
from sftjax.data.convert import convert
from sftjax.data.example import Example
from sftjax.data.formats import read_examples

Q, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM, CALLED = {"role": "system", "content": "s"}, {"from": "function_call", "value": '{"name": "f", "arguments": "{}"}'}
TOOL = {"name": "f", "description": "d", "parameters": {}}
THOUGHT = {"role": "assistant", "content": [{"type": "thinking", "text": "hm"}, {"type": "text", "text": "é "}]}
EMPTY = A | {"content": "", "loss": False}
UNTRAINED = {"loss": 0}
REPLIES = [{"text": t, "role": "assistant", "rank": r, "replies": []} for r, t in enumerate("ab")]
LEAF = {"text": "u", "role": "prompter", "replies": REPLIES}
TREE = LEAF | {"replies": [REPLIES[0] | {"replies": [LEAF]}, REPLIES[1]]}

CASES = [  # the format it becomes, what is wanted, rows, changes to config.data
    ("messages", "any", [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b", "tags": ["x/y"]}], {}),
    ("messages", "any", [{"instruction": "q", "input": "in", "output": "a", "history": [["h", "i"]], "system": "s"}], {}),
    ("messages", "any", [{"instruction": "q", "output": "a"}], {"system": "config's"}),
    ("messages", "any", [{"i": "q", "o": {"a": ["x", "y"]}}], {"columns": {"instruction": "i", "output": "o.a.1"}}),
    ("messages", "any", [{"conversations": [Q, CALLED, Q | {"from": "observation"}, A], "tools": json.dumps([TOOL])}], {}),
    ("messages", "any", [{"messages": [SYSTEM, Q | {"loss": 1}, EMPTY, Q | {"name": "Ann"}, A | {"weight": 0.5}, THOUGHT]}], {}),
    ("messages", "any", [{"messages": [SYSTEM | {"role": "x"}, Q, A]}], {"roles": {"x": "system", "user": "user"}}),
    ("messages", "any", [{"messages": [Q, A], "label": True}], {"format": "messages"}),
    ("messages", "prompts", [{"question": "q", "answer": "5"}, {"question": "q", "answer": 5}], {}),
    ("prompt_completion", "any", [{"prompt": "q ", "completion": "a"}, {"prompt": [Q, A, Q], "completion": "a"}], {}),
    ("prompt_completion", "any", [{"prompt": [Q, A | {"loss": 0.5}], "completion": [A | {"loss": 2}, Q, B]}], {"system": "s"}),
    ("prompt_completion", "any", [{"prompt": [SYSTEM, Q], "completion": [A | {"loss": 1}, Q | UNTRAINED], "tools": [TOOL]}], {}),
    ("prompt_completion", "any", [{"prompt": [Q], "completion": "a", "system": "s"}], {}),
    ("prompt_completion", "prompts", [{"prompt": "q", "completion": None, "more": [1]}], {}),
    ("label", "any", [{"text": "t", "label": 1, "system": "s"}, {"text": "{text}", "label": "x"}], {"label_prompt": "{text}?"}),
    ("label", "classes", [{"text": "t", "label": True}], {}),
    ("text", "any", [{"text": " a\n"}], {}),
    ("prompt", "any", [{"prompt": "q", "truth": None, "id": 3, "tags": "x"}, {"prompt": "r", "tools": [TOOL]}], {}),
    ("pair", "any", [{"prompt": "q ", "chosen": "a", "rejected": ""}], {}),
    ("pair", "any", [{"chosen": [SYSTEM, Q, A], "rejected": [SYSTEM, Q, B, Q, A | {"loss": 0}], "tools": [TOOL]}], {}),
    ("pair", "any", [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b", "tags": "t"}], {}),
    ("pair", "labels", [{"instruction": "q", "input": "in", "system": "s", "chosen": "a", "rejected": "a"}], {}),
    ("ranking", "any", [{"messages": [Q], "answers": ["a", [B], "c"], "scores": [1, 3, 1]}], {}),
    ("ranking", "rankings", [{"prompt": "q", "answers": ["a", "b"]}], {}),
    ("ranking", "any", [{"message_tree_id": "t", "prompt": TREE}], {}),
    ("unpaired", "any", [{"prompt": "q", "completion": "a", "label": False}, {"prompt": [Q], "completion": A, "label": 1}], {}),
    ("unpaired", "any", [{"messages": [Q, A, Q, B], "kto_tag": True}], {}),
    ("unpaired", "labels", [{"instruction": "q", "output": "a", "label": 1}], {}),
]  # fmt: skip


def read(path, data, want):
    found = list(read_examples(str(path), data, want=want))
    assert found and all(isinstance(example, Example) for example in found), found
    return found


def said(example):
    """All but its place; its tags are not its other columns' affair."""
    columns = example.columns and {name: held for name, held in example.columns.items() if name != "tags"}
    return replace(example, source="", line=0, columns=columns)


def with_data(**changes):
    config = default()
    with config.data.unlocked(), config.data.ignore_type():
        config.data.update(changes)
    return config


@pytest.mark.parametrize(("format", "want", "rows", "changes"), CASES)
def test_what_is_converted_reads_as_what_it_was(tmp_path, format, want, rows, changes):
    config, out = with_data(**changes), tmp_path / "out.jsonl"
    done = convert(write(tmp_path / "in.jsonl", rows), str(out), config, want=want, say=lambda _: None)
    plain = with_data(**(changes | {"label_prompt": "{text}"}))
    held = read(tmp_path / "in.jsonl", plain.data, want)
    assert [said(e) for e in read(out, default().data, want)] == [said(e) for e in held]
    told = {"format": format, "rows": len(held), "written": len(held), "bad": 0, "needs": []}
    assert done == told and all(set(NAMES[format]) <= {*json.loads(line)} for line in out.read_text().splitlines())


NAMES = {"ranking": ("prompt", "answers", "ranks"), "pair": ("prompt", "chosen", "rejected"), "text": ("text",)}
NAMES |= {"messages": ("messages",), "prompt": ("prompt",), "label": ("text", "label")}
NAMES |= {"prompt_completion": ("prompt", "completion"), "unpaired": ("prompt", "completion", "label")}

REAL = [
    ("llamafactory/identity.json", {}),
    ("llamafactory/glaive_toolcall_zh_demo.json", {}),
    ("llamafactory/reason_tool_use_demo_50.jsonl", {}),
    ("llamafactory/v1_dpo_demo.jsonl", {}),
    ("llamafactory/kto_en_demo.json", {}),
    ("llamafactory/wiki_demo.txt", {}),
    ("oasst_trees/en_100_tree.jsonl", {}),
    ("text_classification/SST2_dev.tsv", {"columns": {"text": "0", "label": "1"}}),
    ("stanford_alpaca_seed/seed_tasks.jsonl", {"columns": {"input": "instances.0.input", "output": "instances.0.output"}}),
]


@pytest.mark.parametrize(("path", "changes"), REAL)
def test_real_files_convert_to_what_they_were(shared, tmp_path, path, changes):
    file, config = str(shared / "data" / path), with_data(**changes)
    convert(file, str(tmp_path / "out.jsonl"), config, say=lambda _: None)
    again = read(tmp_path / "out.jsonl", default().data, "any")
    assert [said(e) for e in again] == [said(e) for e in read(file, config.data, "any")]


def test_a_column_that_comes_late_is_in_every_row(tmp_path):
    rows = [{"conversations": [Q, A], "tools": "[]"}] * 150 + [{"conversations": [Q, A], "tools": [TOOL]}]
    convert(write(tmp_path / "in.jsonl", rows), str(tmp_path / "out.jsonl"), say=lambda _: None)
    assert read(tmp_path / "out.jsonl", default().data, "any")[150].tools


@pytest.mark.parametrize(
    ("row", "changes", "needs"),
    [
        ({"messages": [Q | {"role": "narrator"}, A]}, {"roles": {"narrator": "narrator"}}, ["data.roles.narrator=narrator"]),
        ({"question": "q", "answer": "a"}, {"format": "prompt"}, ["data.format=prompt"]),
    ],
)
def test_what_reading_it_needs_is_told(tmp_path, row, changes, needs):
    config, out = with_data(**changes), str(tmp_path / "out.jsonl")
    done = convert(write(tmp_path / "in.jsonl", [row]), out, config, say=lambda _: None)
    assert done["needs"] == needs
    assert said(read(out, config.data, "any")[0]) == said(read(tmp_path / "in.jsonl", config.data, "any")[0])


def test_what_cannot_be_said_in_the_format_is_a_bad_row_and_out_is_whole_or_not_there(tmp_path):
    rows = [{"instruction": "q", "output": "a", "history": [["h", x]]} for x in ("i", "")] + [{"instruction": "q"}]
    given = write(tmp_path / "in.jsonl", rows), str(tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"2 rows cannot be used:(.|\n)*in.jsonl:2: messages.1..content: is an empty answer"):
        convert(*given, say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    done = convert(*given, with_data(on_bad_row="skip"), say=lambda _: None)
    assert (done["rows"], done["written"], done["bad"]) == (3, 1, 2)
    for out, told in (("out.jsonl", "exists already"), ("out.csv", "name it .jsonl")):
        with pytest.raises(UserError, match=told):
            convert(given[0], str(tmp_path / out))


def test_a_file_is_of_one_format(tmp_path):
    one, other = (write(tmp_path / name, [row]) for name, row in (("1.jsonl", {"text": "t"}), ("2.jsonl", {"messages": [Q, A]})))
    with pytest.raises(UserError, match=r"1.jsonl becomes text and .*2.jsonl messages, and a file holds rows of one format"):
        convert((one, other), str(tmp_path / "out.jsonl"))
    alpaca = write(tmp_path / "3.jsonl", [{"question": "q", "answer": "a"}])
    convert((other, alpaca), str(tmp_path / "out.jsonl"), say=lambda _: None)
    assert len(read(tmp_path / "out.jsonl", default().data, "answers")) == 2
