"""Runs a cell in a kernel of JupyterLab as its pages do: over TLS and one WebSocket.

For JupyterLab's own environment, and for whoever has a certificate of the platform or comes through
the door with name and password. Messages are jupyter_client's, frames those of the protocol that
the pages choose, the wire is websocket-client's.
"""

import ssl
import time
from collections.abc import Sequence
from typing import Any

import requests
import websocket
from jupyter_client.client import KernelClient
from jupyter_client.session import Session
from jupyter_server.services.kernels.connection import base as frames

PROTOCOL = "v1.kernel.websocket.jupyter.org"
#: A message that does not come within this time never does (seconds).
PATIENCE_S = 120


class Channel:
    """What a client of a kernel takes for its channel: a name for messages on the WebSocket."""

    def __init__(self, name: str, wire: websocket.WebSocket, session: Session) -> None:
        self.name, self.wire, self.session = name, wire, session

    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        frame = frames.serialize_msg_to_ws_v1(message, self.name, self.session.pack)
        self.wire.send_binary(frame)

    def is_alive(self) -> bool:
        """Tell whether messages can be sent."""
        return bool(self.wire.connected)


class Kernel(KernelClient):  # type: ignore[misc]
    """jupyter_client's client of a kernel, by way of a WebSocket."""

    def __init__(self, wire: websocket.WebSocket) -> None:
        # Messages are not signed: TLS has seen to that.
        super().__init__(session=Session(key=b""))
        self.wire = wire
        self._shell_channel = Channel("shell", wire, self.session)

    def message(self) -> dict[str, Any]:
        """Return the next message, of whatever channel."""
        _, parts = frames.deserialize_msg_from_ws_v1(self.wire.recv())
        return dict(self.session.deserialize([b"", *parts]))

    def run(self, code: str) -> dict[str, Any]:
        """Run code; return what it printed, the error that ended it, and if the kernel died."""
        request, printed, error = self.execute(code), "", ""
        while True:
            message = self.message()
            kind, said = message["msg_type"], message["content"]
            if kind == "status" and said["execution_state"] in ("restarting", "dead"):
                return {"printed": printed, "error": error, "died": True}
            if message["parent_header"].get("msg_id") != request:
                continue
            if kind == "stream" and said["name"] == "stdout":
                printed += said["text"]
            elif kind == "error":
                error = "\n".join([f"{said['ename']}: {said['evalue']}", *said["traceback"]])
            elif kind == "status" and said["execution_state"] == "idle":
                return {"printed": printed, "error": error, "died": False}


def connect(session: requests.Session, url: str) -> websocket.WebSocket:
    """Open a kernel's WebSocket with the credentials of a browser's session."""
    prepared = session.prepare_request(requests.Request("GET", url)).headers
    own = {name: prepared[name] for name in ("Authorization", "Cookie") if name in prepared}
    trust: dict[str, Any] = {"ca_certs": session.verify, "cert_reqs": ssl.CERT_REQUIRED}
    if session.cert:
        trust |= {"certfile": session.cert[0], "keyfile": session.cert[1]}
    return websocket.create_connection(
        url.replace("https", "wss", 1), PATIENCE_S, header=own, sslopt=trust,
        subprotocols=[PROTOCOL],
    )  # fmt: skip


def run_cell(
    base: str, code: str, authority: str, pair: str = "", user: Sequence[str] = ()
) -> dict[str, Any]:
    """Run code in a new kernel of the JupyterLab at a URL, which ends afterwards.

    `pair` is the path of a certificate and its key, less .crt and .key; `user` a name with its
    password.
    """
    with requests.Session() as session:
        # Else a variable of the environment outranks the authority given here.
        session.trust_env, session.verify = False, authority
        session.cert = (f"{pair}.crt", f"{pair}.key") if pair else None
        session.auth = (user[0], user[1]) if user else None
        session.get(f"{base}lab", timeout=60).raise_for_status()
        session.headers["X-XSRFToken"] = session.cookies["_xsrf"]
        made = session.post(f"{base}api/kernels", json={}, timeout=60)
        made.raise_for_status()
        kernel = f"{base}api/kernels/{made.json()['id']}"
        wire = connect(session, f"{kernel}/channels")
        try:
            return Kernel(wire).run(code)
        finally:
            wire.close()
            for _ in range(40):  # one that is just starting anew cannot be ended yet
                if session.delete(kernel, timeout=60).status_code in (204, 404):
                    break
                time.sleep(0.5)
