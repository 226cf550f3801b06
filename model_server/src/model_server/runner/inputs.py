"""The rows of a request as what a model takes: an array, or a data frame with its columns."""

import base64
import binascii
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

_NAMES_SHOWN = 5
_LONGEST_NAME = 60
_LONGEST_TEXT_TYPE = 4096
_INT64 = range(-(2**63), 2**64)


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
    A `dtype` casts; then columns get the types of the model's signature, where nothing is lost by
    it. Raises InputError.
    """
    _refuse_what_has_no_shape(data)
    wanted = _numpy_type(dtype)
    if isinstance(data[0], dict):
        return _typed(_frame_of_records(data), wanted, columns or [])
    if columns:
        rows = data if isinstance(data[0], list) else [[value] for value in data]
        if wanted is None and _are_doubles(rows, columns):
            return _frame_of_doubles(rows, columns)
        return _typed(_frame_of_rows(rows, columns), wanted, columns)
    return _array(data, tensor_type if wanted is None else wanted)


def _refuse_what_has_no_shape(data: list[Any]) -> None:
    """Whether all rows are alike; looked at as a whole first, as most requests are right."""
    if not data:
        raise InputError("data holds no row.")
    first, types = data[0], set(map(type, data))
    if types == {list}:
        alike = len(set(map(len, data))) == 1
    elif types == {dict}:
        keys = first.keys()
        alike = all(row.keys() == keys for row in data)
    else:
        alike = not types & {list, dict}
    if not alike:
        _tell_first_other_row(data)
    if types <= {list, dict} and not first:
        raise InputError("The rows of data hold no value.")


def _tell_first_other_row(data: list[Any]) -> None:
    first, kind = data[0], _kind(data[0])
    for number, row in enumerate(data, 1):
        if _kind(row) != kind:
            raise InputError(f"Row {number} of data is a {_kind(row)}, but row 1 is a {kind}.")
        if kind == "list" and len(row) != len(first):
            raise InputError(
                f"Row {number} of data has {len(row)} values, but row 1 has {len(first)}."
            )
        if kind == "record" and row.keys() != first.keys():
            raise InputError(
                f"Row {number} of data has not the columns of row 1: they differ in "
                f"{_few(sorted(row.keys() ^ first.keys()))}."
            )


def _kind(row: Any) -> str:
    if isinstance(row, dict):
        return "record"
    return "list" if isinstance(row, list) else "value"


def _numpy_type(dtype: str | None) -> Any:
    if dtype is None:
        return None
    import numpy as np

    told = shown(dtype)
    try:
        wanted = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError, LookupError, OverflowError):
        raise InputError(f"dtype {told} is no numpy type; try float64 or int64.") from None
    if wanted.hasobject or wanted.kind not in "biufcmMSU" or wanted.itemsize > _LONGEST_TEXT_TYPE:
        raise InputError(f"dtype {told} is not allowed; name a type of plain values.")
    return wanted


def _array(data: list[Any], wanted: Any) -> Any:
    import numpy as np

    try:
        array = np.array(data, dtype=wanted)
        if wanted is None and array.dtype.kind in "OU":
            array = _array_of_mixed(data, array)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"data cannot become an array: {_first_line(error)}.") from None
    _refuse_infinity(array)
    return array


def _array_of_mixed(data: list[Any], array: Any) -> Any:
    """Numbers with null among them as floats; texts and numbers together as they are."""
    import numpy as np

    if array.dtype.kind == "U":
        items = np.array(data, dtype=object)
        return array if all(isinstance(item, str) for item in items.flat) else items
    if not all(item is None or isinstance(item, int | float) for item in array.flat):
        return array
    for item in array.flat:
        if isinstance(item, int) and item not in _INT64:
            raise InputError(
                "data holds a whole number beyond 64 bits; write it with a decimal point, or "
                "give a dtype."
            )
    return array.astype(np.float64)


def _refuse_infinity(array: Any) -> None:
    """JSON has no infinity: it comes from a number, such as 1e400, that no float can hold."""
    import numpy as np

    if array.dtype.kind == "f" and np.isinf(array).any():
        raise InputError(f"data holds a number too big for a {array.dtype}.")


def _frame_of_records(data: list[Any]) -> Any:
    import pandas as pd

    try:
        return pd.DataFrame({name: [row[name] for row in data] for name in data[0]})
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"data cannot become a data frame: {_first_line(error)}.") from None


def _are_doubles(rows: list[Any], columns: list[Column]) -> bool:
    return (
        len(rows[0]) == len(columns)
        and all(column.type == "double" for column in columns)
        and set(map(type, chain.from_iterable(rows))) <= {int, float}
    )


def _frame_of_doubles(rows: list[Any], columns: list[Column]) -> Any:
    """The most frequent case, several times faster than column by column."""
    import numpy as np
    import pandas as pd

    array = _array(rows, np.float64)
    return pd.DataFrame(array, columns=[column.name for column in columns], copy=False)


def _frame_of_rows(rows: list[Any], columns: list[Column]) -> Any:
    import pandas as pd

    names = [column.name for column in columns]
    if len(rows[0]) != len(names):
        raise InputError(
            f"The rows of data have {len(rows[0])} values, but the model takes {len(names)}: "
            f"{_few(names)}."
        )
    try:
        return pd.DataFrame(rows, columns=names)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"data cannot become a data frame: {_first_line(error)}.") from None


def _typed(frame: Any, wanted: Any, columns: list[Column]) -> Any:
    if wanted is not None:
        try:
            frame = frame.astype(wanted)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"data cannot be cast to dtype {wanted}: {_first_line(error)}."
            ) from None
    for column in columns:
        if column.type in _CASTS and column.name in frame.columns:
            values = frame[column.name]
            cast = _cast_column(values, column, column.type)
            if cast is not values:
                frame[column.name] = cast
    _refuse_infinite_columns(frame)
    return frame


def _refuse_infinite_columns(frame: Any) -> None:
    import numpy as np

    for name, type_ in frame.dtypes.items():
        if type_.kind == "f" and np.isinf(frame[name].to_numpy()).any():
            raise InputError(
                f"Column {shown(str(name))} of data holds a number too big for a {type_}."
            )


def _cast_column(values: Any, column: Column, type_: str) -> Any:
    """Make of JSON's types what the signature names, where nothing is lost by it."""
    needed, cast = _CASTS[type_]
    try:
        result = cast(values)
    except (TypeError, ValueError, OverflowError, binascii.Error) as error:
        raise InputError(
            f"Column {shown(column.name)} of data must hold {needed}: {_first_line(error)}."
        ) from None
    if result is None:
        raise InputError(f"Column {shown(column.name)} of data must hold {needed}.")
    return result


