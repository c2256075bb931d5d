"""Stores on loopback."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import http.server
import ipaddress
import os
import random
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def moto_server() -> Iterator[str]:
    """moto's S3 server in a process of its own; gives its endpoint."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise RuntimeError("moto's server did not start") from None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@dataclass(frozen=True)
class Request:
    """What a client asked; the names of the headers are in small letters."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Answer:
    """What the store answers; with `sent`, the connection ends after so many bytes of the body."""

    status: int
    headers: dict[str, str]
    body: bytes
    sent: int | None = None
    missing: int = 0
    """Bytes of the body that are promised and not there."""
    garbage: bytes = b""
    """Sent below TLS after the body."""


Spoiler = Callable[[Answer], None]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with a request."""

    name: str
    spoiler: Spoiler
    reaches_the_store: bool = True
    hangs_up: bool = False
    """The connection is reset in the middle of the request."""
    only: tuple[str, ...] = ("DELETE", "GET", "HEAD", "POST", "PUT")


class Faults:
    """A plan of faults: which request goes wrong and how depends on a seed, on the request, and on how often it came.

    Not on the order of requests, which threads shuffle, nor on the bucket's name.
    """

    def __init__(self, kinds: Sequence[Fault], share: float, seed: int = 0) -> None:
        self.kinds = kinds
        self.share = share
        self.seed = seed
        self.done: Counter[str] = Counter()
        self._met: Counter[tuple[str, str]] = Counter()

    def next(self, request: Request) -> Fault | None:
        self._met[request.method, request.path] += 1
        met = self._met[request.method, request.path]
        draw = random.Random(f"{self.seed} {request.method} {re.sub('^/[^/?]+', '', request.path)} {met}")
        kinds = [kind for kind in self.kinds if request.method in kind.only]
        if draw.random() >= self.share or not kinds:
            return None
        fault = draw.choice(kinds)
        self.done[fault.name] += 1
        return fault


@dataclass
class _Rule:
    spoiler: Spoiler
    method: str
    path: str
    times: int


