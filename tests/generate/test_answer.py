"""`sftjax generate`: every row answered, in the file's order, or a plain reason why not."""

import json
import shutil

import pytest

from sftjax.config import UserError
from sftjax.generate.answer import run_generate
from sftjax.generate.engine import Engine
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


def test_answers_that_end_early_leave_no_file(toy, tmp_path, monkeypatch):
    out = tmp_path / "answers.jsonl"
    each = Engine.each

    def cut(*args, **options):
        yield next(each(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "each", cut)
    with pytest.raises(KeyboardInterrupt):
        run_generate(str(toy.base), data=str(toy.data), out=str(out), max_new_tokens=2)
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(UserError, match="has no chat template"):
        run_generate(str(base), data=str(toy.data), out=str(tmp_path / "other.jsonl"), max_new_tokens=2)
