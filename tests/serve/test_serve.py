"""The server says over HTTP what the engine says in Python, to our own clients and to others' requests alike."""

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("uvicorn")
import uvicorn

from sftjax.config import UserError
from sftjax.data.chat import Chat
from sftjax.data.example import Message
from sftjax.evaluate.endpoint import Endpoint
from sftjax.generate.engine import Answer, Engine
from sftjax.generate.live import Live
from sftjax.generate.open import open_engine
from sftjax.generate.text import Writer
from sftjax.serve import app as module
from sftjax.serve.asked import SAMPLING, Desk, Refused, remembered

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
HI = [{"role": "user", "content": "hi"}]
GREEDY = {"temperature": 0}


@contextmanager
def running(desk, *, key=None, local=True, slots=4):
    """(url, live) of a server in a thread of its own."""
    live = Live(desk.engine, desk.chat.tokenizer, slots=slots)
    server = uvicorn.Server(uvicorn.Config(module.make_app(desk, live, key, local), log_level="warning"))
    with module.bound("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=asyncio.run, args=(server.serve([listening]),), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", live
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def desk(toy):
    engine, chat = open_engine(str(toy.base))
    return Desk("toy", engine, chat, SAMPLING)


@pytest.fixture(scope="module")
def served(desk):
    with running(desk) as (url, live):
        yield url, live


@pytest.fixture(scope="module")
def url(served):
    return served[0] + "/v1"


def send(url, body=None, **headers):
    """(status, what came back)"""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def ask(url, body, path="/chat/completions"):
    status, text = send(url + path, body)
    assert status == 200, text
    return json.loads(text)


def complete(url, **body):
    return ask(url, body, "/completions")


def pieces(url, path, body):
    status, text = send(url + path, body | {"stream": True})
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]


def made(desk, ids, n, **options):
    return desk.engine.generate([ids], max_new_tokens=n, tokenizer=desk.chat.tokenizer, **options)[0]


def test_a_conversation_is_answered_as_the_engine_answers_it(desk, url):
    for messages, options in [
        (HI, GREEDY),
        ([{"role": "system", "content": "Be brief."}, *HI, {"role": "assistant", "content": "so"}, *HI], GREEDY),
        ([{"role": "developer", "content": "Be brief."}, *HI], GREEDY),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], {"temperature": 0.8, "top_p": 0.9, "seed": 3}),
        (HI, {"temperature": 1.0, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 7}),
        (HI, {"temperature": 0.5, "seed": 2**32 - 1, "stop": ["a", "e"]}),
    ]:
        reply = ask(url, {"messages": messages, "model": "toy", "max_tokens": 20, "user": "me", **options})
        texts = [m if isinstance(m["content"], str) else m | {"content": m["content"][0]["text"]} for m in messages]
        texts = [m | {"role": m["role"].replace("developer", "system")} for m in texts]
        ids = desk.chat.prompt(texts)
        sampling = {"stop_strings" if k == "stop" else k: v for k, v in options.items()}
        expected = made(desk, ids, 20, **sampling)
        choice = reply["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": expected.text}
        assert choice["finish_reason"] == ("stop" if expected.stopped else "length")
        n = len(expected.ids)
        assert reply["usage"] == {"prompt_tokens": len(ids), "completion_tokens": n, "total_tokens": len(ids) + n}


def test_what_streams_is_what_comes_whole(url):
    for path, body in [
        ("/chat/completions", {"messages": HI, "max_tokens": 30, "temperature": 0.9, "seed": 1, "n": 2}),
        ("/chat/completions", {"messages": HI, "max_tokens": 30, "temperature": 0.9, "seed": 1, "stop": "e"}),
        ("/completions", {"prompt": ["Once", "Twice"], "max_tokens": 9, "temperature": 1.3, "seed": 5, "echo": True}),
        ("/completions", {"prompt": ["Once", "Twice"], "max_tokens": 0, "echo": True}),
    ]:
        whole = ask(url, body, path)
        events = pieces(url, path, body | {"stream_options": {"include_usage": True}})
        *events, last = events
        assert last["usage"] == whole["usage"] and last["choices"] == []
        texts, ends = {}, {}
        for choice in (choice for event in events for choice in event["choices"]):
            said = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + said
            ends |= {choice["index"]: choice["finish_reason"]} if choice["finish_reason"] else {}
        for choice in whole["choices"]:
            said = choice["message"]["content"] if "message" in choice else choice["text"]
            assert (texts[choice["index"]], ends[choice["index"]]) == (said, choice["finish_reason"])


