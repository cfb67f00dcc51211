"""An OpenAI-compatible server is asked as it wants to be; what may pass is tried again, what will not is one sentence."""

import socket
import threading
import time

import pytest
from fake_server import failing, said, serving

from sftjax.config import UserError
from sftjax.data.example import Message
from sftjax.evaluate import endpoint
from sftjax.evaluate.endpoint import Endpoint, check_url

KEY = "sk-secret-of-mine"
HI = [Message("system", "Be brief."), Message("user", "hi")]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.0)


def test_a_request_says_what_was_asked_for_and_no_more():
    with serving(lambda body, headers: said("hello", 11, 3)) as server:
        asked = Endpoint(server.url, "m", key=KEY, max_tokens=5, temperature=0.0, top_p=None, stop=None, seed=None)
        reply = asked.ask(HI)
    assert (reply.text, reply.stopped, reply.prompt_tokens, reply.answer_tokens) == ("hello", True, 11, 3)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert server.bodies == [{"model": "m", "messages": turns, "max_tokens": 5, "temperature": 0.0}]
    assert server.paths == ["/v1/chat/completions"] and server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_no_key_sends_none_and_a_cut_answer_is_known():
    with serving(lambda body, headers: said("hel", finish="length")) as server:
        assert not Endpoint(server.url, "m").ask(HI).stopped
    assert server.headers[0]["Authorization"] is None


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_that_was_cut_off_is_all_there_is_and_else_is_left_out(name):
    def reply(body, headers):
        status, more, held = said("Seven." if "hi" in str(body) else "", finish="length")
        held["choices"][0]["message"] |= {name: "Hm."}
        return status, more, held

    with serving(reply) as server:
        asked = Endpoint(server.url, "m")
        assert [asked.ask(turns).text for turns in (HI, HI[:1])] == ["Seven.", "Hm."]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(status):
    answers = iter([failing(status, "busy"), failing(status, "busy", {"Retry-After": "0"}), said("there")])
    with serving(lambda body, headers: next(answers)) as server:
        assert Endpoint(server.url, "m").ask(HI).text == "there"
    assert len(server.bodies) == 3


def test_what_does_not_pass_is_given_up():
    with serving(lambda body, headers: failing(503, "busy")) as server, pytest.raises(UserError, match=r"503 \(busy\), 6 times"):
        Endpoint(server.url, "m").ask(HI)
    assert len(server.bodies) == endpoint.TRIES


FAILURES = [
    (failing(401, f"Incorrect API key provided: {KEY}."), r"401: the key in MY_KEY is not accepted .*\*\*\*.*--key-env"),
    (failing(404, "The model `m` does not exist"), "404: it has no model m, or .*does not exist"),
    (failing(429, "You exceeded your quota", type="insufficient_quota"), "429: there is no credit left"),
    ((302, {"Location": "http://elsewhere/v1"}, b""), "302: it has moved to http://elsewhere/v1"),
    ((200, {}, b"<html>a proxy's page"), "something other than JSON"),
    ((200, {}, {"choices": []}), "has no choices"),
    ((418, {}, b"\xff\x1b[31m"), "418"),
]


@pytest.mark.parametrize("answer, sentence", FAILURES)
def test_what_will_not_pass_is_one_sentence_without_the_key(answer, sentence):
    with serving(lambda body, headers: answer) as server, pytest.raises(UserError, match=sentence) as told:
        Endpoint(server.url, "m", key=KEY, key_env="MY_KEY").ask(HI)
    assert len(server.bodies) == 1 and len(server.paths) == 1
    assert KEY not in str(told.value) and str(told.value).isprintable()


def test_a_missing_key_is_named():
    with (
        serving(lambda body, headers: failing(401, "no key")) as server,
        pytest.raises(UserError, match="wants a key, and MY_KEY is not set"),
    ):
        Endpoint(server.url, "m", key_env="MY_KEY").ask(HI)


def test_a_redirect_does_not_get_the_key():
    with serving(lambda body, headers: said("never")) as other:
        move = (302, {"Location": f"{other.url}/chat/completions"}, b"")
        with serving(lambda body, headers: move) as server, pytest.raises(UserError, match="it has moved"):
            Endpoint(server.url, "m", key=KEY).ask(HI)
    assert not other.headers


def test_nobody_there():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=r"cannot be reached \(Connection refused\)"):
        Endpoint(url, "m").ask(HI)


def test_a_server_that_is_too_slow_is_given_up(monkeypatch):
    monkeypatch.setattr(endpoint, "TRIES", 2)
    with socket.create_server(("127.0.0.1", 0)) as s:  # takes the connection and says nothing
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=r"no answer within 0\.05 s, 2 times in a row"):
            Endpoint(url, "m", timeout=0.05).ask(HI)