def _to_float(dtype: str) -> Callable[[Any], Any]:
    def cast(values: Any) -> Any:
        if values.dtype == dtype:
            return values
        if values.dtype.kind in "iuf" or _holds_only(values, (int, float)):
            return values.astype(dtype)
        return None

    return cast


def _to_integer(bits: int) -> Callable[[Any], Any]:
    bound = 2 ** (bits - 1)

    def cast(values: Any) -> Any:
        if values.dtype == f"int{bits}":
            return values
        whole = values.dtype.kind in "iu" or (
            values.dtype.kind == "f" and bool((values % 1 == 0).all())
        )
        # Not `between`: a float64 cannot tell the bound from the number below it.
        if whole and bool(((values >= -bound) & (values < bound)).all()):
            return values.astype(f"int{bits}")
        return None

    return cast


def _to_text(values: Any) -> Any:
    return values if _holds_only(values, (str,)) else None


def _to_datetime(values: Any) -> Any:
    import pandas as pd

    if values.dtype.kind == "M":
        return values
    return pd.to_datetime(values) if _holds_only(values, (str,)) else None


def _to_bytes(values: Any) -> Any:
    return values.map(
        lambda item: item if isinstance(item, bytes) else base64.b64decode(item, validate=True)
    )


def _holds_only(values: Any, types: tuple[type, ...]) -> bool:
    """Whether a column of Python's objects has only values of these types, or missing ones."""
    return not any(isinstance(item, bool) for item in values) and all(
        isinstance(item, types) for item in values if not _missing(item)
    )


def _missing(item: Any) -> bool:
    return item is None or item != item  # noqa: PLR0124  only NaN is not itself


_CASTS: dict[str | None, tuple[str, Callable[[Any], Any]]] = {
    "double": ("numbers (double)", _to_float("float64")),
    "float": ("numbers (float)", _to_float("float32")),
    "integer": ("whole numbers of 32 bits (integer)", _to_integer(32)),
    "long": ("whole numbers of 64 bits (long)", _to_integer(64)),
    "string": ("texts (string)", _to_text),
    "datetime": ("dates as ISO 8601 texts (datetime)", _to_datetime),
    "binary": ("bytes as Base64 texts (binary)", _to_bytes),
}
"""What a column of a type of MLflow's must hold, and how it gets there."""


def _few(names: Iterable[str]) -> str:
    """Names from outside, short enough for a sentence."""
    first = [shown(name) for name in islice(names, _NAMES_SHOWN + 1)]
    return ", ".join(first[:_NAMES_SHOWN]) + (", ..." if len(first) > _NAMES_SHOWN else "")


def shown(text: str) -> str:
    """A text from outside, short enough for a sentence."""
    return repr(text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}...")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
