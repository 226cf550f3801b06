"""The rows of a request as what a model takes: an array, or a data frame with its columns."""

import base64
import binascii
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

_NAMES_SHOWN = 5
_LONGEST_NAME = 60
_LONGEST_TYPE_NAME = 64
_FIRST_PANDAS_WITH_ISO = 2
_INT64 = range(-(2**63), 2**64)
_WIDEST_NUMBER = 16
"""Bytes; of values no wider than this, an array takes little more than the rows it is made of."""
_NUMBERS = frozenset((int, float, bool, type(None)))
_CHARACTER = 4
"""Bytes of a character in an array of texts."""
_LONGEST_NUMBER = 64
"""Characters of a number as a text, at most."""
_LARGEST_TEXTS = 2**28
"""Bytes of an array of texts, in which each takes as much as the longest."""


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
    A `dtype` casts; then columns, or the array, get the types of the model's signature, where
    nothing is lost by it. Raises InputError.
    """
    _refuse_what_has_no_shape(data)
    wanted = _numpy_type(dtype)
    try:
        if isinstance(data[0], dict):
            return _typed(_frame_of_records(data), wanted, columns or [])
        if columns:
            rows = data if isinstance(data[0], list) else [[value] for value in data]
            if wanted is None and _are_doubles(rows, columns):
                return _frame_of_doubles(rows, columns)
            return _typed(_frame_of_rows(rows, columns), wanted, columns)
        return _tensor(data, wanted, tensor_type)
    except MemoryError:
        raise InputError(
            "data takes more memory than the model's process has; send fewer rows at a time."
        ) from None


def as_they_are(data: list[Any]) -> list[Any]:
    """Rows for a model that says itself what it takes. Raises InputError."""
    if not data:
        raise InputError("data holds no row.")
    _refuse_large_numbers(data, "data")
    return data


def refuse_wide_texts(texts: list[Any], tensor_type: Any) -> None:
    """InputError where texts, made an array of one width, would take more than is allowed."""
    _, count, longest = _values(texts, as_texts=True)
    _refuse_large(tensor_type, count, longest)


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
        # A list of thousands of types takes long to be read, and none is allowed.
        wanted = np.dtype(dtype) if len(dtype) <= _LONGEST_TYPE_NAME else None
    except (TypeError, ValueError, SyntaxError, LookupError, OverflowError):
        wanted = None
    if wanted is None:
        raise InputError(f"dtype {told} is no numpy type; try float64 or int64.")
    if wanted.hasobject or wanted.kind not in "biufcmMSU":
        raise InputError(f"dtype {told} is not allowed; name a type of plain values.")
    return wanted


def _tensor(data: list[Any], wanted: Any, tensor_type: Any) -> Any:
    """An array, of the type that the model's signature names."""
    if wanted is None and tensor_type is not None and tensor_type.kind not in "biu":
        return _array(data, tensor_type)
    array = _array(data, wanted)
    if tensor_type is None or array.dtype == tensor_type:
        return array
    return _cast_array(array, tensor_type)


def _cast_array(array: Any, tensor_type: Any) -> Any:
    import numpy as np

    if array.dtype.kind == tensor_type.kind and tensor_type.kind in "SU":
        # A signature's texts have no length.
        return array
    if tensor_type.kind in "SU":
        _refuse_large(tensor_type, array.size, max(_LONGEST_NUMBER, array.itemsize))
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            cast = array.astype(tensor_type)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"data cannot become {tensor_type}, as the model's signature says: "
            f"{_first_line(error)}."
        ) from None
    whole = tensor_type.kind in "biu" and array.dtype.kind in "biuf"
    if whole and not bool((cast == array).all()):
        raise InputError(f"data must hold {tensor_type} only, as the model's signature says.")
    _refuse_infinity(cast)
    return cast


def _array(data: list[Any], wanted: Any) -> Any:
    import numpy as np

    if wanted is None:
        types = _types(data)
        if types == {float} and type(data[0]) is list:
            # As below, twice as fast.
            values = np.fromiter(chain.from_iterable(data), np.float64, len(data) * len(data[0]))
            _refuse_infinity(values)
            # In place: what came of `reshape` would be no array of its own.
            values.resize((len(data), len(data[0])), refcheck=False)
            return values
        if not types <= _NUMBERS:
            types, count, longest = _values(data)
            texts = not types.isdisjoint((str, bytes))
            if texts and (len(types) > 1 or count * longest * _CHARACTER > _LARGEST_TEXTS):
                return _array_of_objects(data)
    elif wanted.itemsize == 0:
        _, count, longest = _values(data, as_texts=True)
        _refuse_large(wanted, count, longest)
    elif wanted.itemsize > _WIDEST_NUMBER:
        _refuse_large(wanted, _values(data)[1])
    try:
        array = np.array(data, dtype=wanted)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"data cannot become an array: {_first_line(error)}.") from None
    if array.dtype.kind == "O":
        _refuse_large_numbers(array.flat, "data")
        if wanted is None:
            array = _array_with_null(array)
    _refuse_infinity(array)
    return array


