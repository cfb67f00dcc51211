"""A bucket of Google Cloud Storage on localhost, as far as gcsfs and tensorstore ask of one: objects with generations, listings,
conditions, whole, multipart and resumable uploads, batches of deletions.

https://docs.cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import base64
import email
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

OBJECT = re.compile(r"/(?:download/|upload/)?storage/v1/b/([^/]+)/o(?:/(.+))?")


class Held(NamedTuple):
    data: bytes
    generation: int


class Bucket:
    """`objects` by name; `down` makes every request fail."""

    def __init__(self, name: str):
        self.name, self.objects, self.down = name, dict[str, Held](), False
        self.lock, self.generation, self.sessions = threading.Lock(), 0, dict[str, bytes]()

    def put(self, name: str, data: bytes) -> None:
        self.generation += 1
        self.objects[name] = Held(data, self.generation)

    def describe(self, name: str) -> dict[str, str]:
        data, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": self.name,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def copy_to(self, folder: Path) -> None:
        for name, held in self.objects.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(held.data)

    def list(self, prefix: str, delimiter: str) -> dict[str, object]:
        names = sorted(name for name in self.objects if name.startswith(prefix))
        inside = {prefix + name.removeprefix(prefix).split(delimiter)[0] + delimiter: name for name in names} if delimiter else {}
        inside = {head: name for head, name in inside.items() if name != head and name.startswith(head)}
        items = [self.describe(name) for name in names if not any(name.startswith(head) for head in inside)]
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(inside)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for its second packet
    bucket: Bucket

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        with self.bucket.lock:
            if self.bucket.down:
                self.answer(403, {"error": {"code": 403, "message": "the bucket is closed"}})
            elif url.path.startswith("/batch/"):
                self.batch(body)
            elif found := OBJECT.fullmatch(url.path):
                known, name = found[1] == self.bucket.name, unquote(found[2] or "")
                self.missing() if not known else self.object(name, body) if name else self.objects(body)
            elif url.path == f"/storage/v1/b/{self.bucket.name}":
                self.answer(200, {"kind": "storage#bucket", "name": self.bucket.name})
            else:
                self.missing()

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def objects(self, body: bytes) -> None:
        if self.command == "GET":
            return self.answer(200, self.bucket.list(self.query.get("prefix", ""), self.query.get("delimiter", "")))
        name, kind = self.query.get("name", ""), self.query["uploadType"]
        if kind == "multipart":
            whole = email.message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body)
            about, content = whole.get_payload()
            name, body = json.loads(about.get_payload())["name"], content.get_payload(decode=True)
        if kind == "resumable" and "upload_id" not in self.query:
            name = name or json.loads(body)["name"]
            self.bucket.sessions[name] = b""
            where = f"http://{self.headers['Host']}{urlsplit(self.path).path}?uploadType=resumable&upload_id=0&name={quote(name)}"
            return self.answer(200, {}, Location=where)
        if kind == "resumable":
            body = self.bucket.sessions[name] = self.bucket.sessions[name] + body
            if self.headers.get("Content-Range", "").endswith("/*"):
                return self.answer(308, {}, Range=f"bytes=0-{len(body) - 1}")
        if not self.refused(name):
            self.bucket.put(name, body)
            self.answer(200, self.bucket.describe(name))

    def object(self, name: str, body: bytes) -> None:
        if self.refused(name):
            return
        if name not in self.bucket.objects:
            return self.missing()
        data, generation = self.bucket.objects[name]
        if self.command == "DELETE":
            del self.bucket.objects[name]
            self.answer(204)
        elif self.query.get("alt") == "media":
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, end = (int(part[1]), int(part[2] or len(data) - 1)) if part else (0, len(data) - 1)
            about = {"x-goog-generation": str(generation), "Content-Range": f"bytes {start}-{end}/{len(data)}"}
            self.answer(206 if part else 200, data[start : end + 1], **about)
        else:
            self.answer(200, self.bucket.describe(name))

    def refused(self, name: str) -> bool:
        """By a condition on the generation, 0 being that of what is not there."""
        held = self.bucket.objects.get(name)
        generation = held.generation if held else 0
        if int(self.query.get("ifGenerationMatch", generation)) != generation:
            self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        elif held and int(self.query.get("ifGenerationNotMatch", -1)) == generation:
            self.answer(304)
        else:
            return False
        return True

    def batch(self, body: bytes) -> None:
        whole = email.message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body)
        parts = []
        for part in whole.get_payload():
            found = re.match(r"DELETE (\S+)", part.get_payload())
            there = self.bucket.objects.pop(unquote(OBJECT.fullmatch(urlsplit(found[1]).path)[2]), None)
            status = "204 No Content" if there else "404 Not Found"
            parts.append(f"--cut\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        self.answer(200, ("".join(parts) + "--cut--").encode(), **{"Content-Type": "multipart/mixed; boundary=cut"})

    def missing(self) -> None:
        self.answer(404, {"error": {"code": 404, "message": "no such object"}})

    def answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        pass  # a process that was killed hears no answer


@contextmanager
def serving(name: str) -> Iterator[tuple[Bucket, dict[str, str]]]:
    """The bucket, and the variables by which a process finds it."""
    bucket = Bucket(name)
    server = Server(("localhost", 0), type("Bound", (Handler,), {"bucket": bucket}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_port}"
    try:
        yield (
            bucket,
            {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
