"""A prediction of any kind as JSON.

Arrays become nested lists, data frames lists of records, dates ISO 8601, bytes Base64. JSON has no
NaN and no infinity: both become null, as does every missing value.
"""

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import json
import math
import sys
import uuid
from typing import Any

_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))


class NoJsonFormError(Exception):
    """The value cannot be told in JSON."""


def to_json(value: Any) -> bytes:
    """The value as a JSON document, or NoJsonFormError."""
    try:
        text = _ENCODER.encode(plain(value))
    except RecursionError:
        raise NoJsonFormError("The model's answer is nested too deeply for JSON.") from None
    except NoJsonFormError:
        raise
    except Exception as error:
        raise NoJsonFormError(
            f"The model's answer has no JSON form ({type(error).__name__}: {error})."
        ) from error
    # Half of a pair of surrogates is no character; it becomes a question mark.
    return text.encode("utf-8", "replace")


def plain(value: Any) -> Any:
    """The value made of what JSON has."""
    if value is None or isinstance(value, bool):
        return value
    # Subclasses, as numpy's float64 and str_ are, become what they are called.
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return _less_plain(value)


def _less_plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, decimal.Decimal):
        return str(value) if value.is_finite() else None
    if isinstance(value, uuid.UUID):
        return str(value)
    for convert in (_from_numpy, _from_pandas):
        known, converted = convert(value)
        if known:
            return converted
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    return _by_its_methods(value)


def _key(key: Any) -> str:
    converted = plain(key)
    return converted if isinstance(converted, str) else json.dumps(converted)


def _from_numpy(value: Any) -> tuple[bool, Any]:
    np = sys.modules.get("numpy")
    if np is None or not isinstance(value, np.ndarray | np.generic):
        return False, None
    kind = value.dtype.kind
    if kind == "V" and value.dtype.names:
        return True, _records(np, value)
    if kind in "cV":
        raise NoJsonFormError(f"The model's answer holds {value.dtype}, which JSON has not.")
    if kind in "mM":
        return True, _times(np, value)
    if isinstance(value, np.generic):
        return True, plain(float(value) if kind == "f" else value.item())
    if kind in "biu" and not isinstance(value, np.ma.MaskedArray):
        return True, value.tolist()
    if kind == "f" and not isinstance(value, np.ma.MaskedArray):
        # Only a long double is larger than what JSON's readers take for a number.
        with np.errstate(over="ignore"):
            doubles = value.astype(np.float64, copy=False)
        finite = np.isfinite(doubles)
        return True, (doubles if finite.all() else np.where(finite, doubles, None)).tolist()
    return True, plain(value.tolist())


def _records(np: Any, value: Any) -> Any:
    """A structured array, or one of its rows, as records."""
    if value.ndim == 0:
        return {name: plain(value[name]) for name in value.dtype.names}
    return [_records(np, row) for row in value]


def _times(np: Any, value: Any) -> Any:
    """Dates as ISO 8601, durations in seconds; neither for those without a unit."""
    unit = np.datetime_data(value.dtype)[0]
    if unit == "generic" or (value.dtype.kind == "m" and unit in "YM"):
        return plain(np.where(np.isnat(value), None, value.astype(str)).tolist())
    if value.dtype.kind == "m":
        return plain(value / np.timedelta64(1, "s"))
    return np.where(np.isnat(value), None, np.datetime_as_string(value).astype(object)).tolist()


def _from_pandas(value: Any) -> tuple[bool, Any]:
    pd = sys.modules.get("pandas")
    if pd is None:
        return False, None
    if isinstance(value, pd.DataFrame):
        if not value.columns.is_unique:
            raise NoJsonFormError("The model's answer has two columns of one name.")
        names = [_key(name) for name in value.columns]
        columns = [plain(value[name]) for name in value.columns]
        if not columns:
            return True, [{} for _ in range(len(value))]
        return True, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(value, pd.Series | pd.Index | pd.api.extensions.ExtensionArray):
        if getattr(value.dtype, "kind", "O") in "biuf" and hasattr(value.dtype, "char"):
            return True, plain(value.to_numpy())
        return True, [plain(item) for item in value]
    if value is pd.NA or value is pd.NaT:
        return True, None
    if isinstance(value, pd.Timedelta):
        return True, value.total_seconds()
    if isinstance(value, pd.Period | pd.Interval):
        return True, str(value)
    return False, None


_METHODS = (
    *("toarray", "model_dump", "detach", "numpy"),
    *("tolist", "to_list", "to_dicts", "to_pylist"),
)


def _by_its_methods(value: Any) -> Any:
    """Sparse matrices, tensors, pydantic models and other data frames, by what they can do."""
    for method in _METHODS:
        convert = getattr(value, method, None)
        if not callable(convert) or isinstance(value, type):
            continue
        if method == "detach":
            return plain(convert().cpu().numpy())
        return plain(convert())
    kind = type(value)
    raise NoJsonFormError(
        f"The model's answer holds a {kind.__module__}.{kind.__qualname__}, which has no JSON form."
    )
