"""Requests with JSON to servers of this machine."""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def call(url: str, body: bytes | None = None, *, method: str = "", timeout: float = 10) -> Any:
    """The JSON that an address answers; raises HTTPError unless it is a success."""
    headers = {"Content-Type": "application/json"}
    request = Request(url, body, headers, method=method or ("POST" if body else "GET"))
    with urlopen(request, timeout=timeout) as response:
        return json.loads(response.read())


def post(url: str, body: bytes) -> tuple[int, Any]:
    """Status and JSON of an answer of any kind; status 0 where there was none."""
    try:
        return 200, call(url, body, timeout=60)
    except HTTPError as error:
        return error.code, None
    except (OSError, HTTPException, ValueError):
        return 0, None
