"""A model behind an OpenAI-compatible server: POST URL/chat/completions, what the servers of vLLM, llama.cpp, Ollama speak too.

Only what every one of them understands is sent, and of that only what was asked for. What may pass (429, 5xx, a lost
connection) is tried again, at the times the server names or at growing intervals; what will not is one sentence. The key
goes into one header and nowhere else: not along a redirect, not into a message.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from typing import Any

from sftjax.config import UserError
from sftjax.data.chat import as_dict, without_thought
from sftjax.data.example import Message

TRIES = 6
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
OF_THE_ROW = (400, 413, 422)  # too long, or refused by a filter: the next row may well be answered
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds


@dataclass(frozen=True)
class Reply:
    """One answer and what it cost. Tokens are as the model's own tokenizer counts them, None where a server does not say."""

    text: str
    stopped: bool  # False where it was cut off
    prompt_tokens: int | None
    answer_tokens: int | None
    seconds: float
    refused: str | None = None  # why there is no answer


class Passing(Exception):
    """A failure that may pass; `wait` is the seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Refusal(Exception):
    """No answer comes of this request: `of_row` where the server says so itself, else what came is none."""

    def __init__(self, reason: str, param: str = "", of_row: bool = False):
        super().__init__(reason)
        self.param, self.of_row = param, of_row


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would turn the POST into a GET and take the key along."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """`Endpoint("http://localhost:8000/v1", "qwen").ask([Message("user", "hi")])`."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        key_env: str | None = None,
        timeout: float = 120.0,
        reached: bool = False,
        **options: Any,
    ):
        self.url, self.model, self.key, self.key_env, self.timeout = url.rstrip("/"), model, key, key_env, timeout
        self.options = options  # max_tokens, temperature, top_p, stop, seed; None is not sent
        self.notes: list[str] = []  # what the server would not take
        self.reached = reached  # it has answered, in an earlier run if not in this one: what fails now may pass
        self.settled = False  # it has answered with these options
        self.lock = threading.Lock()
        self.over = threading.Event()  # nobody waits for an answer any more
        self.opener = urllib.request.build_opener(NoRedirect)

    def each(self, asks: Sequence[tuple[Sequence[Message], Any]], *, parallel: int) -> Iterator[tuple[int, Reply]]:
        """(row, reply) as they come, `parallel` under way at a time. Raises UserError for what would fail every row.

        The first goes alone, so that a wrong key or name is told once and costs nothing.
        """
        if not asks:
            return
        first = min(range(len(asks)), key=lambda i: sum(len(str(m.content)) for m in asks[i][0]))
        yield first, self.ask(*asks[first])
        over = self.over = threading.Event()
        rest: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(asks)):
            if i != first:
                rest.put(i)
        replies: queue.SimpleQueue[tuple[int, Reply | Exception]] = queue.SimpleQueue()

        def work() -> None:
            while not over.is_set():
                try:
                    i = rest.get_nowait()
                except queue.Empty:
                    return
                try:
                    replies.put((i, self.ask(*asks[i])))
                except Exception as e:  # handed to whoever waits for the reply
                    replies.put((i, e))

        for _ in range(min(parallel, len(asks) - 1)):
            threading.Thread(target=work, daemon=True).start()  # an executor's threads would be waited for after Ctrl-C
        try:
            for _ in range(len(asks) - 1):
                i, reply = replies.get()
                if isinstance(reply, Exception):
                    raise reply
                yield i, reply
        except BaseException:
            over.set()
            raise

    def ask(self, messages: Sequence[Message], tools: Any = None) -> Reply:
        """The answer to a conversation. Raises UserError; a row that the server refuses is a Reply without text."""
        body: dict[str, Any] = {"model": self.model, "messages": [as_dict(m) for m in messages]}
        if tools:
            body["tools"] = list(tools)
        for attempt in range(1, TRIES + 1):
            with self.lock:
                sent = self.held()
            start = time.perf_counter()
            try:
                reply = self.read(self.post(body | sent), time.perf_counter() - start)
                self.reached = self.settled = True
                return reply
            except Refusal as e:
                if self.adapt(e, sent):
                    continue
                if not (e.of_row or self.reached):
                    raise UserError(f"{self.url}: {e}") from None
                return Reply("", False, None, None, 0.0, refused=str(e))
            except Passing as e:
                if attempt == TRIES:
                    hint = "run again to go on from here" if self.reached else "is it the right address, and up?"
                    raise UserError(f"{self.url}: {e}, {TRIES} times in a row; {hint}") from None
                # not quite the same for all, so that parallel requests do not come back at once
                wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.75, 1.25) if e.wait is None else e.wait
                if self.over.wait(min(LONGEST_WAIT, wait)):
                    break
        raise UserError(f"{self.url}: no answer; run again to go on from here")

    def adapt(self, refusal: Refusal, sent: dict[str, Any]) -> bool:
        """Whether a request without the option that the server complained of is worth another try.

        Reasoning models of OpenAI's know max_tokens by another name and have a temperature of their own.
        """
        with self.lock:
            if sent != self.held():
                return True  # a request beside this one has been told the same
            if self.settled:
                return False
            if "max_completion_tokens" in str(refusal) and "max_tokens" in sent:
                self.options["max_completion_tokens"] = self.options.pop("max_tokens")
                return True
            if refusal.param in sent.keys() & {"temperature", "top_p", "seed", "stop"}:
                self.options[refusal.param] = None
                self.notes.append(f"takes no {refusal.param}: answers with its own")
                return True
            return False

    def held(self) -> dict[str, Any]:
        """The options that are sent."""
        return {name: value for name, value in self.options.items() if value is not None}

    def post(self, body: dict[str, Any]) -> Any:
        """The JSON that comes back. Raises Passing, Refusal, UserError."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "sftjax"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/chat/completions", data, headers, method="POST")
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                raw = response.read()
        except urllib.error.HTTPError as e:
            with e:
                raise self.failure(e.code, e.headers, e.read(65536)) from None
        except InvalidURL as e:
            raise UserError(f"{self.url}: is no address ({e})") from None
        except TimeoutError as e:
            raise Passing(f"no answer within {self.timeout:g} s") from e
        except (urllib.error.URLError, HTTPException, OSError) as e:
            raise self.unreachable(e) from None
        try:
            return json.loads(raw)
        except ValueError:
            raise Refusal(f"answers with something other than JSON: {self.clean(raw[:80])!r}") from None

    def unreachable(self, e: Exception) -> Exception:
        cause = e.reason if isinstance(e, urllib.error.URLError) else e
        if isinstance(cause, TimeoutError):
            return Passing(f"no answer within {self.timeout:g} s")
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        if self.reached or not isinstance(e, urllib.error.URLError):
            return Passing(f"the connection was lost ({reason})")
        return UserError(f"{self.url}: cannot be reached ({reason}); is the server up, and is this its address?")

    def failure(self, code: int, headers: Any, raw: bytes) -> Exception:
        """What a status other than 200 means."""
        said, kind, param = self.complaint(raw)
        told = f" ({said})" if said else ""
        if code in (401, 403):
            missing = f"it wants a key, and {self.key_env} is not set" if self.key_env else "it wants a key, and is sent none"
            held = f"the key in {self.key_env} is not accepted" if self.key else missing
            return UserError(f"{self.url}: {code}: {held}{told}; name its variable with --key-env")
        if code == 404:
            return UserError(f"{self.url}: 404: it has no model {self.model}, or the address is not up to /v1{told}")
        if 300 <= code < 400:
            return UserError(f"{self.url}: {code}: it has moved to {headers.get('Location')}; give that address")
        if kind == "insufficient_quota" or code == 402:
            return UserError(f"{self.url}: {code}: there is no credit left{told}; what is answered is kept, run again to go on")
        if code in PASSING:
            return Passing(f"{code}{told}", seconds(headers.get("Retry-After")))
        if code in OF_THE_ROW:
            return Refusal(f"{code}: it refuses the request{told}", param, of_row=True)
        return UserError(f"{self.url}: {code}{told or ': it does not say why'}")

    def complaint(self, raw: bytes) -> tuple[str, str, str]:
        """(message, type or code, parameter) of an error's body, of which servers have several forms."""
        try:
            held = json.loads(raw)
        except ValueError:
            held = None
        if not isinstance(held, dict):
            return self.clean(raw), "", ""
        error = held.get("error", held)
        if not isinstance(error, dict):
            return self.clean(str(error).encode()), "", ""
        said = error.get("message") or error.get("detail") or ""
        kinds = {str(error.get("type")), str(error.get("code"))}
        kind = "insufficient_quota" if "insufficient_quota" in kinds else str(error.get("type") or "")
        return self.clean(str(said).encode()), kind, str(error.get("param") or "")

    def clean(self, raw: bytes) -> str:
        """The first line or so of what a server says, without the key that it may repeat."""
        text = " ".join(raw.decode("utf-8", "replace").split())
        text = text.replace(self.key, "***") if self.key else text
        text = "".join(c for c in text if c.isprintable())
        return (text[:300] + "..." if len(text) > 300 else text).rstrip(".") if not text.startswith("<") else ""

    def read(self, held: Any, took: float) -> Reply:
        """The Reply in a response's JSON. Raises Refusal where it is none."""
        try:
            choice, usage = held["choices"][0], held.get("usage") or {}
            said = choice["message"]  # a thought that was cut off is all there is, as of a model here
            text = said.get("content") or said.get("reasoning_content") or said.get("reasoning") or ""
            ended = choice.get("finish_reason") != "length"
            return Reply(without_thought(str(text)), ended, usage.get("prompt_tokens"), usage.get("completion_tokens"), took)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Refusal(f"its answer has no choices: {self.clean(json.dumps(held).encode())}") from None


