"""Try to write into an S3 store in somebody else's name; standard library only.

Two holes were left open in the last MinIO source (CVE-2026-41145, CVE-2026-40344): whoever knew an
access key wrote without its secret. This program really sends those requests, and their relatives,
and looks afterwards whether the object is there. The same requests properly signed must succeed,
otherwise a refusal proves nothing.

    holes.py --binary PATH              a server of its own on loopback, thrown away afterwards
    holes.py --url URL [--ca FILE]      a running server; the account comes from
                                        ODSP_HOLES_ACCESS_KEY, _SECRET_KEY and _BUCKET

One line per try; the exit status is 1 if any went the wrong way.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import hashlib
import hmac
import http.client
import io
import os
import re
import secrets
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
UNSIGNED = "UNSIGNED-PAYLOAD"
REGION = "us-east-1"
#: How a server refuses; 0 is one that hangs up before it has read all of the request.
REFUSALS = (0, 400, 403)
EXTRACT = {"X-Amz-Meta-Snowball-Auto-Extract": "true"}


@dataclass
class Answer:
    """What the server said."""

    status: int
    body: bytes


@dataclass
class Request:
    """One S3 request, before anybody signed it."""

    method: str
    path: str
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    payload: str = UNSIGNED


@dataclass
class Store:
    """A server and the account whose name is abused."""

    url: str
    access_key: str
    secret_key: str
    bucket: str
    ca: str | None = None

    def send(self, request: Request) -> Answer:
        """Send a request exactly as it is."""
        parts = urllib.parse.urlsplit(self.url)
        host, port = parts.hostname or "", parts.port
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=self.ca)
            connection = http.client.HTTPSConnection(host, port, timeout=60, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=60)
        target = request.path + ("?" + canonical_query(request.query) if request.query else "")
        try:
            connection.request(request.method, target, request.body, request.headers)
            response = connection.getresponse()
            return Answer(response.status, response.read())
        except (BrokenPipeError, ConnectionResetError):
            # The server may refuse before it has read the body.
            return Answer(0, b"")
        finally:
            connection.close()

    def scope(self, when: datetime.datetime) -> str:
        """Return the scope of a credential."""
        return f"{when:%Y%m%d}/{REGION}/s3/aws4_request"

    def signature(self, secret: str, when: datetime.datetime, canonical: str) -> str:
        """Return the version 4 signature of a canonical request."""
        key = b"AWS4" + secret.encode()
        for part in self.scope(when).split("/"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{when:%Y%m%dT%H%M%SZ}\n{self.scope(when)}\n{digest}"
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()

    def signed(self, request: Request, secret: str | None = None, age: float = 0.0) -> Request:
        """Return the request with an Authorization header."""
        when = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)
        headers = request.headers | {
            "Host": urllib.parse.urlsplit(self.url).netloc,
            "X-Amz-Date": f"{when:%Y%m%dT%H%M%SZ}",
            "X-Amz-Content-Sha256": request.payload,
        }
        lower = {name.lower(): value for name, value in headers.items()}
        names = sorted(lower)
        canonical = "\n".join(
            [
                request.method,
                request.path,
                canonical_query(request.query),
                *[f"{name}:{lower[name]}" for name in names],
                "",
                ";".join(names),
                request.payload,
            ]
        )
        signature = self.signature(secret or self.secret_key, when, canonical)
        headers["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.access_key}/{self.scope(when)},"
            f"SignedHeaders={';'.join(names)},Signature={signature}"
        )
        return Request(request.method, request.path, request.query, headers, request.body)

    def presigned(
        self, request: Request, secret: str | None = None, payload: str | None = None
    ) -> Request:
        """Return the request with its credential and signature in the query string."""
        when = datetime.datetime.now(datetime.UTC)
        lower = {name.lower(): value for name, value in request.headers.items()}
        lower["host"] = urllib.parse.urlsplit(self.url).netloc
        names = sorted(lower)
        query = request.query | {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{self.access_key}/{self.scope(when)}",
            "X-Amz-Date": f"{when:%Y%m%dT%H%M%SZ}",
            "X-Amz-Expires": "600",
            "X-Amz-SignedHeaders": ";".join(names),
        }
        if payload:
            query["X-Amz-Content-Sha256"] = payload
        canonical = "\n".join(
            [
                request.method,
                request.path,
                canonical_query(query),
                *[f"{name}:{lower[name]}" for name in names],
                "",
                ";".join(names),
                payload or request.payload,
            ]
        )
        query["X-Amz-Signature"] = self.signature(secret or self.secret_key, when, canonical)
        headers = request.headers | {"X-Amz-Content-Sha256": request.payload}
        return Request(request.method, request.path, query, headers, request.body)

    def credential_only(self, request: Request) -> Request:
        """Return the request with a credential in the query string and nothing that proves it."""
        when = datetime.datetime.now(datetime.UTC)
        query = request.query | {"X-Amz-Credential": f"{self.access_key}/{self.scope(when)}"}
        return Request(
            request.method,
            request.path,
            query,
            request.headers | {"X-Amz-Content-Sha256": request.payload},
            request.body,
        )

    def anonymous(self, request: Request) -> Request:
        """Return the request without any credential."""
        headers = request.headers | {"X-Amz-Content-Sha256": request.payload}
        return Request(request.method, request.path, request.query, headers, request.body)

    def content(self, key: str) -> bytes | None:
        """Return what is really stored, asked with the right secret; None if nothing is."""
        answer = self.send(self.signed(Request("GET", f"/{self.bucket}/{key}")))
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise RuntimeError(f"cannot look: {answer.status} {answer.body[:300]!r}")
        return answer.body

    def remove(self, key: str) -> None:
        """Remove what a try left behind."""
        self.send(self.signed(Request("DELETE", f"/{self.bucket}/{key}")))


def canonical_query(query: dict[str, str]) -> str:
    """Return a query string as signature version 4 wants it."""
    quoted = [
        (urllib.parse.quote(name, safe="-_.~"), urllib.parse.quote(value, safe="-_.~"))
        for name, value in query.items()
    ]
    return "&".join(f"{name}={value}" for name, value in sorted(quoted))


def chunked(data: bytes) -> tuple[bytes, dict[str, str]]:
    """Return a body in unsigned chunks with a checksum as trailer, and its headers."""
    crc = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
    body = b"%x\r\n%s\r\n0\r\nx-amz-checksum-crc32:%s\r\n\r\n" % (len(data), data, crc.encode())
    return body, {
        "Content-Encoding": "aws-chunked",
        "X-Amz-Decoded-Content-Length": str(len(data)),
        "X-Amz-Trailer": "x-amz-checksum-crc32",
    }


def tar_of(name: str, data: bytes) -> bytes:
    """Return a tar archive with one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mtime = int(time.time())
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


