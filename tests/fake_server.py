"""An OpenAI-compatible server of our own: `with serving(reply) as server: Endpoint(server.url, "m")`.

`reply(body, headers)` gives (status, headers, what goes out as JSON, or bytes as they are); `said` makes a usual one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def said(text: str, prompt_tokens: int = 7, answer_tokens: int = 2, finish: str = "stop") -> tuple[int, dict[str, str], Any]:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens}
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return 200, {}, {"choices": [choice], "usage": usage}


def failing(status: int, message: str, headers: dict[str, str] | None = None, **more: str) -> tuple[int, dict[str, str], Any]:
    return status, headers or {}, {"error": {"message": message, **more}}


class Server:
    def __init__(self, reply: Callable[[dict[str, Any], Any], tuple[int, dict[str, str], Any]]):
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []
        self.url = ""


@contextmanager
def serving(reply: Callable[[dict[str, Any], Any], tuple[int, dict[str, str], Any]]) -> Iterator[Server]:
    server = Server(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.bodies.append(body)
            server.headers.append(self.headers)
            server.paths.append(self.path)
            status, headers, held = server.reply(body, self.headers)
            raw = held if isinstance(held, bytes) else json.dumps(held).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:  # where a redirect would lead
            server.paths.append(f"GET {self.path}")
            server.headers.append(self.headers)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
