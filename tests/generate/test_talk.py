"""`sftjax chat` as it is used through a pipe: answers on stdout, all else on stderr."""

import io
import shutil
from datetime import datetime
from types import SimpleNamespace

import pytest

from sftjax.generate import chat as module
from sftjax.generate.chat import run_chat
from sftjax.generate.engine import Engine
from sftjax.generate.open import open_engine
from sftjax.generate.text import Writer

NEW = 12


@pytest.fixture(scope="module")
def opened(toy):
    return open_engine(str(toy.base))


@pytest.fixture
def talk(toy, opened, monkeypatch, capsys):
    """(lines typed) -> stdout, stderr"""
    monkeypatch.setattr(module, "open_engine", lambda *_: opened)

    def run(*lines, **options):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        run_chat(str(toy.base), **{"max_new_tokens": NEW, **options})
        return capsys.readouterr()

    return run


def answer(opened, messages):
    engine, chat = opened
    return engine.generate([chat.prompt(messages)], max_new_tokens=NEW, tokenizer=chat.tokenizer)[0].text


def test_answers_go_on_from_the_conversation(talk, opened):
    hi, more = {"role": "user", "content": "hi"}, {"role": "user", "content": "and?"}
    first = answer(opened, [hi])
    second = answer(opened, [hi, {"role": "assistant", "content": first}, more])
    out, err = talk("hi", "", "and?", "/reset", "hi", "/quit", "never read")
    assert out == f"{first}\n{second}\n{first}\n"
    assert first and second and first != second
    assert f"cut off after {NEW} tokens" in err


def test_a_system_prompt_leads_and_can_be_changed(talk, opened):
    def with_system(text):
        return answer(opened, [{"role": "system", "content": text}, {"role": "user", "content": "hi"}])

    out, _ = talk("hi", "/system Be brief.", "hi", system="Be long.")
    assert out == f"{with_system('Be long.')}\n{with_system('Be brief.')}\n"


def test_ctrl_c_stops_the_answer_and_nothing_else(talk, monkeypatch, opened):
    whole = Engine.stream

    def interrupted(self, prompt, **options):
        for i, token in enumerate(whole(self, prompt, **options)):
            if i == 3:
                raise KeyboardInterrupt
            yield token

    full = answer(opened, [{"role": "user", "content": "hi"}])
    monkeypatch.setattr(Engine, "stream", interrupted)
    out, err = talk("hi", "/reset", "hi")
    first, again = out[: len(out) // 2], out[len(out) // 2 :]
    assert first == again and full.startswith(first.rstrip("\n\ufffd")) and len(first) < len(full)
    assert err.count("[stopped]") == 2


def test_a_thought_is_told_apart_and_forgotten(talk, opened, monkeypatch):
    tokenizer, asked = opened[1].tokenizer, []

    def thinking(self, prompt, **options):
        asked.append(tokenizer.decode(prompt))
        yield from tokenizer("<think>\nHm.\n</think>\n\nSeven.")["input_ids"]

    monkeypatch.setattr(Engine, "stream", thinking)
    out, err = talk("3+4?", "sure?", max_new_tokens=50)
    assert out == "Seven.\nSeven.\n" and err.count("Hm.\n\n") == 2 and "think" not in err + asked[1]
    out, err = talk("3+4?", "sure?", max_new_tokens=50, stop_strings=["m."])
    assert out == "\n\n" and "H" in err and "think" not in err + "".join(asked)


def test_a_turn_that_does_not_fit_is_forgotten_and_said(talk, opened):
    out, err = talk("x" * 200, "hi")
    assert out == answer(opened, [{"role": "user", "content": "hi"}]) + "\n"
    assert "the model takes 128; /reset" in err


def test_a_base_model_says_so_and_continues_text(toy, tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    shutil.copytree(toy.base, base)
    (base / "chat_template.jinja").unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO("once upon\n"))
    run_chat(str(base), max_new_tokens=NEW)
    out, err = capsys.readouterr()
    assert "has no chat template" in err
    engine, chat = open_engine(str(base))
    ids = chat.tokenise("once upon")[0]
    assert out == engine.generate([ids], max_new_tokens=NEW, tokenizer=chat.tokenizer)[0].text + "\n"


def test_other_ends_of_the_generation_config_stop_too(toy, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(toy.base, base)
    (base / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    engine, chat = open_engine(str(base))
    assert engine.stop_ids == {5, 7, *chat.stop_ids} and chat.stop_ids


def test_talk_is_of_the_day_itself(toy, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(toy.base, base)
    (base / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: datetime(2030, 2, 1)))
    assert open_engine(str(base))[1].render([]) == "2030"


def test_what_is_shown_is_never_taken_back(opened):
    tokenizer = opened[1].tokenizer
    text = "naïve 🙂 EN, then END of it"
    writer = Writer(tokenizer, ["END"])
    shown = ""
    for id in tokenizer(text)["input_ids"]:  # bytes: an unfinished character, and a stop string that only begins
        writer.add([id])
        assert writer.shown.startswith(shown)
        shown = writer.shown
        if writer.stopped:
            break
    assert shown == writer.text == text[: text.index("END")]
