"""What one caller wants from the model, whichever protocol it came by."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from .inputs import InputError

FUNCTIONS = ("predict", "predict_proba")


@dataclass
class Question:
    """Rows, and what to do with them."""

    data: list[Any]
    """Rows: lists of values, or records, or single values; `len(data)` of them."""
    function: str
    """`predict` or `predict_proba`."""
    dtype: str | None
    """A numpy type name that the data is cast to."""
    params: dict[str, Any] | None
    """For pyfunc's `predict`."""
    reply: Callable[[Any], bytes]
    """The JSON body for this caller from its part of the prediction.

    Raises NoJsonFormError, or InputError where an output is asked for that there is not.
    """
    body: bytes = b""
    """As it came, where it did; equal ones are the same question."""


def read_object(text: bytes | memoryview) -> dict[str, Any]:
    """The JSON object of a request, or InputError."""
    try:
        content = _DECODER.decode(str(text, "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"The body is not valid UTF-8 (byte {error.start + 1}); send JSON encoded in UTF-8."
        ) from None
    except RecursionError:
        raise InputError("The body is nested too deeply; data needs a few levels only.") from None
    except ValueError as error:
        raise InputError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise InputError(f"The body must be a JSON object, not {json_type(content)}.")
    return content


def json_type(value: Any) -> str:
    """What JSON calls the value, with its article."""
    return _JSON_TYPES.get(type(value), f"a {type(value).__name__}")


def _refuse_constant(name: str) -> NoReturn:
    raise InputError(f"JSON has no {name}; send null for a missing number.")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_JSON_TYPES = {
    type(None): "null",
    bool: "a boolean",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}
