"""The rows of a request as what a model takes: an array, or a data frame with its columns."""

import base64
import binascii
from dataclasses import dataclass
from typing import Any


class InputError(Exception):
    """The data does not fit; the message says what to change."""


@dataclass(frozen=True)
class Column:
    """A column that a model was trained on; the type is MLflow's name for it, where known."""

    name: str
    type: str | None = None


def model_input(
    data: list[Any],
    *,
    dtype: str | None = None,
    columns: list[Column] | None = None,
    tensor_type: Any = None,
) -> Any:
    """Make the model's input.

    Records, and rows of a model that knows its columns, become a data frame; all else an array.
    A `dtype` casts; without one, columns get the types of the model's signature, if it has one.
    """
    _refuse_what_has_no_shape(data)
    wanted = _numpy_type(dtype)
    if isinstance(data[0], dict):
        return _cast(_frame_of_records(data), wanted, columns or [])
    if columns:
        return _cast(_frame_of_rows(data, columns), wanted, columns)
    return _array(data, tensor_type if wanted is None else wanted)


def _refuse_what_has_no_shape(data: list[Any]) -> None:
    if not data:
        raise InputError("data holds no row.")
    first = data[0]
    kind = _kind(first)
    if kind != "value" and not first:
        raise InputError("The rows of data hold no value.")
    for number, row in enumerate(data, 1):
        if _kind(row) != kind:
            raise InputError(f"Row {number} of data is a {_kind(row)}, but row 1 is a {kind}.")
        if kind == "list" and len(row) != len(first):
            raise InputError(
                f"Row {number} of data has {len(row)} values, but row 1 has {len(first)}."
            )
        if kind == "record" and row.keys() != first.keys():
            names = ", ".join(sorted(map(repr, row.keys() ^ first.keys())))
            raise InputError(
                f"Row {number} of data has not the columns of row 1: they differ in {names}."
            )


def _kind(row: Any) -> str:
    if isinstance(row, dict):
        return "record"
    return "list" if isinstance(row, list) else "value"


def _numpy_type(dtype: str | None) -> Any:
    if dtype is None:
        return None
    import numpy as np

    try:
        wanted = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):
        raise InputError(f"dtype {dtype!r} is no numpy type; try float64 or int64.") from None
    if wanted.hasobject or wanted.kind == "V":
        raise InputError(f"dtype {dtype!r} is not allowed; name a type of plain values.")
    return wanted


def _array(data: list[Any], wanted: Any) -> Any:
    import numpy as np

    try:
        array = np.array(data, dtype=wanted)
        if array.dtype.hasobject and _has_only_numbers(array):
            array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"data cannot become an array: {_first_line(error)}") from None
    return array


def _has_only_numbers(array: Any) -> bool:
    """Whether only null keeps an array from being one of numbers."""
    return all(item is None or isinstance(item, int | float) for item in array.flat)


def _frame_of_records(data: list[Any]) -> Any:
    import pandas as pd

    return pd.DataFrame.from_records(data, columns=list(data[0]))


def _frame_of_rows(data: list[Any], columns: list[Column]) -> Any:
    import pandas as pd

    rows = data if isinstance(data[0], list) else [[value] for value in data]
    names = [column.name for column in columns]
    if len(rows[0]) != len(names):
        raise InputError(
            f"The rows of data have {len(rows[0])} values, but the model takes {len(names)}: "
            f"{', '.join(names)}."
        )
    return pd.DataFrame(rows, columns=names)


def _cast(frame: Any, wanted: Any, columns: list[Column]) -> Any:
    if wanted is not None:
        try:
            return frame.astype(wanted)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"data cannot be cast to dtype {wanted}: {_first_line(error)}"
            ) from None
    for column in columns:
        if column.name in frame.columns:
            frame[column.name] = _cast_column(frame[column.name], column)
    return frame


def _cast_column(values: Any, column: Column) -> Any:
    """Make of JSON's types what the signature names, where nothing is lost by it.

    What is left as it was, MLflow refuses with a sentence of its own.
    """
    import pandas as pd

    try:
        if column.type in {"double", "float"}:
            if values.dtype.kind in "iuf" or values.isna().all():
                return values.astype("float64" if column.type == "double" else "float32")
        elif column.type == "integer" and values.dtype.kind in "iu":
            if values.between(-(2**31), 2**31 - 1).all():
                return values.astype("int32")
        elif column.type == "datetime":
            return pd.to_datetime(values)
        elif column.type == "binary":
            return values.map(lambda text: base64.b64decode(text, validate=True))
    except (TypeError, ValueError, OverflowError, binascii.Error) as error:
        raise InputError(
            f"Column {column.name!r} of data cannot become {column.type}: {_first_line(error)}"
        ) from None
    return values


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
