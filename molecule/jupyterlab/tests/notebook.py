"""Run a cell in a kernel of JupyterLab, over TLS and its WebSocket; print its output.

Run on the host with JupyterLab's own environment. Arguments: base URL, certificate, its key, code.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import uuid
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect


def message(code: str) -> str:
    """Return the request to execute the code."""
    header = {
        "msg_id": uuid.uuid4().hex,
        "username": "",
        "session": uuid.uuid4().hex,
        "version": "5.3",
    }
    return json.dumps(
        {
            "header": header | {"msg_type": "execute_request"},
            "parent_header": {},
            "metadata": {},
            "channel": "shell",
            "content": {"code": code, "silent": False},
        }
    )


async def main(base: str, certificate: str, key: str, code: str) -> None:
    """Start a kernel, run the code, print what it prints, shut the kernel down."""
    context = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
    context.load_cert_chain(certificate, key)
    client = AsyncHTTPClient()

    async def ask(path: str, method: str = "GET", **kwargs: Any) -> Any:
        return await client.fetch(
            HTTPRequest(
                f"{base}{path}", method=method, ssl_options=context, request_timeout=60, **kwargs
            )
        )

    page = await ask("lab")
    cookies = [cookie.split(";")[0] for cookie in page.headers.get_list("Set-Cookie")]
    token = next(cookie.split("=", 1)[1] for cookie in cookies if cookie.startswith("_xsrf="))
    headers = {"Cookie": "; ".join(cookies), "X-XSRFToken": token}
    kernel = json.loads((await ask("api/kernels", "POST", body="{}", headers=headers)).body)
    url = f"{base.replace('https', 'wss', 1)}api/kernels/{kernel['id']}/channels"
    socket = await websocket_connect(
        HTTPRequest(
            url, ssl_options=context, headers={"Cookie": headers["Cookie"]}, request_timeout=60
        )
    )
    await socket.write_message(message(code))
    try:
        while (text := await asyncio.wait_for(socket.read_message(), 120)) is not None:
            answer = json.loads(text)
            if answer["msg_type"] == "stream":
                print(answer["content"]["text"], end="")
            elif answer["msg_type"] == "error":
                sys.exit("\n".join(answer["content"]["traceback"]))
            elif answer["msg_type"] == "execute_reply":
                break
    finally:
        socket.close()
        await ask(f"api/kernels/{kernel['id']}", "DELETE", headers=headers)


asyncio.run(main(*sys.argv[1:]))