def test_who_leaves_waits_for_no_answer():
    held = threading.Event()

    def reply(body, headers):
        if body["messages"][-1]["content"] == "think long":
            held.wait(20)
        return said("yes")

    asks = [([Message("user", text)], None) for text in ("hi", "hello", "think long", "think long")]
    with serving(reply) as server:
        replies = Endpoint(server.url, "m", timeout=30).each(asks, parallel=3)
        assert {next(replies)[0], next(replies)[0]} == {0, 1}
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            replies.throw(KeyboardInterrupt)
        assert time.monotonic() - began < 10
        held.set()


def test_options_of_reasoning_models():
    def reply(body, headers):
        if "max_tokens" in body:
            return failing(400, "Use 'max_completion_tokens' instead.", param="max_tokens", code="unsupported_parameter")
        if "temperature" in body:
            return failing(400, "'temperature' does not support 0", param="temperature", code="unsupported_value")
        return said("hm")

    with serving(reply) as server:
        asked = Endpoint(server.url, "m", max_tokens=5, temperature=0.0)
        assert asked.ask(HI).text == "hm" and asked.ask(HI).text == "hm"
    assert len(server.bodies) == 4 and server.bodies[-1]["max_completion_tokens"] == 5
    assert asked.notes == ["takes no temperature: answers with its own"]


def test_a_row_that_is_refused_does_not_stop_the_others():
    def reply(body, headers):
        text = body["messages"][0]["content"]
        return failing(400, "too long") if len(text) > 10 else said(text.upper())

    asks = [([Message("user", text)], None) for text in ("abc", "x" * 20, "ab", "a")]
    with serving(reply) as server:
        got = dict(Endpoint(server.url, "m").each(asks, parallel=2))
        first = server.bodies[0]["messages"][0]["content"]
    assert first == "a"  # the shortest goes alone
    assert [got[i].text for i in range(4)] == ["ABC", "", "AB", "A"]
    assert "too long" in got[1].refused and got[0].refused is None


def test_where_all_rows_are_refused_all_are_counted():
    asks = [([Message("user", "x" * n)], None) for n in (3, 1, 2)]
    with serving(lambda body, headers: failing(400, "bad role")) as server:
        got = dict(Endpoint(server.url, "m").each(asks, parallel=2))
    assert [got[i].refused for i in range(3)] == ["400: it refuses the request (bad role)"] * 3


def test_options_are_found_while_rows_are_refused():
    """The first is refused for good, so that the option is complained of to many requests at once."""
    together = threading.Barrier(3, timeout=10)

    def reply(body, headers):
        if len(body["messages"][0]["content"]) == 1:
            return failing(400, "a filter")
        if "temperature" in body:
            together.wait()
            return failing(400, "'temperature' does not support 0", param="temperature")
        return said("hm")

    asks = [([Message("user", "x" * n)], None) for n in (1, 2, 3, 4)]
    with serving(reply) as server:
        asked = Endpoint(server.url, "m", temperature=0.0)
        got = dict(asked.each(asks, parallel=3))
    assert [got[i].text for i in range(4)] == ["", "hm", "hm", "hm"] and "a filter" in got[0].refused
    assert asked.notes == ["takes no temperature: answers with its own"]


def test_a_wrong_key_costs_one_request():
    with serving(lambda body, headers: failing(401, "no")) as server, pytest.raises(UserError):
        list(Endpoint(server.url, "m").each([(HI, None)] * 20, parallel=8))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("http://host/v1", "needs the model's name after a #"),
        ("http:///v1#m", "has no host"),
        ("http://me:pass@host/v1#m", "has a password in it"),
        ("http://me:pass@host/v1", "has a password in it"),
        ("http://me:pass@[::1#m", "has a password in it"),
        ("http://host/v1/chat/completions#m", "without /chat/completions"),
        ("http://[::1#m", "has no valid host and port"),
        ("http://host/v1?key=pass@#m", r"--model=http://host/v1\?\.\.\.: an address has nothing after a \?"),
        ("http://host:80000/v1#m", "has no valid host and port"),
        ("http://host:0/v1#m", "has no valid host and port"),
        ("http://host:v1#m", "has no valid host and port"),
        ("http://ho st/v1#m", "has a character in it that none has"),
        ("http://host/v1\n#m", "has a character in it that none has"),
        ("http://h\u00f6st/v1#m", "has a character in it that none has"),
        (f"http://{'h' * 64}/v1#m", "is no host's name"),
        ("http://a..b/v1#m", "is no host's name"),
    ],
)
def test_an_address_is_checked(text, sentence):
    with pytest.raises(UserError, match=sentence) as told:
        check_url(text)
    assert "pass@" not in str(told.value) and str(told.value).isprintable()


def test_an_address():
    assert check_url("http://host:8000/v1/#org/m") == ("http://host:8000/v1", "org/m")
    assert check_url("https://[::1]:1/v1#m?@x") == ("https://[::1]:1/v1", "m?@x")


def test_an_address_that_cannot_be_one_is_tried_once(monkeypatch):
    asked = Endpoint("http://h%20st/v1", "m")  # urllib unquotes it
    monkeypatch.setattr(asked.over, "wait", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(UserError, match=r"http://h%20st/v1: is no address \("):
        asked.ask(HI)
