"""A file of prompts puts the fields of a row to a model, and says which line of it is wrong."""

import json

import pytest

from sftjax.config import UserError
from sftjax.data.example import Example, Message, RowError
from sftjax.evaluate.prompts import Variant, ask, plain, read_variants

FILE = """
plain: {}
short: "Positive or negative? {text}"
careful:
  system: You label {what}.
  instruction: |
    One word.
    Nothing else.
  input: "Review: {text}"
  examples:
    - {text: soft, output: yes}
  labels: {1: yes, 0: no}
"""


def turns(*pairs):
    return tuple(Message(role, content) for role, content in pairs)


@pytest.fixture
def read(tmp_path):
    def write(text, name="prompts.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return read_variants(str(path))

    return write


def test_parts_become_turns(read):
    plain, short, careful = read(FILE)
    assert plain == Variant("plain") and short == Variant("short", input="Positive or negative? {text}")
    put = ask(careful, {"text": "a {what}", "what": "hotels"}, None, "1")
    system = ("system", "You label hotels.")
    shot = (("user", "One word.\nNothing else.\nReview: soft"), ("assistant", "yes"))
    assert put.messages == turns(system, *shot, ("user", "One word.\nNothing else.\nReview: a {what}"))  # one pass
    assert put.expected == "yes" and put.text is None


def test_yaml_and_json_say_the_same(read):
    held = {"a": {"system": "S", "input": "{x}", "labels": {"0": "no"}}, "b": "{x}"}
    yaml = 'a: {system: S, input: "{x}", labels: {0: no}}\nb: "{x}"\n'
    assert read(yaml) == read(json.dumps(held), "prompts.json")


def test_a_prompt_without_an_input_keeps_the_rows_own_question():
    own = Example("f", 1, messages=turns(("system", "old"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    rest = (("user", "a"), ("assistant", "b"))
    assert ask(Variant("v"), {}, own, "d").messages == own.messages[:-1]
    assert ask(Variant("v", system="new"), {}, own, "d").messages == turns(("system", "new"), *rest, ("user", "c"))
    put = ask(Variant("v", instruction="Briefly:"), {}, own, "d")
    assert put.messages == turns(("system", "old"), *rest, ("user", "Briefly:\nc"))
    assert ask(Variant("v", input="{x}"), {"x": "new"}, own, "d").messages == turns(("system", "old"), ("user", "new"))


def test_a_raw_prompt_stays_raw_until_something_is_put_to_it():
    raw = Example("f", 1, completion=("2 + 2 =", " 4"))
    assert (ask(Variant("v"), {}, raw, " 4").text, ask(Variant("v"), {}, raw, " 4").messages) == ("2 + 2 =", ())
    assert ask(Variant("v", system="S"), {}, raw, " 4").messages == turns(("system", "S"), ("user", "2 + 2 ="))


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"x": 3.0}, "3"),
        ({"x": None}, ""),
        ({}, ""),
        ({"x": ["a", 1]}, '["a", 1]'),
        ({"x": "{y}", "y": "no"}, "{y}"),
    ],
)
def test_fields_as_text(fields, text):
    assert ask(Variant("v", input="<{x}>"), fields, None, "1").messages[0].content == f"<{text}>"


def test_braces_that_are_no_field():
    put = ask(Variant("v", input='{"a": {n}} {{x}} {row.0.y}'), {"n": 1, "x": 2, "row": [{"y": "in"}]}, None, "1")
    assert put.messages[0].content == '{"a": 1} {x} in'


def test_an_answer_that_has_no_name_here_is_refused():
    with pytest.raises(RowError, match="'2' is not among the labels of the prompt v"):
        ask(Variant("v", input="a", labels={"1": "yes"}), {}, None, "2")


def test_a_model_without_a_template_reads_on():
    conversation = turns(("system", "S"), ("user", "1 + 1 ="), ("assistant", "2"), ("user", "2 + 2 ="))
    assert plain(conversation) == "S\n\n1 + 1 = 2\n\n2 + 2 ="


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "needs names of prompts"),
        ("- a\n", "needs names of prompts"),
        ("a: {zzz: x}\n", r"a\.zzz: no such part; there are system, instruction, input, examples, labels$"),
        ("a: {inptu: x}\n", r"a\.inptu: no such part; did you mean input"),
        ("a:\n  input: {text}\n", r"a\.input: \{text\} without quotes"),
        ("a: {text}\n", r"a: \{text\} without quotes"),
        ("a: {{text}}\n", ":1: is not YAML: braces without quotes"),
        ("a: x\nb: : y\n", ":2: is not YAML"),
        ("a: x\na: y\n", "a is there twice"),
        ("a: {system: ''}\n", r"a\.system: needs a text"),
        ("a: {labels: [x]}\n", r"a\.labels: needs the file's answers"),
        ("a: {examples: x}\n", r"a\.examples: needs a list"),
        ("a: {input: '{q}', examples: [{output: y}]}\n", r"a\.examples\[0\]: has no q; an example needs q, output"),
        ("a: {examples: [{input: y}]}\n", r"examples\[0\]: has no output; an example needs input, output"),
    ],
)
def test_a_file_that_is_wrong(read, text, sentence):
    with pytest.raises(UserError, match=sentence):
        read(text)


def test_json_that_is_wrong(read):
    with pytest.raises(UserError, match=r"prompts\.json:2: is not JSON"):
        read('{"a": "x",\n b}', "prompts.json")
    with pytest.raises(UserError, match="a is there twice"):
        read('{"a": "x", "a": "y"}', "prompts.json")
    with pytest.raises(UserError, match="No such file"):
        read_variants("/nowhere.yaml")