def says(monkeypatch, text):
    """Whatever it is asked, the model says this, three tokens at a time, and ends its turn."""

    def ask(self, requests):
        for request in requests:
            whole = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], min(self.engine.stop_ids)]
            answer = Answer(request.number, Writer(self.tokenizer, request.stop_strings, request.prompt))
            for at in range(0, min(len(whole), request.max_new_tokens), 3):
                new = whole[at : min(at + 3, request.max_new_tokens)]
                ended = answer.add(new, self.engine.stop_ids)
                request.tell([token for token in new if token not in self.engine.stop_ids])
                if ended:
                    break
            request.tell(answer.generated())

    monkeypatch.setattr(Live, "ask", ask)


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT = "<think>\nHm.\n</think>\n\nSeven."


@pytest.mark.parametrize(
    ("options", "thought", "said", "finish", "tokens"),
    [
        ({}, "Hm.", "Seven.", "stop", len(THOUGHT)),
        ({"max_tokens": len("<think>\nHm")}, "Hm", None, "length", len("<think>\nHm")),
        ({"max_tokens": len(THOUGHT) - 3}, "Hm.", "Sev", "length", len(THOUGHT) - 3),
        ({"stop": ["en."]}, "Hm.", "Sev", "stop", len(THOUGHT) - 3),
        ({"stop": "m."}, "H", None, "stop", len("<think>\nH")),
    ],
)
def test_a_thought_comes_apart_from_the_answer(desk, monkeypatch, options, thought, said, finish, tokens):
    body = {"messages": HI, "max_tokens": 50, "n": 2} | options
    chat = Chat(desk.chat.tokenizer, template=THINKING)
    says(monkeypatch, THOUGHT)
    with monkeypatch.context() as m:
        m.setattr(module.Service, "scored", lambda self, asked, made: told(asked, made))

        async def told(asked, made):
            scored.append((asked.top, [len(ids) for ids in made]))

        scored: list = []
        with running(replace(desk, chat=chat)) as (url, _):
            whole = ask(f"{url}/v1", body | {"logprobs": True})
            events = pieces(f"{url}/v1", "/chat/completions", body | {"stream_options": {"include_usage": True}})
    message = {"role": "assistant", "content": said, "reasoning_content": thought}
    assert [(c["message"], c["finish_reason"]) for c in whole["choices"]] == [(message, finish)] * 2
    assert whole["usage"]["completion_tokens"] == 2 * tokens and scored == [(0, [tokens] * 2)]
    assert events[-1]["usage"] == whole["usage"]
    for index in range(2):
        mine = [c for event in events for c in event["choices"] if c["index"] == index]
        deltas = [c["delta"] for c in mine]
        for name, expected in (("reasoning_content", thought), ("content", said or "")):
            assert "".join(delta.get(name, "") for delta in deltas) == expected
        assert not any(delta.get("content") and "reasoning_content" in delta for delta in deltas)
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [finish]


def test_who_has_no_thoughts_answers_as_ever(desk, url, monkeypatch):
    says(monkeypatch, " <b>Seven</b> ")
    body = {"messages": HI, "max_tokens": 50}
    assert ask(url, body)["choices"][0]["message"] == {"role": "assistant", "content": " <b>Seven</b> "}
    assert (
        "".join(e["choices"][0]["delta"].get("content", "") for e in pieces(url, "/chat/completions", body)) == " <b>Seven</b> "
    )
    says(monkeypatch, THOUGHT)
    assert complete(url, prompt="hi", max_tokens=50)["choices"][0]["text"] == THOUGHT


