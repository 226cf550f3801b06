import json
import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_server.runner import inputs
from model_server.runner.inputs import Column, InputError, model_input
from model_server.runner.values import to_json

COLUMNS = [Column("a", "double"), Column("b", "integer")]
UNTYPED = [Column("a"), Column("b")]


def test_rows_become_an_array() -> None:
    array = model_input([[1, 2], [3, 4]])
    assert array.dtype == np.int64
    assert array.tolist() == [[1, 2], [3, 4]]
    assert model_input([[1, 2]], dtype="float32").dtype == np.float32
    assert model_input([[1, 2]], tensor_type=np.dtype("float16")).dtype == np.float16
    assert model_input(["a", "b"]).tolist() == ["a", "b"]
    assert model_input([[[1], [2]]]).shape == (1, 2, 1)


def test_null_among_numbers_is_nan() -> None:
    array = model_input([[1, None], [2.5, 3]])
    assert array.dtype == np.float64
    assert np.isnan(array[0, 1])
    assert model_input([["a", None]]).tolist() == [["a", None]]


def test_rows_and_records_become_a_frame_with_the_types_of_the_signature() -> None:
    for data in ([[1, 2], [3, 4]], [{"a": 1, "b": 2}, {"a": 3, "b": 4}]):
        frame = model_input(data, columns=COLUMNS)
        expected = pd.DataFrame({"a": [1.0, 3.0], "b": np.array([2, 4], dtype=np.int32)})
        pd.testing.assert_frame_equal(frame, expected)


def test_records_need_no_signature() -> None:
    frame = model_input([{"x": 1, "y": "u"}, {"y": "v", "x": None}])
    assert list(frame.columns) == ["x", "y"]
    assert frame["y"].tolist() == ["u", "v"]
    assert np.isnan(frame["x"][1])


def test_dates_bytes_and_missing_values_are_cast() -> None:
    columns = [Column("when", "datetime"), Column("raw", "binary"), Column("x", "float")]
    frame = model_input([["2026-01-02", "AP8=", None]], columns=columns)
    assert frame["when"][0] == pd.Timestamp("2026-01-02")
    assert frame["raw"][0] == b"\x00\xff"
    assert frame["x"].dtype == np.float32


def test_whole_numbers_may_be_written_with_a_point() -> None:
    assert model_input([[1, 2.0]], columns=COLUMNS)["b"].tolist() == [2]
    assert model_input([[2.0**40]], columns=[Column("n", "long")])["n"].tolist() == [2**40]


def test_a_date_means_the_same_beside_any_other() -> None:
    texts = ["2026-02-01", "2026-02-01T03:04:05.5", "2026-02-01T03:04", "20260201"]
    columns = [Column("d", "datetime")]
    together = model_input([[text] for text in texts], columns=columns)["d"]
    assert [date.isoformat() for date in together] == [
        model_input([[text]], columns=columns)["d"][0].isoformat() for text in texts
    ]
    # Which day this is would be decided by whoever is asked beside it.
    for other in ("13/02/2026", "2026-02-13", "02/13/2026"):
        with pytest.raises(InputError, match=r"dates as ISO 8601 texts \(datetime\)"):
            model_input([[other], ["01/02/2026"]], columns=columns)


def test_whole_numbers_of_64_bits_stay_what_they_are_beside_texts() -> None:
    rows = [[2**64 - 1, -(2**63)], ["x", None], [True, 2]]
    assert model_input(rows, columns=UNTYPED).to_numpy().tolist()[0] == rows[0]
    # What a signature makes doubles may be as large as those.
    assert model_input([{"a": 2**70}], columns=COLUMNS)["a"].tolist() == [2.0**70]


def test_a_column_of_a_double_may_be_partly_missing() -> None:
    frame = model_input([[None, 1], [2, 1]], columns=COLUMNS)
    assert np.isnan(frame["a"][0])
    assert frame["a"][1] == 2.0


def test_numbers_and_texts_together_stay_what_they_are() -> None:
    assert model_input([["a", 1.5]]).tolist() == [["a", 1.5]]


def test_one_column_may_come_as_single_values() -> None:
    frame = model_input(["a", "b"], columns=[Column("text", "string")])
    assert frame["text"].tolist() == ["a", "b"]


def test_dtype_casts_frames_too() -> None:
    frame = model_input([["1", 2]], dtype="float64", columns=[Column("a"), Column("b")])
    assert frame.dtypes.tolist() == [np.float64, np.float64]


def test_the_signature_comes_after_the_dtype() -> None:
    frame = model_input([["1", 2]], dtype="float32", columns=COLUMNS)
    assert frame.dtypes.tolist() == [np.float64, np.int32]


