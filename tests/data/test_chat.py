"""What is trained is exactly what the model has to write, whatever the template does."""

import itertools
import json
import pickle
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sftjax.config import UserError
from sftjax.data.chat import DAY, Chat, covered, load_tokenizer, prepare, without_thought
from sftjax.data.example import Example, Message, RowError
from sftjax.data.spans import TAG, alternatives
from sftjax.generate.thought import Parts

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_end|>"]
QA = (("user", "Two and two?"), ("assistant", "Four."), ("user", "And three?"), ("assistant", "Seven."))
TOOLS = (
    {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}},
)


def tokenizer(special=SPECIAL, **kwargs):
    """One token a byte, but for a few merges, so that tokens straddle what they may straddle."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), (".", "Ċ"), ("Ġ", "F")]
    vocab = {t: i for i, t in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", **kwargs)
    out.add_tokens(special, special_tokens=True)
    return out


def conversation(*turns, tools=None):
    messages = tuple(t if isinstance(t, Message) else Message(*t) for t in turns)
    return Example("rows.jsonl", 7, messages=messages, tools=tools)


def trained(chat, example):
    """The texts of the runs of trained tokens."""
    ids, weights = chat.encode(example)
    runs, last = [], 0.0
    for token, weight in zip(ids.tolist(), weights.tolist()):
        if weight and weight == last:
            runs[-1].append(token)
        elif weight:
            runs.append([token])
        last = weight
    return [chat.tokenizer.decode(run) for run in runs]


LOOP = "{% for m in messages %}"
PLAIN = LOOP + "<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = {
    "plain": (PLAIN, ["Four.<|end|>", "Seven.<|end|>"]),
    "trims": (PLAIN.replace("m.content", "m.content | trim"), ["Four.<|end|>", "Seven.<|end|>"]),
    "writes BOS, a date and a default system prompt": (
        "{{ bos_token }}Today is {{ strftime_now('%d') }}. Be kind.\n" + PLAIN,
        ["Four.<|end|>", "Seven.<|end|>"],
    ),
    "ends the text with another EOS": (
        PLAIN.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"),
        ["Four.<|end|>", "Seven.<|end|>"],
    ),
    "moves all questions to the front": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }} {% endfor %}"
        "{% for m in messages if m.role != 'user' %}<|assistant|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["Four.<|end|>", "Seven.<|end|>"],
    ),
    "has no generation prompt, so the model writes the header": (
        LOOP + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}",
        ["<|assistant|>Four.<|end|>", "<|assistant|>Seven.<|end|>"],
    ),
    "writes a thought into the last answer": (
        LOOP + "<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["Four.<|end|>", "<think>\n\n</think>\n\nSeven.<|end|>"],
    ),
    "starts the thought in its prompt": (
        LOOP + "<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>ok</think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
        ["ok</think>Four.<|end|>", "ok</think>Seven.<|end|>"],
    ),
    "says what is generated": (
        LOOP + "<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["Four.<|end|>", "Seven.<|end|>"],
    ),
    "looks at what the user wrote": (
        PLAIN.replace("m.content", "'2+2' if m.content == 'Two and two?' else m.content"),
        ["Four.<|end|>", "Seven.<|end|>"],
    ),
    "puts a space before and after": (
        LOOP
        + "{% if m.role == 'user' %}<|user|> {{ m.content }} <|assistant|>{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        [" Four. </s>", " Seven. </s>"],
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_trained_text_is_the_answers_and_their_terminators(name):
    template, expected = TEMPLATES[name]
    chat = Chat(tokenizer(), template=template)
    example = conversation(*QA)
    assert trained(chat, example) == expected
    assert chat.tokenizer.decode(chat.encode(example).ids) == chat.render(example.messages)
    assert chat.check(chat.encode(example), example) is None


@pytest.mark.parametrize("template", ["chatml", "llama3", PLAIN, TEMPLATES["starts the thought in its prompt"][0]])
@pytest.mark.parametrize("turns", [QA, QA[:2], [("system", "Be terse."), *QA]])
def test_the_first_trained_token_follows_the_prompt(template, turns):
    chat, _ = prepare(tokenizer(), template)
    ids, weights = chat.encode(conversation(*turns))
    prompt = chat.prompt(conversation(*turns[:-1]).messages)
    assert ids[: len(prompt)].tolist() == prompt
    assert weights[len(prompt) - 1] == 0 and weights[len(prompt) :].any()
    assert weights[len(prompt)] == 1


def test_white_space_around_content_is_trained_where_the_template_keeps_it():
    padded = conversation(("user", " hi \n"), ("assistant", " Four \n\n"))
    assert trained(Chat(tokenizer(), template=PLAIN), padded) == [" Four \n\n<|end|>"]
    trims = Chat(tokenizer(), template=TEMPLATES["trims"][0])
    assert trained(trims, padded) == ["Four<|end|>"]


STRIPS = (
    LOOP + "<|{{ m.role }}|>{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_content_is_trained_to_its_edges_where_the_template_gives_no_other():
    prompts_otherwise = PLAIN.replace("%}<|assistant|>{%", "%}<|assistant|><think>{%")
    assert trained(Chat(tokenizer(), template=prompts_otherwise), conversation(QA[0], ("assistant", "  Four"))) == [
        "  Four<|end|>"
    ]
    open_ended = LOOP + "{{ m.content }}\n{% endfor %}"
    tagged = conversation(QA[0], ("assistant", "<b>Four</b> <i>!</i>"))
    assert trained(Chat(tokenizer(), template=open_ended), tagged) == ["<b>Four</b> <i>!</i>"]


def test_reasoning_is_trained_only_where_the_template_keeps_it():
    thought = "<think>\nhm\n</think>\n\n"
    example = conversation(QA[0], ("assistant", thought + "Four."), QA[2], ("assistant", thought + "Seven."))
    assert trained(Chat(tokenizer(), template=STRIPS), example) == ["Four.<|end|>", thought + "Seven.<|end|>"]


def test_loss_on_and_a_messages_own_weight():
    def weights(loss_on, *losses):
        chat = Chat(tokenizer(), template=PLAIN, loss_on=loss_on)
        messages = [Message(*turn, loss=loss) for turn, loss in zip(QA, losses or [None] * 4)]
        ids, weights = chat.encode(conversation(*messages))
        return {float(w): chat.tokenizer.decode(ids[weights == w]) for w in np.unique(weights)}

    assert weights("answers")[1.0] == "Four.<|end|>Seven.<|end|>"
    assert weights("last_answer")[1.0] == "Seven.<|end|>"
    assert weights("all")[0.0] == "<|user|>"  # the row's first token only
    half = weights("answers", None, 0.5, None, None)
    assert half[0.5] == "Four.<|end|>" and half[1.0] == "Seven.<|end|>"
    assert weights("answers", None, False, None, None)[1.0] == "Seven.<|end|>"
    assert weights("last_answer", None, 0.25, None, None)[0.25] == "Four.<|end|>"
    assert weights("answers", None, None, 2.0, False)[2.0] == "And three?<|end|>"
    assert weights("all", None, False, None, None)[0.0] == "<|user|>Four.<|end|>"


def test_a_messages_own_weight_under_generation_markers():
    chat, _ = prepare(tokenizer(), "chatml")
    messages = [Message(*turn, loss=loss) for turn, loss in zip(QA, (None, 0.5, 0.25, None))]
    ids, weights = chat.encode(conversation(*messages))
    for weight, text in ((0.5, "Four.<|im_end|>"), (0.25, "And three?<|im_end|>"), (1.0, "Seven.<|im_end|>")):
        assert chat.tokenizer.decode(ids[weights == weight]) == text
    messages = [Message(*turn, loss=loss) for turn, loss in zip(QA, (None, 0.5, None, None))]
    assert trained(chat, conversation(*messages)) == ["Four.<|im_end|>", "Seven.<|im_end|>"]
    assert sorted(set(chat.encode(conversation(*messages)).weights.tolist())) == [0.0, 0.5, 1.0]


def test_tool_calls_are_part_of_the_answer():
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "the moon", "times": 3}}}
    example = conversation(
        ("user", "Look."), Message("assistant", None, extra={"tool_calls": [call]}), ("tool", "bright"), QA[1], tools=TOOLS
    )
    written = '<tool_call>{"name": "look", "arguments": {"at": "the moon", "times": 3}}</tool_call>'
    chat, _ = prepare(tokenizer(), "chatml")
    assert trained(chat, example) == [written + "<|im_end|>", "Four.<|im_end|>"]
    unmarked = chat.template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert trained(Chat(chat.tokenizer, template=unmarked), example) == [written + "<|im_end|>", "Four.<|im_end|>"]
    with pytest.raises(RowError, match=r"messages\[1\].*leaves it out"):
        Chat(tokenizer(), template=PLAIN.replace("m.content", "m.content or ''")).encode(example)


def test_what_cannot_be_exact_is_refused():
    def refuses(template, example, match):
        with pytest.raises(RowError, match=match) as e:
            Chat(tokenizer(), template=template).encode(example)
        assert e.value.__cause__ is None

    refuses(PLAIN.replace("m.content", "m.content | upper | replace('F', m.content | length)"), conversation(*QA), "rewrites")
    refuses(PLAIN.replace("m.content", "m.content if loop.last else ''"), conversation(*QA), r"messages\[1\]: .* leaves it out")
    refuses(PLAIN.replace("m.content", "m.content + m.content"), conversation(*QA), "twice")
    refuses("{{ raise_exception('no system role') }}", conversation(*QA), "no system role")
    refuses("{{ messages[0].content.nothing.here }}", conversation(*QA), "no attribute")
    refuses(PLAIN, conversation(("user", "hi\U00100007"), QA[1]), "plane 16")
    refuses(PLAIN, conversation(), "empty")
    known = "{% for m in messages if m.role in ['user', 'assistant'] %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    refuses(known, conversation(("narrator", "Night fell."), *QA), r"messages\[0\].role: .*data.roles.narrator")


def test_a_row_that_would_not_teach_to_stop_is_told():
    def reason(template, *turns):
        chat, example = Chat(tokenizer(), template=template), conversation(*turns)
        return chat.check(chat.encode(example), example)

    assert reason(PLAIN, *QA) is None
    assert reason(PLAIN, QA[0]) == "rows.jsonl:7: no token of this row is trained"
    open_ended = LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    assert reason(open_ended, *QA[:2]).startswith(
        "rows.jsonl:7: the last trained token is '.\\n', not one that ends a turn (</s>)"
    )
    answer = (
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    )
    outside = LOOP + answer + "<|end|>{% endfor %}"
    assert "not one that ends a turn (<|end|>" in reason(outside, *QA)


def test_stop_ids_are_the_terminator_and_eos():
    chat, new = prepare(tokenizer(), None)
    assert new == ["<|im_start|>"]
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)) == ["<|im_end|>", "</s>"]
    assert chat.tokenizer.chat_template == chat.template and prepare(chat.tokenizer)[1] == []
    chat, new = prepare(tokenizer(), "llama3")
    assert new == ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)) == ["<|eot_id|>", "</s>"]


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_built_in_templates_write_any_role_and_keep_the_bos(name):
    plain, _ = prepare(tokenizer(), name)
    text = plain.render([Message("background", "A castle."), Message("observation", [{"type": "text", "text": "Rain."}])])
    assert "background" in text and "A castle." in text and "observation" in text and "Rain." in text
    with_bos = tokenizer(add_bos_token=True)
    with_bos.update_post_processor()
    assert with_bos("a")["input_ids"][0] == with_bos.bos_token_id
    chat, _ = prepare(with_bos, name)
    assert chat.render([Message(*QA[0])]) == "<s>" + plain.render([Message(*QA[0])])


def test_completion_and_text_rows():
    chat = Chat(tokenizer())
    row = Example("f", 1, completion=("Q: two\nA:", " Four"))
    assert trained(chat, row) == [" Four</s>"]
    assert chat.encode(row).ids.tolist()[: len("Q: two\nA:")] == chat.tokenise("Q: two\nA:")[0]
    merged = Example("f", 1, completion=("A: ", "Four"))  # " F" is one token, but not when the prompt stands alone
    assert trained(chat, merged) == ["Four</s>"]
    assert trained(Chat(tokenizer(), loss_on="all"), row) == [": two\nA: Four</s>"]
    assert trained(chat, Example("f", 1, text="Once")) == ["nce</s>"]
    assert chat.check(chat.encode(row), row) is None
    with pytest.raises(RowError, match="no chat template"):
        chat.encode(conversation(*QA))


def test_a_straddling_token_is_trained_for_more_than_white_space():
    text = "ask:\n\nyes.\nno"
    tokens = [(0, 4), (4, 6), (6, 9), (9, 11), (11, 13)]  # "\n\n" and ".\n" are one token each
    assert covered(text, tokens, [(5, 10)]).tolist() == [False, False, True, True, False]
    assert covered(text, tokens, [(3, 5)]).tolist() == [True, False, False, False, False]
    assert covered(text, tokens, [(4, 6), (11, 13)]).tolist() == [False, True, False, False, True]


def test_a_chat_survives_pickling():
    chat = Chat(tokenizer(), template=STRIPS)
    again = pickle.loads(pickle.dumps(chat))
    example = conversation(*QA)
    assert again.encode(example).ids.tolist() == chat.encode(example).ids.tolist()
    assert again.stop_ids == chat.stop_ids


def test_templates_by_name_by_file_and_for_tools(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(PLAIN)
    assert Chat(tokenizer(), template=str(file)).template == PLAIN
    named = tokenizer()
    named.chat_template = {"default": PLAIN, "tool_use": "{{ tools | length }}" + PLAIN}
    assert Chat(named).render([Message(*QA[0])], TOOLS) == "1" + Chat(named).render([Message(*QA[0])])
    for wrong, match in ((str(tmp_path / "none.jinja"), "none.jinja"), ("{% if %}", "not valid Jinja"), ("chatlm", "chatml")):
        with pytest.raises(UserError, match=match):
            Chat(tokenizer(), template=wrong)


def test_a_tokenizer_that_cannot_be_loaded_is_a_users_mistake(tmp_path):
    def refuses(match):
        with pytest.raises(UserError, match=match):
            load_tokenizer(tmp_path)

    refuses("needs a tokenizer.json, has none")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    refuses("only tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{")
    refuses("damaged")
    (tmp_path / "tokenizer.json").write_text("{}")
    refuses("cannot be read")
    with pytest.raises(UserError, match="nobody/nothing"):
        load_tokenizer("nobody/nothing")
    tokenizer().save_pretrained(tmp_path)
    assert Chat(load_tokenizer(tmp_path)).stop_ids == (tokenizer().eos_token_id,)


# Real tokenizers and templates

FOLDERS = {
    "llama3": "llama3/hf",
    "minimind": "minimind_chatml",
    "mistral_v1": "mistral/mistral_v1",
    "mistral_v3": "mistral/mistral_v3",
    "phi3": "phi3",
    "qwen3": "qwen/qwen3",
}


@pytest.fixture(scope="module")
def real(shared):
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = load_tokenizer(shared / "data" / "tokenizers" / FOLDERS[name])
        return loaded[name]

    return load


def as_messages(rows):
    return tuple(
        Message(r["role"], r.get("content"), extra={k: v for k, v in r.items() if k not in ("role", "content")}) for r in rows
    )


def test_edge_cases_hold(shared, real):
    cases = json.loads((shared / "data/chat_templates/edge_cases/cases.json").read_text())
    assert len(cases) == 42
    for case in cases:
        chat = Chat(real(case.get("tokenizer", "minimind")), template=case["chat_template"])
        chat.special_tokens = case["special"]
        variables = dict(case["kwargs"])
        tools, generate = variables.pop("tools", None), variables.pop("add_generation_prompt", False)
        messages = as_messages(case["messages"])
        if "expected_error" in case:
            with pytest.raises(RowError) as e:
                chat.render(case["messages"], tools, generate, **variables)
            assert case["expected_error"].partition(": ")[2] in str(e.value)
            continue
        assert chat.render(messages, tools, generate, **variables) == case["expected"], case["id"]
        if generate:
            assert chat.prompt(messages, tools, **variables) == case["input_ids"], case["id"]
        elif "input_ids" in case:
            example = Example(case["id"], 1, messages=messages, tools=tools)
            encoded = chat.encode(example)
            assert encoded.ids.tolist() == case["input_ids"], case["id"]
            assert chat.check(encoded, example) is None, case["id"]
            if any(case.get("assistant_masks", ())):
                assert encoded.weights.tolist() == case["assistant_masks"], case["id"]


# rendered with the day's date; with Python's repr of a dict; the target is a prompt, though it was not asked for
DIFFERENT = {"HuggingFaceTB/SmolLM3-3B", "MadeAgents/Hammer2.1", "ai21labs/AI21-Jamba-Large-1.6"}


def test_golden_renderings(shared):
    cases = json.loads((shared / "data/chat_templates/golden/hfjs_jinja_e2e.json").read_text())
    different = set()
    for case in cases:
        variables = dict(case["data"])
        messages, tools = variables.pop("messages"), variables.pop("tools", None)
        chat = Chat(tokenizer(), template=case["chat_template"])
        chat.special_tokens = {}
        if chat.render(messages, tools, variables.pop("add_generation_prompt", False), **variables) != case["target"]:
            different.add(case["name"])
    assert len(cases) == 53 and different <= DIFFERENT


# Templates that need tools or functions to be given, or that the sandbox stops
REFUSING = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "MiroThinker",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "fireworks-ai-llama-3-firefunction-v2",
}
# What templates write at the head of an answer, where the model has to write it too
PREAMBLES = {"", "<think>\n\n</think>", "<think></think>", "</think>", "<|channel|>final<|message|>", "all"}


def test_released_templates_train_the_answers(shared, real):
    refused, closed = set(), 0
    files = sorted((shared / "data/chat_templates/llama_cpp").glob("*.jinja"))
    for file in files:
        chat = Chat(real("minimind"), template=str(file))
        try:
            runs = trained(chat, conversation(*QA))
        except RowError:
            refused.add(file.stem)
            continue
        assert len(runs) == 2, file.stem
        for run, answer in zip(runs, ("Four.", "Seven.")):
            before, _, after = run.partition(answer)
            assert before.strip() in PREAMBLES, (file.stem, run)
            assert after.strip() in ("", *chat.turns.closers), (file.stem, run)
            closed += bool(after.strip())
    assert closed > 90  # of 100 turns; some templates close none, or not the last one
    assert len(files) == 55 and refused == REFUSING


def test_a_stopped_clock_is_right_on_its_day(shared, real, monkeypatch):
    monkeypatch.setattr(
        "transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: datetime(DAY.year, DAY.month, DAY.day))
    )
    texts = [file.read_text() for file in (shared / "data/chat_templates/llama_cpp").glob("*.jinja")]
    dated = [text for text in texts if "strftime_now" in text] + ["\n  {% if 1 %}{{ strftime_now('%A, %-d. %B %y') }}{% endif %}"]
    assert len(dated) == 6
    for template in dated:
        now, then = (Chat(real("minimind"), template=template, day=day).render([Message(*QA[0])]) for day in (None, DAY))
        assert now == then and str(DAY.day) in now


def with_tokens(real, template):
    """A tokenizer that has every tag which the template writes in one token, special but for the thought's, as Qwen3's has."""
    backend = load_copy(real("minimind"))
    backend.add_tokens(["<think>", "</think>"])
    chat = Chat(backend, template=template)
    written = [chat.render(thinking(QA)), chat.render(conversation(*QA[:3]).messages, generate=True), *chat.turns.closers]
    backend.add_tokens(
        sorted({tag for text in written for tag in TAG.findall(text)} - {"<think>", "</think>"}), special_tokens=True
    )
    return Chat(backend, template=template)


def thinking(turns):
    thought = dict.fromkeys(("reasoning_content", "thinking"), "Hm.")
    return tuple(Message(*turn, extra=thought if turn[0] == "assistant" else {}) for turn in turns)


def generated(chat, encoded):
    """(ids, text) of the last answer, as the engine gives them of a model that learnt it."""
    trained = np.flatnonzero(encoded.weights)
    start = trained[np.flatnonzero(np.diff(trained, prepend=-1) > 1)[-1]]
    ids = encoded.ids[start : trained[-1] + 1].tolist()
    ids = ids[: next((i for i, token in enumerate(ids) if token in chat.stop_ids), None)]
    return ids, chat.tokenizer.decode(ids, skip_special_tokens=True)


def apart(chat, ids):
    """(thought, answer) as they come, where the answer is asked for."""
    parts = Parts(chat, chat.prompt(conversation(*QA[:3]).messages))
    parts.add(ids)
    return parts.whole(True)


def test_what_a_learnt_answer_says_is_the_rows_answer(shared, real):
    preambles, thoughts = set(), 0
    for file in sorted((shared / "data/chat_templates/llama_cpp").glob("*.jinja")):
        if file.stem in REFUSING:
            continue
        chat = with_tokens(real, str(file))
        ids, text = generated(chat, chat.encode(conversation(*QA)))
        assert chat.said(text, ids).rstrip() == "Seven." == apart(chat, ids)[1].strip(), (file.stem, text)
        preambles.add(text.rstrip().removesuffix("Seven.").strip())
        try:
            ids, text = generated(chat, chat.encode(conversation(*thinking(QA))))
        except RowError:  # whose thoughts cannot be told apart
            continue
        assert chat.said(text, ids).rstrip() == "Seven.", (file.stem, text)
        if "Hm." in text:
            assert apart(chat, ids) == ("Hm.", "Seven."), (file.stem, text)
            thoughts += 1
    assert preambles == {"", "<think>\n\n</think>", "<think></think>", "</think>", "final", "all"} and thoughts > 9


def test_what_an_answer_says():
    chat = Chat(tokenizer(), template=TEMPLATES["writes a thought into the last answer"][0])

    def said(text):
        return chat.said(text, chat.tokenise(text)[0])

    assert said("<think>\nhm\n</think>\n\n Four.\n") == "Four.\n" == chat.said("<think>\nhm\n</think>\n\n Four.\n")
    assert said("<think>\nFour or five") == "<think>\nFour or five"  # cut off: there is no other answer
    assert said("<think>\nhm\n</think>\n\n") == "" == said("")
    assert said("Four.") == "Four." and without_thought("[THINK]hm[/THINK]Four.") == "Four."
    ids = chat.tokenise("<think>a</think>Four. Fi")[0]
    assert chat.said("<think>a</think>Four. Five", ids) == "Four. Five"  # a stop string began within the last token
    for plain in ("</think>", "It is <think>hm</think> that"):
        told = f"The tag {plain} is a thought's."
        assert said(told) == chat.said(told) == told
    opening = Chat(tokenizer(), template=TEMPLATES["starts the thought in its prompt"][0])
    assert opening.said("hm</think>Four.", opening.tokenise("hm</think>Four.")[0]) == "Four."
    base = Chat(tokenizer())
    assert base.said("a</think>b", base.tokenise("a</think>b")[0]) == "b"


def test_an_answer_ends_where_a_conversation_does(shared, real):
    """GPT-OSS closes a thought with <|end|>: a model that stopped there would never answer."""
    chat = with_tokens(real, str(shared / "data/chat_templates/llama_cpp/openai-gpt-oss-120b.jinja"))
    names = chat.tokenizer.convert_ids_to_tokens
    assert names(list(chat.stop_ids)) == ["<|return|>", "<|im_end|>"]
    assert names(list(chat.closer_ids)) == ["<|end|>", "<|return|>", "<|im_end|>"]
    example = conversation(*QA, Message("user", "Bye."))
    assert chat.check(chat.encode(example), example) is None  # its last answer goes before another turn


def test_weights_do_not_depend_on_generation_markers(real):
    """The same template with and without {% generation %} markers trains the same tokens."""
    for name in ("qwen3", "mistral_v1"):
        chat, _ = prepare(load_copy(real(name)), "chatml")
        bare = Chat(chat.tokenizer, template=chat.template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""))
        example = conversation(("system", "简短。"), ("user", "你好 🙂"), ("assistant", " 您好！ \n"), *QA)
        assert chat.encode(example).weights.tolist() == bare.encode(example).weights.tolist()
        assert chat.encode(replace(example, tools=TOOLS)).weights.sum() == chat.encode(example).weights.sum()


def load_copy(tokenizer):
    return pickle.loads(pickle.dumps(tokenizer))


def test_a_pattern_is_the_same_in_every_process():
    """What answers depend on is known by it, and a set's order is another in each."""
    words = ["</think>", "[/THINK]", "<channel|>"]
    assert {alternatives(each).pattern for each in itertools.permutations(words)} == {alternatives(words).pattern}