def test_a_thought_that_comes_back_is_the_templates_to_write(desk):
    thinking = replace(desk, chat=Chat(desk.chat.tokenizer, template=THINKING))
    asked = [*HI, {"role": "assistant", "content": "so", "reasoning_content": "Hm."}, *HI]
    expected = thinking.chat.prompt(asked)
    assert "<think>\nHm." in thinking.chat.tokenizer.decode(expected)
    for name in ("reasoning_content", "reasoning", "thinking"):
        turn = {"role": "assistant", "content": "so", name: "Hm.", "refusal": None}
        assert thinking.turns_ids({"messages": [*HI, turn, *HI]}) == expected
        assert desk.turns_ids({"messages": [*HI, turn, *HI]}) == desk.chat.prompt([*HI, asked[1], *HI])
    silent = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    assert thinking.turns_ids({"messages": [*HI, silent, *HI]}) == thinking.chat.prompt([*HI, silent | {"content": ""}, *HI])
    called = silent | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    with pytest.raises(Refused, match=r"messages\[1\].content: is missing"):
        thinking.turns_ids({"messages": [*HI, {"role": "assistant", "content": None}, *HI]})
    assert remembered(called, "") == called
    with pytest.raises(Refused, match=r"messages\[1\].reasoning: needs a text"):
        thinking.turns_ids({"messages": [*HI, {"role": "assistant", "content": "so", "reasoning": ["Hm."]}, *HI]})


def test_many_at_once_are_each_as_alone(url):
    bodies = [
        {"messages": [{"role": "user", "content": f"{i}?"}], "max_tokens": 5 + i, "seed": i, "temperature": i % 3 / 2}
        for i in range(12)
    ]
    one_by_one = [ask(url, body)["choices"] for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda body: ask(url, body)["choices"], bodies)) == one_by_one


def test_completions_and_their_log_probs(desk, url):
    prompts = ["Once", "Lily had a"]
    tokenizer, start = desk.chat.tokenizer, desk.chat.start_ids
    ids = [[*start, *desk.chat.tokenise(p)[0]] for p in prompts]
    reply = complete(url, prompt=prompts, max_tokens=5, logprobs=3, n=2, seed=4)
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
    for choice, row in zip(reply["choices"], [ids[0], ids[0], ids[1], ids[1]]):
        number = choice["index"]
        drawn = {"max_new_tokens": 5, "temperature": 1.0, "seed": 4, "tokenizer": tokenizer}
        expected = desk.engine.generate([*[[1]] * number, row], **drawn)[-1]
        new = [*expected.ids, *([] if expected.stop_id is None else [expected.stop_id])]
        (scored,) = desk.engine.score([row], [new], top=3)
        told = choice["logprobs"]
        assert choice["text"] == expected.text and told["tokens"] == [tokenizer.decode([i]) for i in new]
        np.testing.assert_allclose(told["token_logprobs"], scored.logps, atol=1e-5)
        for i, (token, alternatives) in enumerate(zip(told["tokens"], told["top_logprobs"])):  # bytes alone may read alike
            assert max(alternatives.values()) == pytest.approx(float(scored.top_logps[i, 0]), abs=1e-5)
            assert alternatives[token] >= told["token_logprobs"][i] and len(alternatives) <= 4
    assert complete(url, prompt=ids[0], max_tokens=5, seed=4)["choices"][0]["text"] == reply["choices"][0]["text"]
    only = complete(url, prompt=ids, max_tokens=0, echo=True, logprobs=1)["choices"]
    for choice, row, text in zip(only, ids, prompts):
        told = choice["logprobs"]
        assert choice["text"] == text and told["token_logprobs"][0] is None and told["text_offset"][1] == len(told["tokens"][0])
        np.testing.assert_allclose(told["token_logprobs"][1:], desk.engine.score([row[:1]], [row[1:]])[0].logps, atol=1e-5)
    chat = ask(url, {"messages": HI, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, **GREEDY})["choices"][0]
    content = chat["logprobs"]["content"]
    assert [desk.chat.tokenizer.decode([i]) for i in made(desk, desk.chat.prompt(HI), 4).ids] == [one["token"] for one in content]
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] and len(one["top_logprobs"]) == 2 for one in content)


def test_compare_asks_it(desk, url):
    endpoint = Endpoint(url, "toy", max_tokens=12, temperature=0)
    reply = endpoint.ask([Message("user", "hi")])
    expected = made(desk, desk.chat.prompt(HI), 12)
    assert (reply.text, reply.stopped, reply.answer_tokens) == (expected.text, expected.stopped, len(expected.ids))


