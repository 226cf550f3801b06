from typing import Any

import numpy as np
import pandas as pd
import pytest

from model_server.runner.inputs import Column, InputError, model_input

COLUMNS = [Column("a", "double"), Column("b", "integer")]


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
        ([["a"]], {"dtype": "S2000000000"}, "is not allowed"),
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
        ([[5]], {"columns": [Column("d", "datetime")]}, "Column 'd' of data must hold dates"),
        ([["?"]], {"columns": [Column("r", "binary")]}, "Column 'r' of data must hold bytes"),
    ],
)
def test_data_that_does_not_fit_is_explained(
    data: list[Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        model_input(data, **options)
