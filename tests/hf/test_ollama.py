"""A Modelfile asks as the chat template does, to the character, and what it cannot is told or refused."""

import json
import re

import pytest
from data.tiny_chat import tokenizer

from sftjax.config import UserError
from sftjax.data.chat import Chat, adds_bos, load_tokenizer, prepare
from sftjax.hf.ollama import conversation, modelfile, put, rendered

CONTENTS = (
    ["Be brief.", "Hi!", "Hello.", "And?", "Then."],
    ["{{ .System }}", '"""\n!', "two\n\nlines", "{%", '"'],
    ["中文　。", "\\n", "{{", "x }}", "第一"],
)
# As models have them: a system prompt of its own, one within the first question, one before the last, none; and one full of what
# a Go template or a Modelfile does not take as it stands
DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<sys>Be good.</sys>' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
INSIDE = (
    "{% set s = messages[0].role == 'system' %}{% for m in (messages[1:] if s else messages) %}{% if m.role == 'user' %}"
    "{{ '<s>[INST] ' + ('<<SYS>>' + messages[0].content + '<</SYS>>' if s and loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
LATE = (
    "{{ bos_token }}{% set s = messages[0].role == 'system' %}{% for m in (messages[1:] if s else messages) %}"
    "{% if m.role == 'user' %}{{ '[INST]' + (messages[0].content + '\n\n' if s and loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
NONE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<' + m.role + '>\n' + m.content | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
ODD = DEFAULT.replace("Be good.", r"{{ x }}{{{ \"\"\"\n\u00a0\u3000\u200b#{%\U0001f600\t").replace("</s>'", "{'")
TEMPLATES = {"chatml": "chatml", "llama3": "llama3", "default": DEFAULT, "inside": INSIDE, "late": LATE, "none": NONE, "odd": ODD}


def commands(text):
    """(command, value) of a Modelfile, as Ollama's parser/parser.go reads it, which drops what does not print."""
    assert all(c.isprintable() or c in "\n\t" for c in text)
    found = re.findall(r'(?:^#[^\n]*\n)|^(PARAMETER \w+|[A-Z]+) (?:"""((?s:.*?))"""(?=\s*\n)|([^\n]*))\n', text, re.M)
    return [(name, quoted or plain) for name, quoted, plain in found if name]


def go(template, messages):
    """What Go's text/template writes, of the few actions that there are: to be read beside https://pkg.go.dev/text/template."""
    texts, actions = (re.split(r"\{\{(.*?)\}\}", template)[k::2] for k in (0, 1))
    assert all(re.fullmatch(r" [^{}]+ ", action) for action in actions) and not any("{{" in text for text in texts)
    actions = [action.strip() for action in actions]
    known = {"$.Messages": messages, "$.System": "\n\n".join(m["content"] for m in messages if m["role"] == "system")}

    def value(words):
        word = words.pop(0)
        if word == "(":
            name, args = words.pop(0), []
            while words[0] != ")":
                args.append(value(words))
            words.pop(0)
            calls = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "and": lambda *x: all(x), "len": len}
            return (calls | {"slice": lambda a, k: a[k:]})[name](*args)
        if word in known:
            return known[word]
        return json.loads(re.sub(r"\\U(\w{8})", lambda x: json.dumps(chr(int(x[1], 16)))[1:-1], word))

    def of(action):
        words = re.findall(r'"[^"]*"|[()]|[^\s()]+', action)
        return value(["(", *words, ")"] if words[0] in ("eq", "ne", "and") else words)

    def block(at, runs):
        """What the actions from `at` write up to the one that ends their block, and where that is."""
        out = texts[at] if runs else ""
        while at < len(actions) and not (action := actions[at]).startswith(("else", "end")):
            at, said = act(at, action, runs)
            out += said + (texts[at] if runs else "")
        return out, at

    def act(at, action, runs):
        if action.startswith("range"):
            out, end = "", at
            for i, m in enumerate(messages):
                known.update({"$i": i, ".Role": m["role"], ".Content": m["content"]})
                said, end = block(at + 1, runs)
                out += said
            return end + 1, out
        if action.startswith("if"):
            done, out = False, ""
            while not action.startswith("end"):
                holds = not done and (action == "else" or of(action.removeprefix("else ").removeprefix("if ")))
                said, at = block(at + 1, runs and bool(holds))
                done, out, action = done or bool(holds), out + said, actions[at]
            return at + 1, out
        name, assigned, rest = re.fullmatch(r"(?:(\$\w+) (:?=) )?(.*)", action).groups()
        if not assigned:
            return at + 1, of(rest) if runs else ""
        if runs:
            known[name] = of(rest)
        return at + 1, ""

    return block(0, True)[0]


def beginning():
    """The tokenizer, with a BOS that it puts before plain text."""
    from tokenizers.processors import TemplateProcessing

    out = tokenizer()
    out.add_special_tokens({"bos_token": "<s>"})
    out.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", out.bos_token_id)])
    assert adds_bos(out)
    return out


def asks_as(chat):
    """The Modelfile of `chat`, having looked that it asks as its template does."""
    made = modelfile(chat, stop_ids=chat.stop_ids, sampling={})
    template = dict(commands(made.text))["TEMPLATE"]
    for contents in CONTENTS:
        for rounds in (1, 2, 3):
            for system in {False, "a system prompt is left out" not in made.unlike}:
                asked = conversation(rounds, system, contents)
                prompt = made.bos * str(chat.tokenizer.bos_token) + go(template, asked)
                told = ("a BOS stands first" in made.unlike) * str(chat.tokenizer.bos_token)
                assert prompt == told + rendered(chat, asked), (rounds, system)
    return made


def test_a_template_is_as_one_would_write_it():
    chat, _ = prepare(tokenizer(), "chatml")
    turns = "".join(
        f'{{{{ {"else " * (role != "user")}if eq .Role "{role}" }}}}<|im_start|>{role}\n{{{{ .Content }}}}<|im_end|>\n'
        for role in ("user", "system", "assistant")
    )
    whole = "{{ range .Messages }}" + turns + "{{ end }}{{ end }}<|im_start|>assistant\n"
    assert dict(commands(modelfile(chat, stop_ids=(), sampling={}).text))["TEMPLATE"] == whole


def test_a_bos_that_the_tokenizer_does_not_add_is_written_by_the_template():
    given = tokenizer()
    given.add_special_tokens({"bos_token": "<s>"})
    made = asks_as(Chat(given, template=LATE))
    assert not made.bos and "<s>[INST]" in made.text.replace("{{ end }}", "")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("begins", [False, True])
def test_a_modelfile_asks_as_the_chat_template_does(name, begins):
    chat, _ = prepare(beginning() if begins else tokenizer(), TEMPLATES[name])
    made = asks_as(chat)
    assert made.bos == begins and ("a BOS stands first" in made.unlike) == (begins and name in ("default", "odd"))
    assert ("a system prompt is left out" in made.unlike) == (name == "none")


def test_real_templates_are_asked_as_they_are(shared):
    """Of the families here; mistral is one whose system prompt goes with the last question."""
    loaded = load_tokenizer(shared / "data" / "tokenizers" / "minimind_chatml")
    llama, small = ("Llama-3.1-8B-Instruct", "Llama-3.2", "SmolLM3"), ("gemma-2", "Phi-3.5", "granite", "Nemo-I", "gpt-oss")
    for family in ("Qwen2.5", "Qwen3-0.6B", *llama, *small):
        (file,) = (shared / "data" / "chat_templates" / "llama_cpp").glob(f"*{family}*.jinja")
        unlike = asks_as(Chat(loaded, template=str(file))).unlike
        assert ("earlier answers keep their thoughts" in unlike) == (family == "Qwen3-0.6B"), family


def test_what_no_go_template_writes_is_told_or_refused():
    def made(template):
        return modelfile(prepare(tokenizer(), template)[0], stop_ids=(), sampling={})

    assert made(DEFAULT).unlike == []
    assert made(DEFAULT.replace("m.content", "m.content.split('</think>')[-1]")).unlike == ["earlier answers keep their thoughts"]
    assert made(DEFAULT.replace("m.content", "m.content | trim")).unlike == ["messages keep the white space at their ends"]
    told = made("{{ tools | length if tools }}{{ strftime_now('%d %b %Y') }}" + DEFAULT)
    assert told.unlike == ["tools are left out", "the day stays 2024-07-26"] and "26 Jul 2024" in told.text
    assert "# Asks as the model's chat template does, except that tools are left out, the day" in told.text
    for odd, why in {
        DEFAULT.replace("m.content", "m.content.upper()"): "depends on what the messages say",
        DEFAULT.replace("'</s>'", "'</s>' ~ loop.index"): "between user and the answer varies",
        DEFAULT.replace("{% for m in messages %}", "{% for m in messages[-1:] %}"): "leaves messages out",
        "{{ raise_exception('tools only') }}": "refuses plain conversations",
    }.items():
        with pytest.raises(UserError, match=rf"--to=ollama: .*{why}.*; use --to=hf, and llama.cpp's llama-server"):
            made(odd)


def test_a_modelfile_says_how_an_answer_ends_and_is_drawn(tmp_path):
    chat, _ = prepare(tokenizer(), "chatml")
    drawn = {"do_sample": True, "temperature": 0.6, "top_k": 1000000, "top_p": 0.95, "repetition_penalty": 1.05, "min_p": None}
    made = modelfile(chat, stop_ids=[*chat.stop_ids, 10**6], sampling=drawn, system='Say "yes"\nor """no""" .')
    found = commands(made.text)
    assert found[0] == ("FROM", "./model.gguf") and found[2] == ("SYSTEM", 'Say "yes"\nor """no""" .')
    assert found[3:5] == [("PARAMETER stop", "<|im_end|>"), ("PARAMETER stop", "</s>")]
    assert [f"{name} {x}" for name, x in found[5:]] == [
        f"PARAMETER {each}" for each in ("temperature 0.6", "top_k 1000000", "top_p 0.95", "repeat_penalty 1.05")
    ]
    assert commands(modelfile(chat, stop_ids=(), sampling=drawn | {"do_sample": False}).text)[2:] == []
    for system in ('"""\nx', "a\u00a0b"):
        with pytest.raises(UserError, match="no Modelfile can hold"):
            modelfile(chat, stop_ids=(), sampling={}, system=system)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "add_bos_token": true}')
    put(made, tmp_path)
    assert (tmp_path / "Modelfile").read_text() == made.text
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": "</s>", "add_bos_token": False}


@pytest.mark.parametrize("begins", [False, True])
def test_a_model_without_a_template_is_asked_with_the_text_alone(begins):
    made = modelfile(Chat(beginning() if begins else tokenizer()), stop_ids=(), sampling={})
    assert commands(made.text)[1:] == [("TEMPLATE", "{{ .Prompt }}")] and made.bos == begins