def test_the_harness_asks_it(toy, desk):
    """lm_eval --model local-completions, against our own model of the harness."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from sftjax.evaluate.harness import SftjaxLM

    ours = SftjaxLM(toy.base, max_length=96)
    pairs = [("Once upon a time", " there was"), ("Answer:", " x"), ("Answer:", " y"), ("q", "z" * 30)]
    pairs.append(("Once", ours.generate_until([Instance("generate_until", {}, ("Once", {"max_gen_toks": 3}), 0)])[0]))
    ends = made(desk, [*desk.chat.start_ids, *desk.chat.tokenise("Answer: x")[0]], 1).ids  # a prompt that nothing follows
    engine = Engine(desk.engine.model, desk.engine.params, stop_ids=[*desk.engine.stop_ids, *ends])
    with running(replace(desk, engine=engine)) as (url, _):
        options = {"base_url": f"{url}/v1/completions", "tokenizer_backend": "huggingface", "tokenizer": str(toy.base)}
        theirs = LocalCompletionsAPI(model="toy", batch_size=2, max_length=96, **options)

        def both(kind, arguments):
            asked = [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]
            return [getattr(lm, kind)(asked, disable_tqdm=True) for lm in (theirs, ours)]

        found, expected = both("loglikelihood", pairs)
        np.testing.assert_allclose([logp for logp, _ in found], [logp for logp, _ in expected], atol=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        stop = desk.chat.tokenizer.decode(ends)
        asked = [("Once upon", {"until": ["q", stop], "max_gen_toks": 9}), ("Tom", {"until": ["e", stop], "max_gen_toks": 20})]
        found, expected = both("generate_until", asked)
        assert found == expected


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"model": "other"}, "model", "only toy"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"temperature": -1}, "temperature", "needs 0 (greedy) or more"),
        ({"temperature": "hot"}, "temperature", "needs a number"),
        ({"top_p": 2}, "top_p", "from 0 to 1"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"max_completion_tokens": 2.5}, "max_completion_tokens", "needs a whole number"),
        ({"n": 0}, "n", "from 1 to 128"),
        ({"seed": -1}, "seed", "from 0"),
        ({"stop": [3]}, "stop", "list of texts"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream": True, "logprobs": True}, "logprobs", "leave out stream"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "only auto and none"),
        ({"messages": []}, "messages", "has no turns"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, "messages", "ends with an answer"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "'wizard' is not a role known here"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "prompt", "the model takes 128"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs", "needs an object"),
        ({"chat_template_kwargs": {"messages": 3}}, "chat_template_kwargs", "messages is not for callers to set"),
        ({"temperature": 10**400}, "temperature", "needs a number"),
        ({"stream_options": 5}, "stream_options", "needs an object"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"stop": 0}, "stop", "list of texts"),
        ({"stop": ["a", "x" * 1001]}, "stop", "1,000 characters at most"),
        ({"chat_template_kwargs": {"self": 3}}, "chat_template_kwargs", "self is not for callers to set"),
        ({"tools": [TOOL]}, "tools", "writes no tools"),
        ({"tools": [3]}, "tools", "tools"),
    ],
    ids=lambda x: None if isinstance(x, str) else next(iter(x)),
)
def test_what_is_refused_is_named(url, body, param, says):
    status, text = send(f"{url}/chat/completions", {"messages": HI, **body})
    error = json.loads(text)["error"]
    assert status == (404 if param == "model" else 400) and error["param"] == param, error
    assert says in error["message"] and "--config" not in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [None, "", [], [[]], [1, "a"], [1, 10**6], [-1], {"a": 1}, "x" * 128])
def test_prompts_that_are_refused(url, prompt):
    status, text = send(f"{url}/completions", {"prompt": prompt, "max_tokens": 1})
    assert status == 400 and json.loads(text)["error"]["param"] == "prompt"


def test_bodies_that_are_refused(url, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 50_000)
    for body, status in [
        (b'{"prompt": "\\ud800 hi"}', 400),
        (b'{"model": "\\udfff"}', 400),
        (b"[" * 20_000, 400),
        (b'{"prompt": "' + b"x" * 60_000 + b'"}', 413),
        (json.dumps({"prompt": ["x"] * 1025, "max_tokens": 1}).encode(), 400),
    ]:
        found, text = send(f"{url}/completions", body)
        assert found == status and json.loads(text)["error"]["type"] == "invalid_request_error"


def test_a_fault_of_the_server_is_told_as_the_api_tells_errors(url, monkeypatch):
    def broken(self, _):
        raise RuntimeError("a secret")

    monkeypatch.setattr(Desk, "chatted", broken)
    status, said = send(url + "/chat/completions", {"messages": HI})
    assert (status, json.loads(said)["error"]["type"]) == (500, "server_error") and "secret" not in said


def test_large_numbers_harm_nobody(url):
    body = {"messages": HI, "max_tokens": 4, "seed": 1}
    assert ask(url, body | {"top_k": 2**40})["choices"] == ask(url, body)["choices"]


def test_the_bytes_of_tokens_are_those_of_the_text(desk, shared):
    from sftjax.data.chat import load_tokenizer
    from sftjax.serve.replies import token_bytes

    text = "a 龘🙂é\n"
    for tokenizer in (desk.chat.tokenizer, load_tokenizer(shared / "data/hf_models/stories260K")):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        held = [byte for i in ids for byte in token_bytes(tokenizer, i)]
        assert bytes(held).decode().strip() == text.strip()
        assert token_bytes(tokenizer, 10**6) == []  # a padded vocabulary has ids of no token


def test_what_changes_nothing_is_taken(url):
    same = {"frequency_penalty": 0, "response_format": {"type": "text"}, "logit_bias": None, "store": False, "top_k": -1}
    body = {"messages": HI, "max_tokens": 6, **GREEDY}
    assert ask(url, body | same)["choices"] == ask(url, body)["choices"]


def test_a_model_answers_as_its_generation_config_says(tmp_path, desk, url):
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": 3}))
    usual = module.usual_sampling(tmp_path)
    assert usual == SAMPLING | {"temperature": 0.6, "top_k": 20}
    body = {"messages": HI, "max_tokens": 20, "seed": 3}
    with running(Desk("toy", desk.engine, desk.chat, usual)) as (own, _):
        assert ask(own + "/v1", body)["choices"] == ask(url, body | {"temperature": 0.6, "top_k": 20})["choices"]


def test_who_may_ask(desk, served, url):
    root, _ = served
    assert json.loads(send(f"{url}/models")[1])["data"][0] == json.loads(send(f"{url}/models/toy")[1])
    assert send(f"{url}/models/other")[0] == 404 and send(f"{url}/completions")[0] == 405
    assert json.loads(send(f"{root}/health")[1]) == {"status": "ok"} and "<title>" in send(root)[1]
    body = {"messages": HI, "max_tokens": 1}
    assert send(f"{url}/chat/completions", body, Host="evil.example")[0] == 400  # DNS rebinding
    assert send(f"{url}/chat/completions", body, **{"Content-Type": "text/plain"})[0] == 415  # a form on another site
    assert send(f"{url}/chat/completions", b"{")[0] == 400 and send(f"{url}/chat/completions", [1])[0] == 400
    status, text = send(f"{root}/chat/completions", body)
    assert status == 404 and "/v1/chat/completions" in json.loads(text)["error"]["message"]
    with running(desk, key="secret", local=False) as (own, _):
        for path, sent in (("/models", None), ("/chat/completions", body), ("/completions", {"prompt": "x"})):
            for key in ("", "Bearer other", "secret"):
                assert send(f"{own}/v1{path}", sent, Authorization=key)[0] == 401
            assert send(f"{own}/v1{path}", sent, Authorization="bearer secret", Host="any.example")[0] == 200


def test_who_hangs_up_makes_room(desk, monkeypatch):
    left, drop = [], Live.drop
    monkeypatch.setattr(Live, "drop", lambda self, requests: (left.append(len(requests)), drop(self, requests)))
    with running(desk, slots=1) as (url, live):
        for stream in (True, False):
            body = {"messages": HI, "max_tokens": 100, "stream": stream, "n": 128, "logit_bias": {}}
            sent = urllib.request.Request(
                f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(sent, timeout=0.3) as response:
                    response.readline()
            except TimeoutError:
                pass
            began = time.monotonic()
            while live.waiting or live.under_way:
                assert time.monotonic() - began < 60
                time.sleep(0.02)
        assert min(left) > 0 and len(left) == 2
        assert ask(f"{url}/v1", {"messages": HI, "max_tokens": 2, **GREEDY})


def test_an_address_that_cannot_be_had(monkeypatch):
    with module.bound("127.0.0.1", 0) as held, pytest.raises(UserError, match="is in use; --port=0"):
        module.bound("127.0.0.1", held.getsockname()[1])
    with pytest.raises(UserError, match="--port=99999"):
        module.bound("127.0.0.1", 99999)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="--key-env=NO_SUCH_KEY"):
        module.read_key("NO_SUCH_KEY")