class Trial:
    """All tries against one store and their verdicts."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.verdicts: list[tuple[bool, str]] = []
        self.prefix = f"holes-{secrets.token_hex(4)}"

    def note(self, good: bool, text: str) -> None:
        """Keep a verdict and say it."""
        self.verdicts.append((good, text))
        print(f"{'ok  ' if good else 'FAIL'}  {text}", flush=True)

    def upload(self, number: int, data: bytes) -> tuple[Request, str]:
        """Return a plain upload with an unsigned payload, and the key it would create."""
        key = f"{self.prefix}-{number}"
        body, headers = chunked(data)
        path = f"/{self.store.bucket}/{key}"
        return Request("PUT", path, {}, headers, body, UNSIGNED_TRAILER), key

    def snowball(self, number: int, data: bytes, framed: bool = True) -> tuple[Request, str]:
        """Return an upload that the server unpacks, and the key it would create."""
        key = f"{self.prefix}-{number}"
        archive = tar_of(key, data)
        body, headers = chunked(archive) if framed else (archive, {})
        path = f"/{self.store.bucket}/{self.prefix}-{number}.tar"
        return Request("PUT", path, {}, headers | EXTRACT, body, UNSIGNED_TRAILER), key

    def judge(self, name: str, request: Request, key: str, data: bytes, allowed: bool) -> None:
        """Send one request and compare answer and effect with what is right."""
        answer = self.store.send(request)
        stored = self.store.content(key)
        said = re.search(rb"<Code>(\w+)</Code>", answer.body)
        code = f"{answer.status} {said.group(1).decode() if said else ''}".strip()
        if allowed:
            good = answer.status == 200 and stored == data
        else:
            good = answer.status in REFUSALS and stored is None
        effect = "object stored" if stored is not None else "no object"
        self.note(good, f"{'allow' if allowed else 'refuse'} {name}: {code}, {effect}")
        self.store.remove(key)

    def part(self, name: str, how: str, allowed: bool) -> None:
        """Try to add a part to somebody's multipart upload."""
        store, key, data = self.store, f"{self.prefix}-part", b"part"
        path = f"/{store.bucket}/{key}"
        begun = store.send(store.signed(Request("POST", path, {"uploads": ""})))
        found = re.search(rb"<UploadId>([^<]+)</UploadId>", begun.body)
        if not found:
            raise RuntimeError(f"no multipart upload: {begun.status} {begun.body[:300]!r}")
        upload = {"uploadId": found.group(1).decode()}
        body, headers = chunked(data)
        request = Request(
            "PUT", path, upload | {"partNumber": "1"}, headers, body, UNSIGNED_TRAILER
        )
        ready = {
            "signed": store.signed,
            "credential": store.credential_only,
            "anonymous": store.anonymous,
        }[how]
        answer = store.send(ready(request))
        listed = store.send(store.signed(Request("GET", path, upload)))
        stored = b"<PartNumber>" in listed.body
        good = stored == allowed and answer.status in ((200,) if allowed else REFUSALS)
        verb = "allow" if allowed else "refuse"
        effect = "part stored" if stored else "no part"
        self.note(good, f"{verb} {name}: {answer.status}, {effect}")
        store.send(store.signed(Request("DELETE", path, upload)))

    def run(self) -> bool:
        """Do everything; True if nothing went the wrong way."""
        store, data, wrong = self.store, b"written by a stranger", "not-the-secret"
        number = 0
        kinds: list[tuple[str, Callable[[int, bytes], tuple[Request, str]]]] = [
            ("upload", self.upload),
            ("snowball", self.snowball),
        ]
        for kind, make in kinds:
            tries: list[tuple[str, Callable[[Request], Request], bool]] = [
                ("signed in the header", store.signed, True),
                ("presigned", store.presigned, True),
                ("with an access key in the query and no signature", store.credential_only, False),
                ("presigned with a wrong secret", lambda r: store.presigned(r, wrong), False),
                (
                    "signed in the header with a wrong secret",
                    lambda r: store.signed(r, wrong),
                    False,
                ),
                ("without any credential", store.anonymous, False),
                ("signed an hour ago", lambda r: store.signed(r, age=3600), False),
                (
                    "signed in the header, with another access key in the query",
                    lambda r: store.credential_only(store.signed(r)),
                    False,
                ),
                (
                    "presigned for other content",
                    lambda r: store.presigned(r, payload=hashlib.sha256(b"other").hexdigest()),
                    False,
                ),
            ]
            for name, prepare, allowed in tries:
                number += 1
                request, key = make(number, data)
                self.judge(f"{kind} {name}", prepare(request), key, data, allowed)
        number += 1
        request, key = self.snowball(number, data, framed=False)
        name = "snowball without chunks, with an access key in the query"
        self.judge(name, store.credential_only(request), key, data, False)
        self.part("part signed in the header", "signed", True)
        self.part("part with an access key in the query and no signature", "credential", False)
        self.part("part without any credential", "anonymous", False)
        return all(good for good, _ in self.verdicts)