def seconds(text: str | None) -> float | None:
    """Retry-After in seconds; None where it is absent or a date."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None


def check_url(text: str) -> tuple[str, str]:
    """URL#model -> (URL, model). Raises UserError, which repeats nothing that may be a secret."""
    url, _, model = text.partition("#")
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise UserError("--model: the address has a password in it; keys go into environment variables, named by --key-env")
    if "?" in url:
        raise UserError(
            f"--model={url.partition('?')[0]}?...: an address has nothing after a ?; keys go into environment variables, "
            "named by --key-env"
        )
    if not model:
        raise UserError(f"--model={text}: needs the model's name after a #, e.g. {url.rstrip('/')}#NAME")
    if not (url.isascii() and url.isprintable() and " " not in url):
        raise UserError(f"--model={text!r}: the address has a character in it that none has; type it anew")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = "", -1
    if port is not None and not 0 < port < 65536:
        raise UserError(f"--model={text}: has no valid host and port; an address is like http://localhost:8000/v1#NAME")
    if not host:
        raise UserError(f"--model={text}: has no host; an address is like http://localhost:8000/v1#NAME")
    try:
        host.encode("idna")  # as the look-up will
    except UnicodeError:
        raise UserError(f"--model={text}: {host} is no host's name; an address is like http://localhost:8000/v1#NAME") from None
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise UserError(f"--model={text}: give the address up to /v1, without /chat/completions")
    return url.rstrip("/"), model