def _types(data: list[Any]) -> set[type]:
    """Of all values, or of all lists in rows; looked at as a whole."""
    return set(map(type, chain.from_iterable(data) if type(data[0]) is list else data))


def _values(data: list[Any], *, as_texts: bool = False) -> tuple[set[type], int, int]:
    """The types of the values, however deep; how many there are; the longest text's length.

    With `as_texts`, numbers and all else count as the texts that they would become.
    """
    found: set[type] = set()
    count = longest = 0
    level = data
    while True:
        types = set(map(type, level))
        lists = []
        values = level
        if list in types:
            types.remove(list)
            lists = [one for one in level if type(one) is list]
            values = [one for one in level if type(one) is not list] if types else []
        found |= types
        count += len(values)
        if as_texts:
            longest = max(longest, max(map(len, map(str, values)), default=0))
        elif str in types or bytes in types:
            texts = [one for one in values if isinstance(one, str | bytes)]
            longest = max(longest, len(max(texts, key=len)))
        if not lists:
            return found, count, longest
        level = list(chain.from_iterable(lists))


def _refuse_large(wanted: Any, count: int, longest: int = 0) -> None:
    """Before there is an array in which each value has the width of the longest."""
    width = wanted.itemsize or longest * (_CHARACTER if wanted.kind == "U" else 1)
    if count * width > _LARGEST_TEXTS:
        raise InputError(
            f"data would take {count * width // 2**20} MiB as {wanted}, more than the "
            f"{_LARGEST_TEXTS // 2**20} MiB allowed; send fewer rows, or another dtype."
        )


def _array_of_objects(data: list[Any]) -> Any:
    """Texts and numbers together as they are, or texts too many for one width."""
    import numpy as np

    try:
        array = np.array(data, dtype=object)
    except ValueError as error:
        raise InputError(f"data cannot become an array: {_first_line(error)}.") from None
    if any(type(item) is list for item in array.flat):
        raise InputError("data cannot become an array: its lists differ in length or depth.")
    _refuse_large_numbers(array.flat, "data")
    return array


def _array_with_null(array: Any) -> Any:
    """Numbers with null among them as floats; all else as it is."""
    import numpy as np

    if not all(item is None or isinstance(item, int | float) for item in array.flat):
        return array
    return array.astype(np.float64)


def _refuse_large_numbers(items: Iterable[Any], where: str) -> None:
    """Among Python's own objects, however deep, which numpy's types do not bound."""
    level = list(items)
    while level:
        inner: list[Any] = []
        for item in level:
            if type(item) is list:
                inner += item
            elif type(item) is dict:
                inner += item.values()
            elif type(item) is int and item not in _INT64:
                raise InputError(
                    f"{where} holds a whole number beyond 64 bits; write it with a decimal point, "
                    "or give a dtype."
                )
            elif type(item) is float and math.isinf(item):
                raise InputError(f"{where} holds a number too big for a float64.")
        level = inner


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

    array = _array(rows, np.dtype(np.float64))
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
        _refuse_large_frame(frame, wanted)
        try:
            frame = frame.astype(wanted)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"data cannot be cast to dtype {wanted}: {_first_line(error)}."
            ) from None
    for column in columns:
        if column.type in _CASTS and column.name in frame.columns:
            values = frame[column.name]
            cast = _cast_column(values, column)
            if cast is not values:
                frame[column.name] = cast
    _refuse_large_numbers_of_columns(frame)
    return frame


def _refuse_large_frame(frame: Any, wanted: Any) -> None:
    """Pandas casts by an array, also where it keeps texts one by one."""
    if wanted.itemsize == 0:
        _refuse_large(wanted, frame.size, max(map(len, map(str, frame.to_numpy().flat))))
    elif wanted.itemsize > _WIDEST_NUMBER:
        _refuse_large(wanted, frame.size)


def _refuse_large_numbers_of_columns(frame: Any) -> None:
    import numpy as np

    for name, type_ in frame.dtypes.items():
        where = f"Column {shown(str(name))} of data"
        if type_.kind == "f" and np.isinf(frame[name].to_numpy()).any():
            raise InputError(f"{where} holds a number too big for a {type_}.")
        if type_ == "object":
            _refuse_large_numbers(frame[name], where)


def _cast_column(values: Any, column: Column) -> Any:
    """Make of JSON's types what the signature names, where nothing is lost by it."""
    needed, cast = _CASTS[column.type]
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
    # Pandas also knows `today`, and no date in an empty text.
    if not all(isinstance(item, str) and item[:1].isdigit() for item in values.dropna()):
        return None
    # Else all are read as the first one looks. Before 2.0, pandas reads each by itself.
    old = int(pd.__version__.partition(".")[0]) < _FIRST_PANDAS_WITH_ISO
    try:
        return pd.to_datetime(values, format=None if old else "ISO8601")
    except ValueError:
        # It has much to say about formats, of which this takes one.
        return None


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
