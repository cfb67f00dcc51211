"""`sftjax generate`: every row answered, in the file's order, or a plain reason why not."""

import json
import shutil

import pytest

import sftjax
from sftjax.config import UserError
from sftjax.generate.answer import run_generate
from sftjax.generate.engine import Engine, Generated
from sftjax.generate.open import open_engine


def test_rows_are_answered_in_order(toy, tmp_path):
    out = tmp_path / "answers.jsonl"
    data = tmp_path / "rows.jsonl"
    rows = [*toy.rows[:5], {"messages": [{"role": "user", "content": "short?"}]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_generate(str(toy.base), data=str(data), out=str(out), max_new_tokens=6, batch_size=2)
    engine, chat = open_engine(str(toy.base))
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(written) == len(rows)
    for row, line in zip(rows, written):
        asked = row["messages"][:1]
        alone = engine.generate([chat.prompt(asked)], max_new_tokens=6, tokenizer=chat.tokenizer)[0]
        expected = row["messages"][1]["content"] if len(row["messages"]) > 1 else None
        assert line == {"messages": asked, "answer": alone.text, "expected": expected, "stopped": alone.stopped}


def test_a_thought_is_kept_beside_the_answer(toy, tmp_path, monkeypatch):
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in toy.rows[:2]))
    monkeypatch.setattr(Engine, "each", thinks_first)
    run_generate(str(toy.base), data=str(data), out=str(out), max_new_tokens=6)
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert (first["answer"], first["raw"]) == ("ham", "<think>\n\n</think>\n\nham") and second["answer"] == "ham"
    assert "raw" not in second
    assert sftjax.answer(sftjax.load(toy.base), ["a?", "b?"]) == ["ham", "ham"]


def thinks_first(self, prompts, *, tokenizer=None, **_):
    """Engine.each of a model whose first answer has a thought before it."""
    texts = ["<think>\n\n</think>\n\nham", *["ham"] * (len(prompts) - 1)]
    if tokenizer:
        return ((i, Generated(tokenizer(text)["input_ids"], True, text)) for i, text in enumerate(texts))


def test_an_existing_file_is_not_written_over(toy, tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text("mine")
    with pytest.raises(UserError, match="--force"):
        run_generate(str(toy.base), data=str(toy.data), out=str(out), max_new_tokens=2)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"draft_tokens": 99}, {"top_p": 2.0, "temperature": 1.0}, {"batch_size": 0}])
def test_a_wrong_option_loses_no_earlier_answers(toy, tmp_path, wrong):
    out = tmp_path / "answers.jsonl"
    out.write_text("mine")
    with pytest.raises(UserError, match=next(iter(wrong))):
        run_generate(str(toy.base), data=str(toy.data), out=str(out), force=True, max_new_tokens=2, **wrong)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("at", [1, 5, 71])
def test_killed_and_run_again_is_uninterrupted(toy, tmp_path, monkeypatch, capsys, at):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    options = {"data": str(toy.data), "max_new_tokens": 4, "temperature": 1.0, "seed": 3, "batch_size": 8}
    run_generate(str(toy.base), out=str(whole), **options)
    each, asked = Engine.each, []

    def cut(*args, done=None, **more):
        answers = each(*args, done=done or (), **more)
        for n, answer in enumerate(answers):
            if done is not None and n == at:
                raise KeyboardInterrupt
            yield answer

    def counted(*args, done=None, **more):
        for answer in each(*args, done=done or (), **more):
            asked.append(answer)
            yield answer

    monkeypatch.setattr(Engine, "each", cut)
    with pytest.raises(KeyboardInterrupt):
        run_generate(str(toy.base), out=str(out), **options)
    rest = [path.name for path in tmp_path.iterdir() if path != whole]
    assert rest == [".answers.jsonl.kept"] and f"{at} of 72 answers are kept" in " ".join(capsys.readouterr().err.split())
    with (tmp_path / rest[0]).open("ab") as file:
        file.write(b'{"row": 70, "li')  # as a kill leaves it
    monkeypatch.setattr(Engine, "each", counted)
    run_generate(str(toy.base), out=str(out), **options | {"batch_size": 3})
    assert out.read_bytes() == whole.read_bytes() and len(asked) == 72 - at
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "answers.jsonl"}