class Meddler:
    """A proxy in front of a store, which remembers the requests and spoils answers as it is told."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.url = ""
        self.requests: list[Request] = []
        self.forgotten: set[str] = set()
        """Headers that the store does not get to see."""
        self.added = ""
        """What is added to every query that the store gets to see."""
        self.faults: Faults | None = None
        """What goes wrong beside the rules."""
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()

    def spoil(self, spoiler: Spoiler, *, method: str = "GET", path: str = "", times: int = 1) -> None:
        """Let `spoiler` change the next answers to requests of that method whose path ends so."""
        self._rules.append(_Rule(spoiler, method, path, times))

    def count(self, method: str, path: str = "") -> int:
        """How many requests of that method there were whose path holds `path`."""
        return sum(request.method == method and path in request.path for request in self.requests)

    def fault(self, request: Request) -> Fault | None:
        """What shall go wrong with this request."""
        with self._lock:
            return None if self.faults is None else self.faults.next(request)

    def answer(self, request: Request, body: bytes, fault: Fault | None) -> Answer:
        with self._lock:
            self.requests.append(request)
        if fault is not None and not fault.reaches_the_store:
            answer = Answer(200, {}, b"")
            fault.spoiler(answer)
            return answer
        with self._lock:
            rule = next(
                (
                    rule
                    for rule in self._rules
                    if rule.times and rule.method == request.method and request.path.endswith(rule.path)
                ),
                None,
            )
            if rule is not None:
                rule.times -= 1
        passed = {name: value for name, value in request.headers.items() if name not in self.forgotten}
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        try:
            connection.request(request.method, request.path + self.added, body, passed)
            response = connection.getresponse()
            answer = Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()
        for spoiling in (rule, fault):
            if spoiling is not None:
                spoiling.spoiler(answer)
        return answer


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    meddler: Meddler

    def _any(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", 0))
        request = Request(self.command, self.path, headers)
        fault = self.meddler.fault(request)
        if fault is not None and fault.hangs_up:
            self.rfile.read(length // 2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if len(body) < length:  # the client is gone; a store takes no half of an object
            self.close_connection = True
            return
        answer = self.meddler.answer(request, body, fault)
        skipped = ("connection", "expect", "transfer-encoding")
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in skipped and (name.lower() != "content-length" or self.command == "HEAD"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(answer.body) + answer.missing))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.sent])
            self.wfile.flush()
        if answer.garbage:
            with socket.socket(fileno=os.dup(self.connection.fileno())) as below:
                below.sendall(answer.garbage)
        self.close_connection = True

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _any  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # server_close waits for them
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Ends the connections that clients keep open, too: their threads would be waited for for ever."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what some tests are about."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


@contextmanager
def meddling(upstream: str, tls: ssl.SSLContext | None = None) -> Iterator[Meddler]:
    """A `Meddler` before the http endpoint `upstream`, with https where there is a `tls`."""
    meddler = Meddler(upstream)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"meddler": meddler}))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    meddler.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield meddler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A fresh certificate for 127.0.0.1, which nobody trusts: its file, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test's store")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "store.crt", folder / "store.key"
    public.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return public, context


# --- what a Meddler may be told --------------------------------------------------------------------------------------


def cut_after(n: int) -> Spoiler:
    """The connection ends after `n` bytes of the body."""

    def spoiler(answer: Answer) -> None:
        answer.sent = n

    return spoiler


def cut_after_all(answer: Answer) -> None:
    """The connection ends after all of the body, of which the answer says that there is more."""
    answer.missing = 1


def lengthened(answer: Answer) -> None:
    """The body has a byte more, and the answer says so."""
    answer.body += b"!"


def shortened_to(n: int) -> Spoiler:
    """The body has `n` bytes, and the answer says so: nothing looks broken."""

    def spoiler(answer: Answer) -> None:
        answer.body = answer.body[:n]

    return spoiler


def flipped(position: int) -> Spoiler:
    """One byte of the body is another."""

    def spoiler(answer: Answer) -> None:
        body = bytearray(answer.body)
        body[position] ^= 0x20
        answer.body = bytes(body)

    return spoiler


def bit_flipped(number: int) -> Spoiler:
    """One bit of the body is another."""

    def spoiler(answer: Answer) -> None:
        body = bytearray(answer.body)
        body[number // 8] ^= 1 << number % 8
        answer.body = bytes(body)

    return spoiler


def refused(status: int, code: str, *, sts: bool = False) -> Spoiler:
    """An error of S3 or STS without a message, as Ceph gives them."""

    def spoiler(answer: Answer) -> None:
        answer.status = status
        answer.headers = {"Content-Type": "application/xml"}
        error = f"<Error><Code>{code}</Code></Error>"
        answer.body = (f"<ErrorResponse>{error}</ErrorResponse>" if sts else error).encode()

    return spoiler


def late(seconds: float) -> Spoiler:
    """The answer comes, but not soon."""
    return lambda answer: time.sleep(seconds)


def halved(answer: Answer) -> None:
    """The connection ends in the middle of the body."""
    answer.sent = len(answer.body) // 2


def is_listing(answer: Answer) -> bool:
    return b"<ListBucketResult" in answer.body


def one_byte_flipped(answer: Answer) -> None:
    if answer.body:
        flipped(len(answer.body) // 2)(answer)


def unchanged(answer: Answer) -> None:
    """Nothing is wrong with the answer itself."""


def header(name: str, value: str) -> Spoiler:
    """A header of the answer says something else."""

    def spoiler(answer: Answer) -> None:
        answer.headers = {k: v for k, v in answer.headers.items() if k.lower() != name.lower()} | {name: value}

    return spoiler


KINDS = (
    Fault("500", refused(500, "InternalError"), reaches_the_store=False),
    Fault("503", refused(503, "SlowDown"), reaches_the_store=False),
    Fault("429", refused(429, "TooManyRequests"), reaches_the_store=False),
    Fault("500 although it was done", refused(500, "InternalError")),
    Fault("reset", unchanged, hangs_up=True),
    Fault("no answer although it was done", cut_after(0), only=("GET",)),
    Fault("cut", halved, only=("GET",)),
    Fault("flipped", one_byte_flipped, only=("GET",)),
    Fault("late", late(0.3)),
    Fault("stalled", late(3)),
)
"""What stores and networks do; a client waits less than `stalled` takes."""


# --- a real store ----------------------------------------------------------------------------------------------------

REAL_STORE = {
    "AWS_ENDPOINT_URL": "S3_TEST_ENDPOINT",
    "AWS_CA_BUNDLE": "S3_TEST_CA_BUNDLE",
    "AWS_ACCESS_KEY_ID": "S3_TEST_ACCESS_KEY",
    "AWS_SECRET_ACCESS_KEY": "S3_TEST_SECRET_KEY",
}
OTHER_USER = {
    "AWS_ACCESS_KEY_ID": "S3_TEST_OTHER_ACCESS_KEY",
    "AWS_SECRET_ACCESS_KEY": "S3_TEST_OTHER_SECRET_KEY",
}


def real_store(names: dict[str, str]) -> dict[str, str] | None:
    """AWS's variables for the real store that the environment names; None where it names none."""
    if any(not os.environ.get(source) for source in names.values() if source != "S3_TEST_CA_BUNDLE"):
        return None
    return {name: os.environ[source] for name, source in names.items() if os.environ.get(source)}
