"""`sftjax serve`: a model behind HTTP, in the words of the OpenAI API.

GET  /                      a page to talk with the model
GET  /health, /v1/models
POST /v1/chat/completions   a conversation, through the model's own template
POST /v1/completions        texts or tokens; with echo and logprobs the prompts themselves are scored
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import json
import os
import queue
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from sftjax.config import UserError
from sftjax.generate.engine import Generated
from sftjax.generate.live import Live, Request
from sftjax.generate.open import engine_of, open_model
from sftjax.generate.score import Scored
from sftjax.generate.thought import Parts
from sftjax.hf.load import read_json
from sftjax.serve import replies
from sftjax.serve.asked import SAMPLING, Asked, Desk, Refused
from sftjax.serve.replies import Envelope

try:
    import uvicorn
    from starlette import requests, routing
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
except ImportError as e:
    raise UserError(f"needs {e.name}: pip install 'sftjax[serve]'") from e

HERE = ("127.0.0.1", "localhost")
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass a stream on as it comes
LONGEST = 8 * 2**20  # bytes of a request's body


def run_serve(
    model: str,
    *,
    adapter: str | None = None,
    quantize: str | None = None,
    name: str | None = None,
    host: str = HERE[0],
    port: int = 8000,
    slots: int = 16,
    key_env: str | None = None,
    draft_tokens: int = 0,
) -> None:
    """Serves until Ctrl-C, on one process' devices. With `key_env` callers need the key in that environment variable.

    Raises UserError.
    """
    key = read_key(key_env)
    with bound(host, port) as listening:
        opened = open_model(model, adapter, quantize)
        engine, chat = engine_of(opened)
        served = Path(adapter or model).expanduser()
        called = name or (served.resolve().name if served.is_dir() else adapter or model)
        desk = Desk(called, engine, chat, usual_sampling(opened.directory))
        live = Live(engine, chat.tokenizer, slots=slots, draft_tokens=draft_tokens)
        warm(live)
        at = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        note(f"{called} is at {at}/v1, and a page to talk with it at {at}; Ctrl-C ends")
        if host not in HERE and not key:
            note(f"whoever reaches {host} can use it; --key-env=VARIABLE asks for a key")
        config = uvicorn.Config(make_app(desk, live, key, local=host in HERE), log_level="warning", timeout_graceful_shutdown=3)
        Server(config, live).run(sockets=[listening])


class Server(uvicorn.Server):
    """Who waits for an answer when the server is to end is told so, and keeps it no longer."""

    def __init__(self, config: uvicorn.Config, live: Live):
        super().__init__(config)
        self.live = live

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.live.end()
        super().handle_exit(sig, frame)


def warm(live: Live) -> None:
    """Compiles what a short first question would wait for. Raises what goes wrong."""
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    live.ask([Request([0], 2, heard.put)])
    while not isinstance(said := heard.get(), Generated):
        if isinstance(said, Exception):
            raise said


def read_key(variable: str | None) -> str | None:
    if variable and not os.environ.get(variable):
        raise UserError(f"--key-env={variable}: is not set; put the key that callers need into it")
    return os.environ[variable] if variable else None


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, before a model is read for it. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as e:
        used = isinstance(e, OSError) and e.errno == errno.EADDRINUSE
        reason = "is in use; --port=0 finds a free one" if used else f"cannot be had ({e})"
        raise UserError(f"--host={host} --port={port}: {reason}") from e


def usual_sampling(directory: Path) -> dict[str, float]:
    """How a model samples that is not told: as its generation_config.json says, and where that is silent as the API does."""
    file = directory / "generation_config.json"
    own = read_json(file) if file.is_file() else {}
    return {name: usual if own.get(name) is None else own[name] for name, usual in SAMPLING.items()}


def note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)


def make_app(desk: Desk, live: Live, key: str | None, local: bool) -> Starlette:
    """The application. With `key` who asks needs it; `local` refuses names of this machine that others could have made up."""
    service = Service(desk, live, key)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        live.end()

    routes = [
        routing.Route("/", service.page),
        routing.Route("/health", service.health),
        routing.Route("/v1/models", service.models),
        routing.Route("/v1/models/{name:path}", service.model),
        routing.Route("/v1/chat/completions", service.chat, methods=["POST"]),
        routing.Route("/v1/completions", service.complete, methods=["POST"]),
    ]
    # a page elsewhere whose name leads here (DNS rebinding) is no caller of a local server
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=list(HERE))] if local else []
    told = {404: no_such_path, 405: no_such_path, 500: at_fault}
    return Starlette(routes=routes, middleware=guards, lifespan=lifespan, exception_handlers=told)


class Service:
    def __init__(self, desk: Desk, live: Live, key: str | None):
        self.desk, self.live, self.key, self.began = desk, live, key, int(time.time())

    async def page(self, _: requests.Request) -> Response:
        return HTMLResponse((resources.files("sftjax.serve") / "page.html").read_text(encoding="utf-8"))

    async def health(self, _: requests.Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: requests.Request) -> Response:
        one = await self.model(request)
        return one if one.status_code != 200 else JSONResponse({"object": "list", "data": [self.described()]})

    async def model(self, request: requests.Request) -> Response:
        try:
            self.authorise(request)
            self.desk.check({"model": request.path_params.get("name")}, {"model"})
        except Refused as e:
            return refusal(e)
        return JSONResponse(self.described())

    def described(self) -> dict[str, Any]:
        limit = self.desk.engine.limit
        return {"id": self.desk.name, "object": "model", "created": self.began, "owned_by": "sftjax", "max_model_len": limit}

    async def chat(self, request: requests.Request) -> Response:
        return await self.answer(request, self.desk.chatted, chat=True)

    async def complete(self, request: requests.Request) -> Response:
        return await self.answer(request, self.desk.completed, chat=False)

    def authorise(self, request: requests.Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self.key and not (scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self.key.encode())):
            raise Refused("a key is needed, as Authorization: Bearer KEY, and this is not it", status=401)

    async def answer(self, request: requests.Request, read: Callable[[Any], Asked], chat: bool) -> Response:
        envelope = Envelope(f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time()), self.desk.name, chat)
        try:
            self.authorise(request)
            asked = await run_in_threadpool(read, await read_body(request))
            if asked.stream:
                return StreamingResponse(self.stream(asked, envelope), media_type="text/event-stream", headers=UNBUFFERED)
            return JSONResponse(await unless_gone(request, self.whole(asked, envelope)))
        except Refused as e:
            return refusal(e)

    async def whole(self, asked: Asked, envelope: Envelope) -> dict[str, Any]:
        parts, found = self.parts(asked, envelope), {}
        async for index, said in self.said(asked):
            if isinstance(said, Generated):
                found[index] = said
            else:
                parts[index].add(said)
        answers = [found[index] for index in range(len(asked.rows))]
        # a completion's log-probs have the token that ended it, as vLLM's do: the harness takes one off the end
        made = [a.ids if envelope.chat or a.stop_id is None else [*a.ids, a.stop_id] for a in answers]
        scores = await self.scored(asked, made)
        tell = replies.chat_logprobs if envelope.chat else replies.text_logprobs
        choices = []
        for i, (ids, answer) in enumerate(zip(asked.rows, answers)):
            held = [*ids, *made[i]] if asked.echo else made[i]
            logprobs = None if scores is None else tell(self.desk.chat.tokenizer, held, scores[i])
            thought, text = parts[i].whole(answer.stop_id is not None)
            choices.append(envelope.choice(i, thought, self.echoed(asked, ids) + text, replies.finish(answer), logprobs))
        return envelope.whole(choices, replies.usage(asked.prompts, [answer.ids for answer in answers]))

    def parts(self, asked: Asked, envelope: Envelope) -> list[Parts]:
        return [Parts(self.desk.chat, ids, asked.stop, apart=envelope.chat) for ids in asked.rows]

    def echoed(self, asked: Asked, ids: list[int]) -> str:
        """What stands before the answer to a prompt."""
        return self.desk.chat.tokenizer.decode(ids, skip_special_tokens=True) if asked.echo else ""

    async def scored(self, asked: Asked, made: list[list[int]]) -> list[Scored] | None:
        """Log-probs of what was made, or of all after each prompt's first token where it is echoed; None where nobody asks."""
        if asked.top is None:
            return None
        after = [1 if asked.echo else len(ids) for ids in asked.rows]
        whole = [[*ids, *new] for ids, new in zip(asked.rows, made)]
        before, rest = [ids[:n] for ids, n in zip(whole, after)], [ids[n:] for ids, n in zip(whole, after)]
        return await run_in_threadpool(self.desk.engine.score, before, rest, top=asked.top, batch_size=self.live.slots)

    async def stream(self, asked: Asked, envelope: Envelope) -> AsyncIterator[str]:
        parts, answers = self.parts(asked, envelope), []
        sent = [("", "")] * len(parts)
        for i, ids in enumerate(asked.rows):
            text = self.echoed(asked, ids)
            if envelope.chat or text:
                yield envelope.piece([envelope.delta(i, "", text, first=True)])
        try:
            async for i, said in self.said(asked):
                if isinstance(said, Generated):
                    answers.append(said)
                    now, finish = parts[i].whole(said.stop_id is not None), replies.finish(said)
                else:
                    parts[i].add(said)
                    now, finish = parts[i].shown, None
                thought, text = (new[len(old) :] for new, old in zip(now, sent[i]))
                if thought:  # never with an answer: many callers take a piece for one or the other
                    yield envelope.piece([envelope.delta(i, thought, "")])
                if text or finish:
                    yield envelope.piece([envelope.delta(i, "", text, finish)])
                sent[i] = now
        except Refused as e:
            yield replies.event(replies.failed(str(e), e.status))
            return
        if asked.usage:
            yield envelope.piece([], usage=replies.usage(asked.prompts, [answer.ids for answer in answers]))
        yield replies.DONE

    async def said(self, asked: Asked) -> AsyncIterator[tuple[int, list[int] | Generated]]:
        """(which answer, tokens of it as they come, and at last the answer), of all that were asked for. Raises Refused."""
        if not max(asked.max_new_tokens):
            for index in range(len(asked.rows)):
                yield index, Generated([], False)
            return
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[tuple[int, list[int] | Generated | Exception]] = asyncio.Queue()

        def teller(index: int) -> Callable[[list[int] | Generated | Exception], object]:
            return lambda said: loop.call_soon_threadsafe(heard.put_nowait, (index, said))

        under_way = {}
        for at, ids in enumerate(asked.rows):
            new = asked.max_new_tokens[at // asked.n]
            under_way[at] = Request(ids, new, teller(at), at, asked.seed, asked.sampling, asked.stop)
        try:
            try:
                self.live.ask(list(under_way.values()))
            except UserError as e:
                raise Refused(str(e), status=503) from None
            while under_way:
                index, said = await heard.get()
                if isinstance(said, Exception):
                    kind = "" if isinstance(said, UserError) else f"{type(said).__name__}: "
                    raise Refused(f"no answer: {kind}{str(said).partition(chr(10))[0]}", status=503 if not kind else 500)
                if isinstance(said, Generated):
                    del under_way[index]
                yield index, said
        finally:
            self.live.drop(list(under_way.values()))


async def read_body(request: requests.Request) -> Any:
    """What was sent. Raises Refused."""
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        raise Refused("needs Content-Type: application/json", status=415)  # what another site's page cannot send
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > LONGEST:
            raise Refused(f"the body has over {LONGEST:,} bytes", status=413)
    try:
        body = json.loads(raw)
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused("the body has half a character in it, a surrogate without its other") from None
    except (ValueError, RecursionError) as e:
        raise Refused(f"the body is not JSON: {e}") from None
    return body


async def unless_gone(request: requests.Request, answering: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The answer; given up where nobody waits for it any more."""
    task = asyncio.ensure_future(answering)
    while not task.done():
        await asyncio.wait([task], timeout=0.5)
        if not task.done() and await request.is_disconnected():
            task.cancel()
            raise Refused("the caller has gone", status=499)
    return task.result()


async def no_such_path(request: requests.Request, e: Any) -> Response:
    there = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models"
    asked = f"{request.method} {request.url.path}"
    return refusal(Refused(f"{asked}: there is no such thing; there are {there}", status=e.status_code))


async def at_fault(_: requests.Request, e: Any) -> Response:
    return refusal(Refused("the server failed, and not the request; its log has the cause", status=500))


def refusal(e: Refused) -> JSONResponse:
    return JSONResponse(replies.failed(str(e), e.status, e.param), e.status)
