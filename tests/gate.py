"""A store that looks at signatures: whose keys they are made with, and whether these are still good.

Moto takes any. In front of it stands a proxy with a `Gate`, which computes each signature anew, as AWS's page on
Signature Version 4 says.
"""

from __future__ import annotations

import hashlib
import hmac
import http.server
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tests.servers import Answer, Fault, Faults, Request, refused

AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/(?P<scope>[^,]+), ?SignedHeaders=(?P<headers>[^,]+), ?"
    r"Signature=(?P<signature>[0-9a-f]{64})"
)
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Keys:
    """Credentials of a session."""

    access: str
    secret: str
    token: str

    def as_process(self, good_for: timedelta = HOUR) -> str:
        """As a `credential_process` prints them."""
        return json.dumps({
            "Version": 1,
            "AccessKeyId": self.access,
            "SecretAccessKey": self.secret,
            "SessionToken": self.token,
            "Expiration": _until(good_for),
        })  # fmt: skip

    def as_endpoint(self, good_for: timedelta = HOUR) -> str:
        """As a container's endpoint answers."""
        said = json.loads(self.as_process(good_for))
        return json.dumps(said | {"Token": said.pop("SessionToken")})

    def as_file(self) -> str:
        """As a file of credentials has them."""
        return (
            f"[default]\naws_access_key_id = {self.access}\naws_secret_access_key = {self.secret}\n"
            f"aws_session_token = {self.token}\n"
        )

    def as_role(self, answer: Answer) -> None:
        """As STS answers."""
        answer.status, answer.headers = 200, {"Content-Type": "text/xml"}
        answer.body = (
            '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            "<AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>{self.access}</AccessKeyId><SecretAccessKey>{self.secret}</SecretAccessKey>"
            f"<SessionToken>{self.token}</SessionToken><Expiration>{_until(HOUR)}</Expiration>"
            "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        ).encode()


def _until(good_for: timedelta) -> str:
    return (datetime.now(UTC) + good_for).strftime("%Y-%m-%dT%H:%M:%SZ")


class Gate(Faults):
    """Lets pass what is signed with the keys of now.

    Args:
        renewed: told of new keys before the old ones expire.
    """

    def __init__(self, renewed: Callable[[Keys], None] = lambda keys: None) -> None:
        super().__init__([], share=0)
        self.keys = self._new()
        self._old: set[str] = set()
        self._renewed = renewed
        self._plan: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        renewed(self.keys)

    def expire_at(self, method: str, path: str) -> None:
        """Have the keys expire as the next request of that method comes whose path has `path` in it."""
        self._plan.append((method, path))

    def expire(self) -> None:
        self._old.add(self.keys.access)
        self.keys = self._new()
        self._renewed(self.keys)
        self.done["expired"] += 1

    def next(self, request: Request) -> Fault | None:
        """Why the request is not let through."""
        with self._lock:
            due = next((p for p in self._plan if p[0] == request.method and p[1] in request.path), None)
            if due is not None:
                self._plan.remove(due)
                self.expire()
            signed = AUTHORIZATION.fullmatch(request.headers.get("authorization", ""))
            if signed is None:  # a role is asked for without a signature
                return Fault("a role", self.keys.as_role, reaches_the_store=False)
            if signed["key"] in self._old:
                return self._refusal(400, "ExpiredToken")
            if signed["key"] != self.keys.access:
                return self._refusal(403, "InvalidAccessKeyId")
            if request.headers.get("x-amz-security-token") != self.keys.token:
                return self._refusal(400, "InvalidToken")
            if signature(request, self.keys.secret, signed["scope"], signed["headers"]) != signed["signature"]:
                return self._refusal(403, "SignatureDoesNotMatch")
            self.done["let through"] += 1
            return None

    def _refusal(self, status: int, code: str) -> Fault:
        self.done[code] += 1
        return Fault(code, refused(status, code), reaches_the_store=False)

    @staticmethod
    def _new() -> Keys:
        return Keys(f"ASIA{secrets.token_hex(8).upper()}", secrets.token_hex(20), secrets.token_hex(40))


def signature(request: Request, secret: str, scope: str, headers: str) -> str:
    """That of AWS's Signature Version 4, hexadecimal."""
    path, _, query = request.path.partition("?")
    pairs = sorted(pair if "=" in pair else f"{pair}=" for pair in query.split("&") if pair)
    named = [f"{name}:{' '.join(request.headers.get(name, '').split())}\n" for name in headers.split(";")]
    payload = request.headers["x-amz-content-sha256"]
    canonical = "\n".join([request.method, path, "&".join(pairs), "".join(named), headers, payload])
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signed = f"AWS4-HMAC-SHA256\n{request.headers['x-amz-date']}\n{scope}\n{digest}"
    return hmac.digest(key, signed.encode(), "sha256").hex()


@contextmanager
def endpoint_of(answer: Callable[[], str]) -> Iterator[str]:
    """A container's endpoint of credentials on loopback; gives its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answer().encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/credentials"
        finally:
            server.shutdown()
            thread.join()