@pytest.mark.parametrize(
    ("data", "options", "sentence"),
    [
        ([], {}, "data holds no row"),
        ([[]], {}, "hold no value"),
        ([{}], {}, "hold no value"),
        ([[1, 2], [3]], {}, "Row 2 of data has 1 values, but row 1 has 2"),
        ([[1], {"a": 1}], {}, "Row 2 of data is a record, but row 1 is a list"),
        ([1, [2]], {}, "Row 2 of data is a list, but row 1 is a value"),
        ([{"a": 1}, {"b": 1}], {}, "Row 2 of data has not the columns of row 1.*'a', 'b'"),
        ([[[1], [2, 3]]], {}, "cannot become an array"),
        ([["a"]], {"dtype": "float64"}, "could not convert string to float"),
        ([[300]], {"dtype": "int8"}, "cannot become an array"),
        ([{"a": "x"}], {"dtype": "int64"}, "cannot be cast to dtype int64"),
        ([[1]], {"dtype": "object"}, "dtype 'object' is not allowed"),
        ([[1]], {"dtype": "O"}, "is not allowed"),
        ([[1]], {"dtype": "i4,f4"}, "is not allowed"),
        ([["a"]], {"dtype": "S2000000000"}, "would take 1907 MiB as .S2000000000, more than"),
        (70 * [1000 * [1]], {"dtype": "S4096"}, "would take 273 MiB as .S4096, more than the 256"),
        ([{"a": 1}] * 70_000, {"dtype": "S4096"}, "would take 273 MiB as .S4096"),
        ([{"a": 300 * "x"}] + [{"a": 1}] * 1_000_000, {"dtype": "S"}, "would take 286 MiB as .S"),
        # A number of 4000 digits among many of one.
        ([[10**4000, *20_000 * [1]]], {"dtype": "str"}, "would take 305 MiB as .U"),
        ([[{"a": 4000 * "x"}, *20_000 * [1]]], {"dtype": "str"}, "would take 305 MiB as .U"),
        ([[[4000 * "x"], 20_000 * ["y"]]], {"dtype": "U"}, "would take 305 MiB as .U"),
        ([[1]], {"dtype": 20 * "i4,"}, "is not allowed"),
        ([[1]], {"dtype": 100_000 * "i4,"}, "is no numpy type"),
        ([[["a"], ["b", 1]]], {}, "differ in length or depth"),
        ([["a", [1]]], {}, "differ in length or depth"),
        ([[1]], {"dtype": "decimal"}, "dtype 'decimal' is no numpy type"),
        ([[1]], {"dtype": 300 * "x"}, r"dtype 'x{60}\.\.\.' is no numpy type"),
        ([[1e999]], {}, "data holds a number too big for a float64"),
        ([[2**70]], {}, "whole number beyond 64 bits"),
        ([[2**70, None]], {}, "whole number beyond 64 bits"),
        ([[10**400]], {"dtype": "float64"}, "too large to convert to float"),
        ([{"a": 1e999}], {}, "Column 'a' of data holds a number too big"),
        ([[1e999, 1]], {"columns": COLUMNS}, "Column 'a' of data holds a number too big"),
        ([[1, 2, 3]], {"columns": COLUMNS}, "have 3 values, but the model takes 2: 'a', 'b'"),
        ([["1.5", 1]], {"columns": COLUMNS}, r"Column 'a' of data must hold numbers \(double"),
        ([[True, 1]], {"columns": COLUMNS}, r"Column 'a' of data must hold numbers \(double"),
        ([[1, 1.5]], {"columns": COLUMNS}, "Column 'b' of data must hold whole numbers of 32 bits"),
        ([[1, 2**40]], {"columns": COLUMNS}, "Column 'b' of data must hold whole numbers of 32 bi"),
        ([[1, None]], {"columns": COLUMNS}, "Column 'b' of data must hold whole numbers of 32 bi"),
        ([[2.0**63]], {"columns": [Column("n", "long")]}, "must hold whole numbers of 64 bits"),
        ([[2**63]], {"columns": [Column("n", "long")]}, "must hold whole numbers of 64 bits"),
        ([[1]], {"columns": [Column("t", "string")]}, "Column 't' of data must hold texts"),
        ([["no"]], {"columns": [Column("d", "datetime")]}, "Column 'd' of data must hold dates"),
        *(
            (
                [[no_date]],
                {"columns": [Column("d", "datetime")]},
                r"Column 'd' of data must hold dates as ISO 8601 texts \(datetime\)\.$",
            )
            for no_date in (5, "13/02/2026", "2026-02-30", "today", "now", "", "nan")
        ),
        ([[2**64, 1]], {"columns": UNTYPED}, "Column 'a' of data holds a whole number beyond 64"),
        ([[1, 10**400]], {"columns": UNTYPED}, "Column 'b' of data holds a whole number beyond 64"),
        ([{"a": -(2**70)}, {"a": "x"}], {}, "Column 'a' of data holds a whole number beyond 64"),
        ([[1e999, 1], ["x", 1]], {"columns": UNTYPED}, "Column 'a' of data holds a number too big"),
        ([{"a": [1e999, 1]}], {}, "Column 'a' of data holds a number too big"),
        ([{"a": {"b": [[2**70]]}}], {}, "Column 'a' of data holds a whole number beyond 64"),
        ([[2**70]], {"tensor_type": np.dtype("O")}, "data holds a whole number beyond 64"),
        ([["a", 1e999]], {"tensor_type": np.dtype("O")}, "data holds a number too big"),
        ([["x", 2**70]], {}, "data holds a whole number beyond 64 bits"),
        ([["x", 1e999]], {}, "data holds a number too big for a float64"),
        ([["?"]], {"columns": [Column("r", "binary")]}, "Column 'r' of data must hold bytes"),
    ],
)
def test_data_that_does_not_fit_is_explained(
    data: list[Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        model_input(data, **options)


def test_one_long_text_does_not_widen_the_others() -> None:
    """As an array of texts, these would take 400 MB."""
    for texts in (["x" * 100_000, *1000 * ["y"]], [b"x" * 100_000, *1000 * [b"y"]]):
        tracemalloc.start()
        array = model_input([[text] for text in texts])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**24
        assert array[:, 0].tolist() == texts
    # Usual ones are an array as numpy makes it.
    assert model_input(1000 * [["text"]]).dtype == np.dtype("U4")


def test_numbers_are_as_many_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_LARGEST_TEXTS", 1)
    for dtype in (None, "int8", "float64", "complex128", "longdouble", "datetime64[s]"):
        assert model_input([[1, 2]], dtype=dtype).shape == (1, 2)
        assert model_input([{"a": 1}], dtype=dtype).shape == (1, 1)


def test_memory_that_is_not_there_is_an_error_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_LARGEST_TEXTS", 2**60)
    with pytest.raises(InputError, match="data takes more memory than the model's process has"):
        model_input([1_000_000 * [1]], dtype="S1000000000")


@pytest.mark.parametrize(
    ("data", "dtype", "tensor_type", "expected"),
    [
        ([[1, 2]], None, "float64", [[1.0, 2.0]]),
        ([[1, None]], None, "float32", [[1.0, None]]),
        ([[2**70]], None, "float64", [[2.0**70]]),
        ([[0.1]], "float32", "float64", [[float(np.float32(0.1))]]),
        ([[0.5]], "float64", "float32", [[0.5]]),
        ([[1]], "int64", "float64", [[1.0]]),
        ([[1.0, 2]], None, "int64", [[1, 2]]),
        ([[7.0]], "float64", "uint8", [[7]]),
        ([[1, 0]], None, "bool", [[True, False]]),
        ([[1]], "int64", "str", [["1"]]),
        ([["long", "x"]], None, "str", [["long", "x"]]),
        (["2026-01-02"], None, "datetime64[ns]", None),
    ],
)
def test_an_array_gets_the_type_of_the_signature(
    data: list[Any], dtype: str | None, tensor_type: str, expected: list[Any] | None
) -> None:
    array = model_input(data, dtype=dtype, tensor_type=np.dtype(tensor_type))
    assert array.dtype.kind == np.dtype(tensor_type).kind
    assert array.dtype == np.dtype(tensor_type) or tensor_type == "str"
    if expected is not None:
        assert json.loads(to_json(array)) == expected


@pytest.mark.parametrize(
    ("data", "dtype", "tensor_type", "sentence"),
    [
        ([[1.5]], None, "int64", "must hold int64 only"),
        ([[300]], "int64", "int8", "must hold int8 only"),
        ([[-1]], None, "uint8", "must hold uint8 only"),
        ([[2]], None, "bool", "must hold bool only"),
        ([[1, None]], None, "int64", "must hold int64 only"),
        ([["a"]], "str", "float64", "cannot become float64.*could not convert string"),
        ([[1e300]], "float64", "float32", "too big for a float32"),
        ([1_200_000 * [1]], "int64", "str", "would take 292 MiB"),
    ],
)
def test_what_the_signature_does_not_take_is_explained(
    data: list[Any], dtype: str | None, tensor_type: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        model_input(data, dtype=dtype, tensor_type=np.dtype(tensor_type))


@given(
    st.lists(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.integers(2**62, 2**65)
            | st.floats()
            | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
            ),
            max_leaves=6,
        ),
        max_size=4,
    ),
    st.none()
    | st.sampled_from(["float32", "int64", "bool", "U3", "datetime64[D]", "S1", "V", "c8"]),
    st.none()
    | st.lists(
        st.builds(
            Column,
            st.sampled_from("abc"),
            st.sampled_from(
                [None, "double", "float", "integer", "long", "string", "datetime", "binary"]
            ),
        ),
        min_size=1,
        max_size=3,
        unique_by=lambda column: column.name,
    ),
)
@pytest.mark.filterwarnings("ignore")  # pandas' and numpy's, about what they are given
def test_whatever_comes_becomes_an_input_or_is_explained(
    data: list[Any], dtype: str | None, columns: list[Column] | None
) -> None:
    sentence = None
    try:
        rows = model_input(data, dtype=dtype, columns=columns)
    except InputError as error:
        sentence = str(error)
    assert len(sentence) < 1000 if sentence is not None else len(rows) == len(data)
