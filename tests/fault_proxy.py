"""An HTTP proxy that goes wrong on purpose: between a client and a real server of this machine.

It forwards whole requests, and writes down each one. By chance, decided by the seed alone, it

* ``reset``: resets the connection, before the server has seen the request or after the server has done it;
* ``403``, ``500``, ``503``: answers so itself;
* ``cut``: closes the connection in the middle of the answer;
* ``short``: gives half of a body as if it were the whole.

``away()`` closes its port: connections are refused, as they are while a server is being restarted.

A fault falls on a request by its method, its path and how often it came before, never by the order in which threads
come: what happened once happens again.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader

ANSWERS = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}
FAULTS = ("reset", "cut", "short", *ANSWERS)
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "proxy-connection"}


@dataclass(frozen=True)
class Request:
    """What came, and what was done with it: `status` is the server's (0 = it never saw the request)."""

    method: str
    path: str
    status: int
    fault: str

    @property
    def was_answered(self) -> bool:
        """True where the client learned that the server had done it."""
        return self.fault == "" and 200 <= self.status < 300


class FaultProxy:
    """Forward ``http://127.0.0.1:<port>`` to a server of this machine.

    Parameters
    ----------
    server : (host, port)
    faults : mapping of str to float
        The fraction of the requests that each fault falls on; may be changed at any time.
    seed : int

    Attributes
    ----------
    only : str
        A pattern: faults fall on those requests alone whose "METHOD path" it is found in.
    log : list of Request
        In the order in which they were finished.
    """

    def __init__(self, server: tuple[str, int], faults: Mapping[str, float] | None = None, seed: int = 0) -> None:
        self.server = server
        self.faults = dict(faults or {})
        self.seed = seed
        self.only = ""
        self.log: list[Request] = []
        self._actions: list[tuple[str, int, Callable[[], object]]] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._port = 0
        self._listen()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def close(self) -> None:
        """Close the port and all connections."""
        self._listener.close()
        self._accepting.join(timeout=10)
        with self._lock:
            for client in list(self._clients):
                _reset(client)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Refuse connections inside the block."""
        self.close()
        try:
            yield
        finally:
            self._listen()

    def before(self, pattern: str, number: int, action: Callable[[], object]) -> None:
        """Call `action` once, when the `number`-th request comes whose "METHOD path" the pattern is found in.

        The request is passed on afterwards, whatever has become of the client.
        """
        with self._lock:
            self._actions.append((pattern, number, action))

    def count(self, method: str, pattern: str, *, answered: bool = True) -> Counter[str]:
        """Return how often each path that a pattern is found in came (only what the client knows to be done)."""
        with self._lock:
            found = [request for request in self.log if request.method == method and re.search(pattern, request.path)]
        return Counter(request.path for request in found if request.was_answered or not answered)

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=100)
        self._listener.settimeout(0.1)  # closing does not wake a thread that accepts
        self._port = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._accepting.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            client.settimeout(60)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._clients.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        upstream = http.client.HTTPConnection(*self.server, timeout=60)
        try:
            with client.makefile("rb") as stream:
                while self._forward(client, stream, upstream):
                    pass
        except (OSError, http.client.HTTPException):
            _reset(client)
        finally:
            upstream.close()
            with self._lock:
                self._clients.discard(client)
            with suppress(OSError):
                client.close()

    def _forward(self, client: socket.socket, stream: BufferedReader, upstream: http.client.HTTPConnection) -> bool:
        """Handle one request; return whether the connection goes on."""
        line = stream.readline()
        if not line:
            return False
        method, path, _ = line.decode("latin-1").split(" ", 2)
        headers = http.client.parse_headers(stream)
        if headers.get("Expect", "").lower() == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = _read_body(stream, headers)
        self._call_actions(f"{method} {path}")
        fault, chance = self._draw(method, path)
        if fault in ANSWERS:
            error = f"<Error><Code>{ANSWERS[fault]}</Code><Message>by the proxy</Message></Error>".encode()
            self._note(Request(method, path, 0, fault))
            _answer(client, int(fault), ANSWERS[fault], [], b"" if method == "HEAD" else error)
            return True
        if fault == "reset" and chance < 0.5:
            self._note(Request(method, path, 0, fault))
            _reset(client)
            return False
        kept = {name: value for name, value in headers.items() if name.lower() not in HOP}
        upstream.request(method, path, body=body or None, headers=kept | {"Content-Length": str(len(body))})
        response = upstream.getresponse()
        data = response.read()
        if fault == "short":
            fault, data = fault if data else "", data[: len(data) // 2]
        self._note(Request(method, path, response.status, fault))
        if fault == "reset":
            _reset(client)
        else:
            _answer(client, response.status, response.reason, response.getheaders(), data, cut=fault == "cut")
        return fault not in ("reset", "cut")

    def _note(self, request: Request) -> None:
        with self._lock:
            self.log.append(request)

    def _call_actions(self, text: str) -> None:
        due = []
        with self._lock:
            for number, (pattern, left, action) in enumerate(self._actions):
                if re.search(pattern, text):
                    self._actions[number] = (pattern, left - 1, action)
                    if left == 1:
                        due.append(action)
        for action in due:
            action()

    def _draw(self, method: str, path: str) -> tuple[str, float]:
        """Return the fault of this request ("" = none), and a number in [0, 1) for what the fault has to choose."""
        name = re.sub("uploadId=[^&]+", "uploadId", path)  # the server draws it at random
        with self._lock:
            self._seen[method, name] += 1
            text = f"{self.seed} {method} {name} {self._seen[method, name]}"
        digest = hashlib.sha256(text.encode()).digest()
        if not re.search(self.only, f"{method} {path}"):
            return "", 0.0
        first, second = (value / 2**32 for value in struct.unpack("<2I", digest[:8]))
        for fault in FAULTS:
            first -= self.faults.get(fault, 0.0)
            if first < 0:
                return fault, second
        return "", second


def _read_body(stream: BufferedReader, headers: http.client.HTTPMessage) -> bytes:
    if headers.get("Transfer-Encoding", "").lower() != "chunked":
        body = stream.read(int(headers.get("Content-Length", 0)))
        if len(body) < int(headers.get("Content-Length", 0)):
            raise ConnectionResetError("the client went away in the middle of its request")  # never passed on by halves
        return body
    parts = []
    while size := int(stream.readline().split(b";")[0], 16):
        parts.append(stream.read(size))
        stream.readline()
    while stream.readline().strip():  # trailers
        pass
    return b"".join(parts)


def _answer(
    client: socket.socket, status: int, reason: str, headers: list[tuple[str, str]], data: bytes, cut: bool = False
) -> None:
    announced = {name.lower(): value for name, value in headers}
    length = announced.get("content-length", "0") if not data else str(len(data))  # of a HEAD: without a body
    lines = [f"HTTP/1.1 {status} {reason}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers if name.lower() not in HOP]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    if cut:  # in the body; where there is none, in the head
        sent = head + data[: len(data) // 2] if data else head[: len(head) // 2]
        client.sendall(sent)
        client.shutdown(socket.SHUT_RDWR)
        client.close()
        return
    client.sendall(head + data)


def _reset(client: socket.socket) -> None:
    """Close a connection so that the other side gets RST, not an orderly end."""
    with suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.shutdown(socket.SHUT_RD)
    with suppress(OSError):
        client.close()
