"""Run a cell in a kernel of JupyterLab, over TLS and its WebSocket; print its output.

Run on the host with JupyterLab's own environment. Reads JSON: the base URL, the code, and either
certificate and key or a user's name and password. Ends with status 3 if the kernel died.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import sys
import uuid
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect

DIED = 3


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


async def main(asked: dict[str, Any]) -> None:
    """Start a kernel, run the code, print what it prints, shut the kernel down."""
    base, headers = asked["base"], {}
    context = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
    if "certificate" in asked:
        context.load_cert_chain(asked["certificate"], asked["key"])
    else:
        encoded = base64.b64encode(":".join(asked["user"]).encode()).decode()
        headers["Authorization"] = f"Basic {encoded}"
    client = AsyncHTTPClient()

    def request(url: str, **options: Any) -> HTTPRequest:
        return HTTPRequest(url, ssl_options=context, request_timeout=60, headers=headers, **options)

    async def ask(path: str, method: str = "GET", **options: Any) -> Any:
        return await client.fetch(request(f"{base}{path}", method=method, **options))

    page = await ask("lab")
    cookies = [cookie.split(";")[0] for cookie in page.headers.get_list("Set-Cookie")]
    token = next(cookie.split("=", 1)[1] for cookie in cookies if cookie.startswith("_xsrf="))
    headers |= {"Cookie": "; ".join(cookies), "X-XSRFToken": token}
    kernel = json.loads((await ask("api/kernels", "POST", body="{}")).body)
    url = f"{base.replace('https', 'wss', 1)}api/kernels/{kernel['id']}/channels"
    socket = await websocket_connect(request(url))
    await socket.write_message(message(asked["code"]))
    try:
        while (text := await asyncio.wait_for(socket.read_message(), 120)) is not None:
            answer = json.loads(text)
            if answer["msg_type"] == "stream":
                print(answer["content"]["text"], end="")
            elif answer["msg_type"] == "error":
                sys.exit("\n".join(answer["content"]["traceback"]))
            elif answer["msg_type"] == "execute_reply":
                break
            elif answer["content"].get("execution_state") in ("restarting", "dead"):
                sys.exit(DIED)
    finally:
        socket.close()
        for _ in range(40):  # a kernel that is just restarting cannot be shut down yet
            delete = request(f"{base}api/kernels/{kernel['id']}", method="DELETE")
            if (await client.fetch(delete, raise_error=False)).code in (204, 404):
                break
            await asyncio.sleep(0.5)


asyncio.run(main(json.load(sys.stdin)))
