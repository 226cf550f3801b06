"""Both sides of the door, for use on the host: a client, and an upstream that tells what it got.

    door.py ask       requests as JSON on stdin, answers as JSON on stdout
    door.py crowd     the same, all requests at once
    door.py serve     an upstream on each address and port that follows; requires a certificate of
                      the platform
    door.py lie       the same with a certificate that the platform's authority never signed
    door.py reload    a WebSocket held open while the unit reloads
    door.py hold      a WebSocket held open until it breaks, told by the exit status

Standard library only; runs with the host's own Python.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import json
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TLS = Path("/etc/odsp/tls")
LARGE = 50_000_000
#: Seconds that a client gives an answer, and a body on its way.
PATIENCE = 120
FEATURES = ("multipart_uploads", "multipart_downloads")


def client_context(authority: str | None = None) -> ssl.SSLContext:
    """Return the trust of a user who knows one authority, by default the platform's."""
    file = None if authority else str(TLS / "ca.crt")
    return ssl.create_default_context(cafile=file, cadata=authority)


def headers_of(request: dict[str, Any]) -> dict[str, str]:
    """Return the request's headers with its credentials."""
    headers = dict(request.get("headers", {}))
    if request.get("auth"):
        encoded = base64.b64encode(":".join(request["auth"]).encode()).decode()
        headers["Authorization"] = f"Basic {encoded}"
    return headers


def ask(port: int, request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to one request with the seconds it took, or why there was none."""
    started = time.monotonic()
    try:
        answer = exchange(port, request)
    except (OSError, http.client.HTTPException) as error:
        answer = {"status": 0, "text": f"{type(error).__name__}: {error}"}
    return answer | {"seconds": round(time.monotonic() - started, 2)}


def exchange(port: int, request: dict[str, Any]) -> dict[str, Any]:
    """Send one request through the door, as plain text if it says so; return the answer."""
    connection = http.client.HTTPConnection("localhost", port, timeout=PATIENCE)
    if not request.get("plain"):
        connection = http.client.HTTPSConnection(
            "localhost", port, timeout=PATIENCE, context=client_context(request.get("authority"))
        )
    with contextlib.closing(connection):
        body: Any = b"x" * request["size"] if "size" in request else None
        if request.get("streamed"):
            body = iter([body])  # without its length
        method = request.get("method", "GET")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, request["path"], body=body, headers=headers_of(request))
        answer = connection.getresponse()
        text = "" if answer.status == 101 else answer.read().decode(errors="replace")
        return {
            "status": answer.status,
            "headers": {name.lower(): value for name, value in answer.getheaders()},
            "text": text[:100_000],
            "size": len(text),
        }


class Upstream(http.server.BaseHTTPRequestHandler):
    """Tells what it was asked; keeps WebSockets open and sends back what they bring.

    Below /busy/<addresses> those addresses are too busy to answer; /slow/<seconds> takes as long.
    """

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Answer any method; the journal hears of it."""
        print("asked for", self.path, flush=True)
        if self.headers.get("Upgrade") == "websocket":
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "upgrade")
            self.end_headers()
            while data := self.connection.recv(100):
                self.connection.sendall(data)
            return
        if self.path.startswith("/slow/"):
            time.sleep(int(self.path.removeprefix("/slow/")))
        size = int(self.headers.get("Content-Length") or 0)
        left = size
        while left:
            left -= len(self.rfile.read(min(left, 1 << 20)))
        address = self.connection.getsockname()[0]
        told: dict[str, Any] = {
            "address": address,
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "received": size,
        }
        if self.path.endswith("/server-info"):
            told |= {f"{feature}_enabled": True for feature in FEATURES}
        body = json.dumps(told, separators=(",", ":")).encode()
        if self.path == "/large":
            body = bytes(LARGE)
        busy = self.path.startswith("/busy/") and address in self.path
        self.send_response(503 if busy else 302 if self.path == "/moved" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.path == "/moved":
            self.send_header("Location", "/docs")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def serve(ends: list[str], certificate: Path, key: Path) -> None:
    """Answer on each address and port to whom shows a certificate of the platform, for ever."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(TLS / "ca.crt"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificate, key)
    for end in ends:
        address, port = end.split(":")
        server = http.server.ThreadingHTTPServer((address, int(port)), Upstream)
        # The handshake belongs into the connection's thread, or one client stops all others.
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        threading.Thread(target=server.serve_forever).start()


def lie(ends: list[str]) -> None:
    """Serve with the right name, signed by nobody the platform knows."""
    name = subprocess.check_output(["hostname"], text=True).strip()
    files = [Path("/run/odsp-door-lie.crt"), Path("/run/odsp-door-lie.key")]
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    names = f"-subj /CN={name} -addext subjectAltName=DNS:{name}"
    command = f"{make} {names} -out {files[0]} -keyout {files[1]}"
    subprocess.run(command.split(), check=True)
    serve(ends, *files)


def reload(port: int, request: dict[str, Any]) -> list[str]:
    """Return what a WebSocket brings back before and after two reloads of the door."""
    connection = http.client.HTTPSConnection(
        "localhost", port, timeout=PATIENCE, context=client_context()
    )
    with contextlib.closing(connection):
        connection.request("GET", request["path"], headers=headers_of(request))
        socket = connection.sock
        heard = [socket.recv(4096).decode().split()[1]]
        for word in (b"before", b"after", b"later"):
            socket.sendall(word)
            heard.append(socket.recv(100).decode())
            subprocess.run(["systemctl", "reload", "odsp-nginx.service"], check=True)
        return heard


def hold(port: int, request: dict[str, Any], opened: Path) -> None:
    """Send a word along a WebSocket again and again; fail when it does not come back.

    The file `opened` is removed when it has come back once.
    """
    connection = http.client.HTTPSConnection(
        "localhost", port, timeout=PATIENCE, context=client_context()
    )
    connection.request("GET", request["path"], headers=headers_of(request))
    socket = connection.sock
    assert socket.recv(4096).split()[1] == b"101"
    while True:
        socket.sendall(b"word")
        assert socket.recv(100) == b"word"
        opened.unlink(missing_ok=True)
        time.sleep(0.1)


def main() -> None:
    """Entry point."""
    verb, arguments = sys.argv[1], sys.argv[2:]
    if verb == "ask":
        port, *requests = json.load(sys.stdin)
        print(json.dumps([ask(port, request) for request in requests]))
    elif verb == "crowd":
        port, *requests = json.load(sys.stdin)
        with ThreadPoolExecutor(len(requests)) as pool:
            print(json.dumps(list(pool.map(lambda request: ask(port, request), requests))))
    elif verb == "hold":
        file = Path(arguments[0])
        port, request = json.loads(file.read_text())
        hold(port, request, file)
    elif verb == "reload":
        print(json.dumps(reload(*json.load(sys.stdin))))
    elif verb == "serve":
        serve(arguments, TLS / "nginx.crt", TLS / "nginx.key")
    elif verb == "lie":
        lie(arguments)


if __name__ == "__main__":
    main()
