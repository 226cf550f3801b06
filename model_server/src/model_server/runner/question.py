"""What a caller asks the model, whatever protocol he speaks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Question:
    """Rows for one function of the model."""

    data: list[Any]
    function: str
    dtype: str | None
    params: dict[str, Any] | None
    reply: Callable[[Any], bytes]
    """The JSON body for this caller, from his part of the prediction."""
