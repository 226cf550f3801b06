"""The native protocol: `data` in, `prediction` out."""

import json
from typing import Any

from .inputs import InputError
from .question import Question
from .values import to_json


def read_native(body: bytes) -> Question:
    """Read the body of a prediction request, which a worker has validated."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"The request cannot be read: {error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("data"), list):
        raise InputError("The request cannot be read: it has no list 'data'.")
    return Question(
        data=request["data"],
        function=request.get("predict_function", "predict"),
        dtype=request.get("dtype"),
        params=request.get("params"),
        reply=_reply,
    )


def _reply(prediction: Any) -> bytes:
    return b'{"prediction":' + to_json(prediction) + b"}"
