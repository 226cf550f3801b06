"""The body of the native API: `{"data": [...], ...}` in, `{"prediction": ...}` out."""

from typing import Any

from .inputs import InputError, shown
from .question import FUNCTIONS, Question, json_type, read_object
from .values import to_json

_FLAVORS = ("pyfunc", "sklearn")
_FIELDS = {"data", "predict_function", "model_flavor", "dtype", "params"}


def read_native(body: bytes) -> Question:
    """The question in the body of a request, or InputError that says what to change."""
    request = read_object(body)
    if request.keys() - _FIELDS:
        unknown = shown(min(request.keys() - _FIELDS))
        raise InputError(
            f"{unknown} is not known; a prediction takes {', '.join(sorted(_FIELDS))}."
        )
    data = request.get("data")
    if not isinstance(data, list):
        raise InputError(
            "data is missing; send a list of rows."
            if "data" not in request
            else f"data must be a list of rows, not {json_type(data)}."
        )
    _choice(request, "model_flavor", _FLAVORS)
    dtype, params = request.get("dtype"), request.get("params")
    if not isinstance(dtype, str | None):
        raise InputError(f"dtype must be a numpy type name or null, not {json_type(dtype)}.")
    if not isinstance(params, dict | None):
        raise InputError(f"params must be an object or null, not {json_type(params)}.")
    return Question(
        data=data,
        function=_choice(request, "predict_function", FUNCTIONS),
        dtype=dtype,
        params=params,
        reply=_reply,
        body=body,
    )


def _choice(request: dict[str, Any], field: str, choices: tuple[str, ...]) -> str:
    value = request.get(field, choices[0])
    if not isinstance(value, str) or value not in choices:
        told = shown(value) if isinstance(value, str) else json_type(value)
        raise InputError(f"{field} must be {' or '.join(choices)}, not {told}.")
    return value


def _reply(prediction: Any) -> bytes:
    return b'{"prediction":' + to_json(prediction) + b"}"