def free_ports() -> tuple[int, int]:
    """Return two ports nobody listens on."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(two.getsockname()[1])


@contextlib.contextmanager
def own_server(binary: Path) -> Iterator[Store]:
    """Run a server of our own on loopback and give it a bucket."""
    port, console_port = free_ports()
    user, password = "holes-" + secrets.token_hex(4), secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        env = {
            "PATH": os.environ["PATH"],
            "HOME": folder,
            "MINIO_ROOT_USER": user,
            "MINIO_ROOT_PASSWORD": password,
            "MINIO_UPDATE": "off",
            "MINIO_CI_CD": "1",
        }
        command = [str(binary), "server", "--quiet", "--address", f"127.0.0.1:{port}"]
        command += ["--console-address", f"127.0.0.1:{console_port}", f"{folder}/data"]
        with (
            (Path(folder) / "log").open("w+b") as log,
            subprocess.Popen(command, env=env, stdout=log, stderr=log) as server,
        ):
            try:
                store = Store(f"http://127.0.0.1:{port}", user, password, "holes")
                deadline = time.monotonic() + 60
                while True:
                    with contextlib.suppress(OSError):
                        made = store.send(store.signed(Request("PUT", "/holes")))
                        if made.status == 200:
                            break
                    if server.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise RuntimeError(f"{binary} does not serve: {log.read()[-600:]!r}")
                    time.sleep(0.2)
                yield store
            finally:
                server.kill()


def main() -> int:
    """Run the tries and return the exit status."""
    parser = argparse.ArgumentParser(description="Try to write in somebody else's name.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--binary", type=Path, help="start this server on loopback")
    target.add_argument("--url", help="a running server")
    parser.add_argument("--ca", help="PEM file of the authority to trust")
    given = parser.parse_args()
    if given.binary:
        with own_server(given.binary) as store:
            return 0 if Trial(store).run() else 1
    env = os.environ
    store = Store(
        given.url,
        env["ODSP_HOLES_ACCESS_KEY"],
        env["ODSP_HOLES_SECRET_KEY"],
        env["ODSP_HOLES_BUCKET"],
        given.ca,
    )
    return 0 if Trial(store).run() else 1


if __name__ == "__main__":
    sys.exit(main())
