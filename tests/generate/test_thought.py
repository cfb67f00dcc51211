"""What an answer thinks and what it says are told apart as they come; nothing that was shown is taken back."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sftjax.data.chat import Chat
from sftjax.generate.text import Writer
from sftjax.generate.thought import LOOK, Parts

TAGS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = TAGS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
IN_WORDS = TAGS.replace("<think>", "Let me see:").replace("</think>", "[ANSWER]")
PROMPTED = IN_WORDS.replace("Let me see:\n", "").replace("assistant\n{% endif %}", "assistant\nLet me see:\n{% endif %}")
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
PLAIN = TAGS.replace("{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}", "")
SPECIAL = [
    "<|im_end|>",
    "<|im_start|>",
    "<|start|>",
    "<|end|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    "[THINK]",
    "[/THINK]",
]
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"
CASES = [  # template, what the model writes, what it thinks, what it says
    (TAGS, "<think>\nHm. 3 < 4.\n</think>\n\nSeven é🙂.\n", "Hm. 3 < 4.", "Seven é🙂.\n"),
    (TAGS, "<think>\n\n</think>\n\nSeven.", "", "Seven."),
    (TAGS, "\n\n<think>Hm.</think>Seven.", "Hm.", "Seven."),
    (TAGS, "Seven.", "", "Seven."),
    (TAGS, "\n <thing> is <think>", "", "\n <thing> is <think>"),
    (TAGS, "<", "", "<"),
    (TAGS, " \n" * 60 + "Seven.", "", " \n" * 60 + "Seven."),
    (TAGS, "<think>\nHm. </thin", "Hm. </thin", ""),
    (TAGS, "<think>Hm.</think>It is </think>.", "Hm.", "It is </think>."),
    (TAGS, "[THINK]Hm.<|start|> So[/THINK]Seven.", "Hm. So", "Seven."),
    (OPENED, "Hm.\n</think>\n\nSeven.", "Hm.", "Seven."),
    (OPENED, "\n</think>\n\nSeven.", "", "Seven."),
    (IN_WORDS, "Let me see: hm.\n[ANSWER]\nSeven.", "hm.", "Seven."),
    (PROMPTED, "hm.\n[ANSWER]\nSeven.", "hm.", "Seven."),
    (CHANNELS, f"{ANALYSIS}Hm.<|end|><|start|>assistant{FINAL}Seven.", "Hm.", "Seven."),
    (CHANNELS, f"{ANALYSIS}Hm.<|end|><|start|>assistant{ANALYSIS}So.<|end|><|start|>assistant{FINAL}7", "Hm.\nSo.", "7"),
    (CHANNELS, f"{ANALYSIS}<|end|><|start|>assistant{ANALYSIS}So.<|end|><|start|>assistant{FINAL}7", "So.", "7"),
    (CHANNELS, f"{ANALYSIS}Hm.<|end|><|start|>assistant<|channel|>commentary to=f<|message|>{{}}", "Hm.", "commentary to=f{}"),
    (CHANNELS, f"{ANALYSIS}Hm.<|end|><|start|>assist", "Hm.", ""),
    (CHANNELS, f"{FINAL}Seven.", "", "Seven."),
    (PLAIN, " Seven.", "", " Seven."),
    (PLAIN, "<think>Hm.</think>Seven.", "Hm.", "Seven."),
]


@pytest.fixture(scope="module")
def chats():
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return {template: Chat(tokenizer, template=template) for template in (TAGS, OPENED, IN_WORDS, PROMPTED, CHANNELS, PLAIN)}


def asked(chat):
    return chat.prompt([{"role": "user", "content": "3+4?"}])


@pytest.mark.parametrize(("template", "written", "thought", "said"), CASES, ids=range(len(CASES)))
def test_a_thought_and_an_answer_come_apart(chats, template, written, thought, said):
    chat = chats[template]
    ids = chat.tokenise(written)[0]
    for at_a_time in (1, 4, len(ids)):
        parts, shown = Parts(chat, asked(chat)), ("", "")
        for at in range(0, len(ids), at_a_time):
            parts.add(ids[at : at + at_a_time])
            assert all(new.startswith(old) for new, old in zip(parts.shown, shown))
            shown = parts.shown
        assert parts.whole(False) == (thought, said)
        assert thought.startswith(shown[0]) and said.startswith(shown[1])


def test_they_come_as_soon_as_they_are_sure(chats):
    chat = chats[TAGS]
    parts, seen = Parts(chat, asked(chat)), []
    for token in chat.tokenise("<think>Hm </p>.</think>7")[0]:
        parts.add([token])
        seen.append(parts.shown)
    thoughts = ["", "H", *["Hm"] * 4, "Hm </p", "Hm </p>", *["Hm </p>."] * 10]
    assert seen == [("", "")] * 7 + [(thought, "") for thought in thoughts[1:-1]] + [("Hm </p>.", "7")]
    parts = Parts(chat, asked(chat))
    parts.add(chat.tokenise("\n" * LOOK)[0])
    assert parts.shown == ("", "\n" * LOOK)  # nothing opens any more


@pytest.mark.parametrize(
    ("stop", "thought", "said"),
    [("k>", "", ""), (" 3", "Hm.", ""), ("</th", "Hm. 3 < 4.", ""), ("Sev", "Hm. 3 < 4.", ""), ("ven", "Hm. 3 < 4.", "Se")],
)
def test_a_stop_string_ends_either(chats, stop, thought, said):
    chat = chats[TAGS]
    ids = chat.tokenise("<think>\nHm. 3 < 4.\n</think>\n\nSeven.")[0]
    parts, text = Parts(chat, asked(chat), [stop]), Writer(chat.tokenizer, [stop], asked(chat))
    parts.add(ids)
    text.add(ids)
    assert parts.writer.text == text.text and parts.whole(False) == parts.shown == (thought, said)


def test_a_turn_that_ends_in_its_thought_has_said_it(chats):
    parts = Parts(chats[OPENED], asked(chats[OPENED]))
    parts.add(chats[OPENED].tokenise("Seven.")[0])
    assert parts.whole(True) == ("Seven.", "Seven.") and parts.whole(False) == ("Seven.", "")


def test_a_completion_is_all_answer(chats):
    chat = chats[OPENED]
    parts = Parts(chat, asked(chat), apart=False)
    parts.add(chat.tokenise("<think>Hm.</think>7")[0])
    assert parts.shown == parts.whole(True) == ("", "<think>Hm.</think>7")