def test_what_was_kept_of_another_question_is_not_used(toy, tmp_path, monkeypatch):
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    each = Engine.each

    def cut(*args, done=None, **more):
        answers = each(*args, done=done or (), **more)
        yield from answers if done is None else [next(answers)]
        raise KeyboardInterrupt

    first = {"max_new_tokens": 20, "seed": 1, "temperature": 2.0}
    for rows, options in [
        ('{"prompt": "six"}\n{"prompt": "two"}\n', first),
        (None, first | {"seed": 2}),
        (None, first | {"max_new_tokens": 6}),
        (None, first | {"quantize": "nf4"}),
    ]:
        monkeypatch.setattr(Engine, "each", cut)
        with pytest.raises(KeyboardInterrupt):
            run_generate(str(toy.base), data=str(data), out=str(out), **first)
        monkeypatch.setattr(Engine, "each", each)
        kept = json.loads((tmp_path / ".answers.jsonl.kept").read_text().splitlines()[0])
        if rows:
            data.write_text(rows)
        run_generate(str(toy.base), data=str(data), out=str(out), **options)
        other = tmp_path / "other.jsonl"
        run_generate(str(toy.base), data=str(data), out=str(other), **options)
        assert out.read_bytes() == other.read_bytes() and kept
        out.unlink(), other.unlink()


def test_rows_that_cannot_be_asked_are_named_before_anything_is_written(toy, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    row = {"prompt": "x" * 300, "completion": "y"}
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*300 tokens; the model takes 1 to 127"):
        run_generate(str(toy.base), data=str(data), out=str(out), max_new_tokens=2)
    assert not out.exists()


def test_raw_prompts_are_continued(toy, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text(json.dumps({"prompt": "2 + 2 =", "completion": " 4"}) + "\n")
    run_generate(str(toy.base), data=str(data), out=str(out), max_new_tokens=3)
    line = json.loads(out.read_text())
    assert (line["prompt"], line["expected"]) == ("2 + 2 =", " 4") and isinstance(line["answer"], str)


def test_rows_that_only_ask_are_answered_beside_those_with_an_answer(toy, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    user = {"role": "user", "content": "why?\nhere"}
    rows = [
        {"question": "why?", "input": "here", "system": "Be brief."},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]},
        {"prompt": [user]},
        {"instruction": "why?", "input": "here", "output": "because"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_generate(str(toy.base), data=str(data), out=str(out), max_new_tokens=2)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    system = {"role": "system", "content": "Be brief."}
    assert [line["messages"] for line in written] == [[system, user], turns, [user], [user]]
    assert [line["expected"] for line in written] == [None, None, None, "because"]


def test_a_base_model_continues_questions_and_refuses_conversations(toy, tmp_path):
    base, data, out = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    shutil.copytree(toy.base, base)
    (base / "chat_template.jinja").unlink()
    data.write_text(json.dumps({"prompt": "once"}) + "\n")
    run_generate(str(base), data=str(data), out=str(out), max_new_tokens=2)
    assert json.loads(out.read_text())["prompt"] == "once"
    data.write_text(json.dumps({"prompt": "once", "system": "Be terse."}) + "\n")
    with pytest.raises(UserError, match="system: has no place in raw text"):
        run_generate(str(base), data=str(data), out=str(tmp_path / "other.jsonl"), max_new_tokens=2)
    with pytest.raises(UserError, match="has no chat template"):
        run_generate(str(base), data=str(toy.data), out=str(tmp_path / "other.jsonl"), max_new_tokens=2)
