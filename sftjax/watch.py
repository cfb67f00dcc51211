"""Notices at once that another process of a run has ended: each keeps a connection to process 0, which closes with its process.

jax notices too, by missed heartbeats: a minute later, and by an abort with a stack trace. That stays for hosts that hang, or are
cut off.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import jax
import numpy as np
from jax._src.distributed import global_state  # the one that knows where process 0 is, whoever said so

from sftjax import hosts

CONNECTING = 10.0  # seconds to come together; a host that process 0 does not hear from is left to the heartbeats
GRACE = 3.0  # seconds for this process to end by itself: what ended the other one may be its own mistake too
BYE = b"\xff\xff"


def watch() -> Callable[[bool], None]:
    """Starts watching. Call what it returns when this process ends: with True where all is well, with False where the others
    should end too."""
    server = socket.create_server(("", 0)) if hosts.first() else None
    mine = os.urandom(8) + (server.getsockname()[1] if server else 0).to_bytes(2, "big")
    said = bytes(hosts.gather(np.frombuffer(mine, np.uint8))[0])
    token, port = said[:8], int.from_bytes(said[8:], "big")
    peers = listen(server, token) if server else call(port, token)
    left = threading.Event()
    threading.Thread(target=look, args=(peers, left), daemon=True, name="watch").start()

    def leave(in_order: bool) -> None:
        left.set()
        tell(peers, BYE if in_order else jax.process_index().to_bytes(2, "big"))

    return leave


def listen(server: socket.socket, token: bytes) -> dict[socket.socket, int]:
    """The connections of the others, with their numbers."""
    peers: dict[socket.socket, int] = {}
    until = time.monotonic() + CONNECTING
    while len(peers) < jax.process_count() - 1 and (rest := until - time.monotonic()) > 0:
        server.settimeout(rest)
        try:
            peer, _ = server.accept()
            peer.settimeout(1.0)
            greeting = peer.recv(10, socket.MSG_WAITALL)
        except OSError:
            continue
        if greeting[:8] == token:
            peers[peer] = int.from_bytes(greeting[8:], "big")
            peer.settimeout(None)
    server.close()
    return peers


def call(port: int, token: bytes) -> dict[socket.socket, int]:
    """The connection to process 0, where it can be reached."""
    host = (global_state.coordinator_address or "").rpartition(":")[0].strip("[]")
    try:
        peer = socket.create_connection((host, port), timeout=CONNECTING)
        peer.sendall(token + jax.process_index().to_bytes(2, "big"))
    except OSError:
        return {}
    peer.settimeout(None)
    return {peer: 0}


def look(peers: dict[socket.socket, int], left: threading.Event) -> None:
    """Ends this process when another has ended without a word; process 0 passes on which."""
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    said = key.fileobj.recv(2)  # type: ignore[union-attr]
                except OSError:
                    said = b""
                if said == BYE:
                    selector.unregister(key.fileobj)
                    continue
                who = int.from_bytes(said, "big") if said else peers[key.fileobj]  # type: ignore[index]
                tell(peers, who.to_bytes(2, "big"))
                if not left.wait(GRACE):
                    hosts.end(f"sftjax: {hosts.lost(who)}")
                return


def tell(peers: dict[socket.socket, int], what: bytes) -> None:
    for peer in peers:
        with suppress(OSError):  # gone too
            peer.sendall(what)
