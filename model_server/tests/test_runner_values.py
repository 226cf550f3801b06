import dataclasses
import datetime as dt
import decimal
import enum
import json
import uuid
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes

from model_server.runner.values import NoJsonFormError, to_json


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: Any


class Tensor:
    """Stands for a tensor of torch: it has to be taken off its device first."""

    def detach(self) -> "Tensor":
        return self

    def cpu(self) -> "Tensor":
        return self

    def numpy(self) -> Any:
        return np.array([1.5])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        ("ü", "ü"),
        (3, 3),
        (2**70, 2**70),
        (0.1, 0.1),
        (float("nan"), None),
        ([float("inf"), (1, {2}), frozenset()], [None, [1, [2]], []]),
        ({1: "a", "b": {"c": None}, None: 1}, {"1": "a", "b": {"c": None}, "null": 1}),
        (b"\x00\xff", "AP8="),
        (Colour.RED, "red"),
        (Point(1, np.int8(2)), {"x": 1, "y": 2}),
        (decimal.Decimal("1.10"), "1.10"),
        (decimal.Decimal("NaN"), None),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (dt.date(2026, 1, 2), "2026-01-02"),
        (dt.datetime(2026, 1, 2, tzinfo=dt.UTC), "2026-01-02T00:00:00+00:00"),
        (dt.timedelta(minutes=1), 60.0),
        (np.float64("nan"), None),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.int64(7), 7),
        (np.str_("a"), "a"),
        (np.array(5), 5),
        (np.array([[1, 2], [3, 4]], dtype=np.uint8), [[1, 2], [3, 4]]),
        (np.array([[0.1, np.nan], [-np.inf, 2.0]]), [[0.1, None], [None, 2.0]]),
        (np.array([0.5, np.nan], dtype=np.float16), [0.5, None]),
        (np.array([0.5], dtype=np.longdouble), [0.5]),
        (np.zeros((1, 2, 2)), [[[0.0, 0.0], [0.0, 0.0]]]),
        (np.array(["a", "bc"]), ["a", "bc"]),
        (np.array([b"a"]), ["YQ=="]),
        (np.array(["a", None, np.nan, 1], dtype=object), ["a", None, None, 1]),
        (np.array(["2026-01-02", "NaT"], dtype="datetime64[D]"), ["2026-01-02", None]),
        (np.array([90, "NaT"], dtype="timedelta64[s]"), [90.0, None]),
        (np.datetime64("2026-01-02T03"), "2026-01-02T03"),
        (np.datetime64("NaT", "D"), None),
        (np.array([]), []),
        (pd.Series([1, 2]), [1, 2]),
        (pd.Series([1.5, None]), [1.5, None]),
        (pd.Series([1, None], dtype="Int64"), [1, None]),
        (pd.Series(["a", None]), ["a", None]),
        (pd.Series(pd.Categorical(["x", "y", None])), ["x", "y", None]),
        (pd.Series([True, False]), [True, False]),
        (pd.Index(["a"]), ["a"]),
        (pd.Timestamp("2026-01-02"), "2026-01-02T00:00:00"),
        (pd.Series(pd.to_datetime(["2026-01-02", None])), ["2026-01-02T00:00:00", None]),
        (pd.Timedelta(seconds=1), 1.0),
        (pd.Period("2026-01"), "2026-01"),
        (
            pd.DataFrame({"a": [1, 2], 3: [None, "x"]}),
            [{"a": 1, "3": None}, {"a": 2, "3": "x"}],
        ),
        (pd.DataFrame(index=[0, 1]), [{}, {}]),
        (scipy.sparse.csr_matrix([[0, 1]]), [[0, 1]]),
        (Tensor(), [1.5]),
        (np.array([(1, 2.5)], dtype="i4,f8"), [{"f0": 1, "f1": 2.5}]),
        (np.ma.masked_array([1, 2], mask=[False, True]), [1, None]),
        (np.array([1, "NaT"], dtype="timedelta64[M]"), ["1 months", None]),
        (np.longdouble("1e400"), None),
        (pd.arrays.SparseArray([0, 1]), [0, 1]),
        (pd.interval_range(0, 1), ["(0, 1]"]),
        ("half of \ud83d", "half of ?"),
    ],
)
def test_values_become_json(value: Any, expected: Any) -> None:
    assert json.loads(to_json(value)) == expected


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (object(), r"builtins\.object"),
        (int, r"builtins\.type"),
        (np.array([1j]), "complex128"),
        (np.complex128(1j), "complex128"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns of one name"),
    ],
)
def test_what_has_no_json_form_is_named(value: Any, sentence: str) -> None:
    with pytest.raises(NoJsonFormError, match=sentence):
        to_json(value)


def test_endless_nesting_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(NoJsonFormError, match="too deeply"):
        to_json(value)


def test_floats_survive_exactly() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    assert json.loads(to_json(values)) == values.tolist()
    assert np.array(json.loads(to_json(np.float32([0.1]))), dtype=np.float32) == np.float32(0.1)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.characters(categories=["Cs"])
        | st.binary()
        | st.datetimes()
        | st.dates()
        | st.timedeltas()
        | st.decimals()
        | st.complex_numbers()
        | arrays(
            scalar_dtypes() | st.sampled_from([np.dtype("i4,f8"), np.dtype("longdouble")]),
            array_shapes(min_dims=0, max_dims=3, max_side=3),
        ).map(lambda array: array[()]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner)
            | st.dictionaries(st.text() | st.integers() | st.floats() | st.none(), inner)
            | st.lists(inner, max_size=3).map(lambda items: pd.Series(items, dtype=object))
        ),
        max_leaves=5,
    )
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_value_is_valid_json_or_refused(value: Any) -> None:
    try:
        document = to_json(value)
    except NoJsonFormError:
        return
    json.loads(document.decode("utf-8"), parse_constant=pytest.fail)
