import json
import math
import struct
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_server.runner import open_inference
from model_server.runner.inputs import InputError, model_input
from model_server.runner.open_inference import BINARY, describe, read_inference
from model_server.runner.question import Question

INTEGERS = {
    f"{sign}{bits}": st.integers(
        0 if sign == "UINT" else -(2 ** (bits - 1)),
        2**bits - 1 if sign == "UINT" else 2 ** (bits - 1) - 1,
    )
    for sign in ("UINT", "INT")
    for bits in (8, 16, 32, 64)
}
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(),
    **INTEGERS,
    **{
        f"FP{bits}": st.floats(width=bits, allow_nan=False, allow_infinity=False)
        for bits in (16, 32, 64)
    },
    "BYTES": st.text("aé€😀\n ", max_size=5),
}
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def _read(request: dict[str, Any], binary: bytes | None = None) -> Question:
    text = json.dumps(request).encode()
    return read_inference(text if binary is None else BINARY.pack(len(text)) + text + binary)


def _input(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [2, 2], "datatype": "INT64", "data": [1, 2, 3, 4]} | changes


def _answer(question: Question, prediction: Any) -> Any:
    return json.loads(question.reply(prediction))


@given(st.data())
def test_a_tensor_comes_back_as_it_went(data: st.DataObject) -> None:
    """Flat, nested or binary, through the model's input and out again."""
    datatype = data.draw(st.sampled_from(sorted(VALUES)))
    shape = data.draw(SHAPES)
    count = math.prod(shape)
    values = data.draw(st.lists(VALUES[datatype], min_size=count, max_size=count))
    form = data.draw(st.sampled_from(["flat", "nested", "binary"]))
    kind = {"BYTES": object, "BOOL": np.bool_}.get(datatype) or np.dtype(
        datatype.lower().replace("fp", "float")
    )
    array = np.array(values, dtype=kind).reshape(shape)
    content: dict[str, Any] = {"name": "x", "shape": shape, "datatype": datatype}
    binary = None
    if form == "binary":
        binary = (
            b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in values)
            if datatype == "BYTES"
            else array.tobytes()
        )
        content["parameters"] = {"binary_data_size": len(binary)}
    else:
        content["data"] = values if form == "flat" else array.tolist()
    question = _read({"inputs": [content]}, binary)
    assert len(question.data) == shape[0]
    received = model_input(question.data, dtype=question.dtype)
    assert received.shape == tuple(shape)
    if datatype != "BYTES":
        assert received.dtype == array.dtype
    (output,) = _answer(question, received)["outputs"]
    assert output["datatype"] == datatype
    assert output["shape"] == (shape if len(shape) > 1 else [*shape, 1])
    assert output["data"] == values


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["inputs", "name", "shape", "datatype", "data", "parameters", "outputs"]
                )
                | st.text(max_size=3),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    ),
    st.booleans(),
    st.binary(max_size=20),
)
def test_whatever_comes_is_a_question_or_explained(
    content: Any, as_input: bool, binary: bytes
) -> None:
    request = (
        {"inputs": [_input() | content if isinstance(content, dict) else content]}
        if as_input
        else content
    )
    text = json.dumps(request).encode()
    for body in (text, BINARY.pack(len(text)) + text + binary, binary, b"\0" + binary):
        sentence = None
        try:
            question = read_inference(body)
        except InputError as error:
            sentence = str(error)
        assert len(sentence) < 1000 if sentence is not None else question.data


def test_a_tensor_of_one_dimension_is_values() -> None:
    question = _read({"inputs": [_input(shape=[4])]})
    assert (question.data, question.dtype) == ([1, 2, 3, 4], "int64")


def test_several_tensors_are_the_columns_of_records() -> None:
    inputs = [
        _input(name="a", shape=[2], data=[1, 2]),
        _input(name="b", shape=[2, 1], datatype="BYTES", data=["u", "v"]),
        _input(name="c", datatype="FP32", data=[[0.5, 1], [2, None]]),
    ]
    question = _read({"inputs": inputs})
    assert question.data == [
        {"a": 1, "b": "u", "c": [0.5, 1]},
        {"a": 2, "b": "v", "c": [2, None]},
    ]
    assert question.dtype is None


@pytest.mark.parametrize("where", ["request", "input"])
def test_the_content_type_pd_makes_a_column_of_one_tensor(where: str) -> None:
    parameters = {"parameters": {"content_type": "pd"}}
    tensor = _input(shape=[4, 1]) | (parameters if where == "input" else {})
    question = _read({"inputs": [tensor]} | (parameters if where == "request" else {}))
    assert question.data == [{"x": 1}, {"x": 2}, {"x": 3}, {"x": 4}]


def test_the_content_type_base64_makes_bytes() -> None:
    tensor = _input(
        shape=[1], datatype="BYTES", data=["AP8="], parameters={"content_type": "base64"}
    )
    assert _read({"inputs": [tensor]}).data == [b"\0\xff"]


def test_parameters_say_the_rest() -> None:
    question = _read(
        {
            "inputs": [_input()],
            "parameters": {
                "predict_function": "predict_proba",
                "dtype": "float16",
                "params": {"t": 1},
                "model_flavor": "pyfunc",
            },
        }
    )
    assert (question.function, question.dtype, question.params) == (
        "predict_proba",
        "float16",
        {"t": 1},
    )


def test_an_output_names_the_function() -> None:
    question = _read({"inputs": [_input()], "outputs": [{"name": "predict_proba"}]})
    assert question.function == "predict_proba"
    answer = _answer(question, np.array([[0.25, 0.75]]))
    assert answer == {
        "outputs": [
            {"name": "predict_proba", "datatype": "FP64", "shape": [1, 2], "data": [0.25, 0.75]}
        ]
    }


def test_a_data_frame_is_an_output_for_each_column() -> None:
    frame = pd.DataFrame({"n": np.array([1, 2], dtype="int8"), "t": ["a", None]})
    everything = _answer(_read({"id": "7", "inputs": [_input()]}), frame)
    assert everything == {
        "id": "7",
        "outputs": [
            {"name": "n", "datatype": "INT8", "shape": [2, 1], "data": [1, 2]},
            {"name": "t", "datatype": "BYTES", "shape": [2, 1], "data": ["a", None]},
        ],
    }
    question = _read({"inputs": [_input()], "outputs": [{"name": "t"}]})
    assert _answer(question, frame)["outputs"] == everything["outputs"][1:]
    with pytest.raises(InputError, match="There is no output 't'; there is 'predict'"):
        question.reply(np.array([1]))


@pytest.mark.parametrize(
    ("prediction", "datatype", "shape", "data"),
    [
        ([1, 2], "INT64", [2, 1], [1, 2]),
        ([1, 2**64], "BYTES", [2, 1], ["1", str(2**64)]),
        ([1.5, float("nan")], "FP64", [2, 1], [1.5, None]),
        ([True], "BOOL", [1, 1], [True]),
        (np.float32([np.inf]), "FP32", [1, 1], [None]),
        (np.array(["2026-01-02"], dtype="datetime64[D]"), "BYTES", [1, 1], ["2026-01-02"]),
        ([{"a": 1}], "BYTES", [1, 1], ['{"a": 1}']),
        ([[1, 2], [3]], "BYTES", [2, 1], ["[1, 2]", "[3]"]),
        ([[], []], "BYTES", [2, 1], ["[]", "[]"]),
        ([], "BYTES", [0, 1], []),
        (5, "INT64", [1, 1], [5]),
        (pd.Series(["a"], name="other"), "BYTES", [1, 1], ["a"]),
    ],
)
def test_other_predictions_are_a_tensor_too(
    prediction: Any, datatype: str, shape: list[int], data: list[Any]
) -> None:
    (output,) = _answer(_read({"inputs": [_input()]}), prediction)["outputs"]
    assert output == {"name": "predict", "datatype": datatype, "shape": shape, "data": data}


def test_a_record_is_an_output_for_each_key() -> None:
    outputs = _answer(_read({"inputs": [_input()]}), {"a": np.int16([1]), "b": "x"})["outputs"]
    assert [(output["name"], output["datatype"]) for output in outputs] == [
        ("a", "INT16"),
        ("b", "BYTES"),
    ]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ([], "must be a JSON object, not a list"),
        ({}, "inputs must be a list of at least one tensor"),
        ({"inputs": []}, "inputs must be a list of at least one tensor"),
        ({"inputs": ["x"]}, "An input must be an object, not a text"),
        ({"inputs": [{}]}, "Every input needs a name"),
        ({"inputs": [_input(datatype="BF16")]}, "Input 'x': the datatype must be one of BOOL"),
        ({"inputs": [_input(datatype=[])]}, "Input 'x': the datatype must be one of BOOL"),
        ({"inputs": [_input(shape=[])]}, "the shape needs 1 to 32 sizes of at least 1"),
        ({"inputs": [_input(shape=[-1, 2])]}, "the shape needs 1 to 32 sizes of at least 1"),
        ({"inputs": [_input(shape="2")]}, "the shape must be a list of whole numbers"),
        ({"inputs": [_input(shape=[3])]}, r"the shape \[3\] takes 3 values, but data has 4"),
        ({"inputs": [_input(data=None)]}, "data must be a list, not null"),
        ({"inputs": [_input(data=[[1, 2, 3], [4]])]}, r"nested data has not the shape \[2, 2\]"),
        ({"inputs": [_input(data=[1, 2, 3, "4"])]}, "is INT64 and must hold whole numbers only"),
        ({"inputs": [_input(data=[1, 2, 3, 2**63])]}, "holds a number too big for INT64"),
        (
            {"inputs": [_input(datatype="UINT8", data=[1, 2, 3, -1])]},
            "holds a number too big for UINT8",
        ),
        ({"inputs": [_input(datatype="FP32", data=[1, 2, 3, 1e39])]}, "too big for FP32"),
        ({"inputs": [_input(datatype="FP64", data=[1, 2, 3, 10**400])]}, "too big for FP64"),
        ({"inputs": [_input(datatype="BYTES")]}, "is BYTES and must hold texts only"),
        ({"inputs": [_input(datatype="BOOL")]}, "is BOOL and must hold true and false only"),
        (
            {"inputs": [_input(), _input()]},
            "Two inputs have the name 'x'",
        ),
        (
            {"inputs": [_input(), _input(name="y", shape=[4])]},
            "Input 'y' has 4 rows, but 'x' has 2",
        ),
        ({"id": 7, "inputs": [_input()]}, "id must be a text, not a whole number"),
        ({"inputs": [_input()], "parameters": []}, "The request: parameters must be an object"),
        (
            {"inputs": [_input(parameters={"content_type": "hg"})]},
            "Input 'x': the content_type must be one of np, pd, str, base64, datetime, not 'hg'",
        ),
        (
            {
                "inputs": [
                    _input(
                        shape=[1],
                        datatype="BYTES",
                        data=["?"],
                        parameters={"content_type": "base64"},
                    )
                ]
            },
            "holds a text that is not Base64",
        ),
        ({"inputs": [_input()], "parameters": {"params": 1}}, "params must be an object"),
        ({"inputs": [_input()], "parameters": {"dtype": 1}}, "dtype must be a text"),
        (
            {"inputs": [_input()], "parameters": {"predict_function": "score"}},
            "must be predict or predict_proba",
        ),
        (
            {"inputs": [_input()], "outputs": [{"name": "predict"}, {"name": "predict_proba"}]},
            "one in a request",
        ),
        ({"inputs": [_input()], "outputs": 2 * [{"name": "n"}]}, "An output is asked for twice"),
        ({"inputs": [_input()], "outputs": {}}, "outputs must be a list"),
        (
            {"inputs": [_input(shape=[3000, *6 * [1]], data=3000 * [1])]},
            "makes 18000 lists of 3000 values; leave out sizes of 1",
        ),
        ({"inputs": [_input()], "outputs": [1]}, "Every output needs a name"),
    ],
)
def test_a_wrong_request_is_explained(request_: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        _read(request_)


def test_few_bytes_do_not_become_many_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = _read({"inputs": [_input(shape=[1, 1, 1, 1, 1, 1, 1, 4])]}).data
    assert row == [[[[[[[1, 2, 3, 4]]]]]]]
    rows = _input(shape=[2000, 1], data=2000 * [1])
    columns = [rows | {"name": name} for name in "abc"]
    monkeypatch.setattr(open_inference, "_MOST_LISTS", 1999)
    with pytest.raises(InputError, match="make 2000 lists, more than 1999"):
        _read({"inputs": [rows]})
    # These are a value in each record.
    assert len(_read({"inputs": columns}).data) == 2000
    monkeypatch.setattr(open_inference, "_MOST_RECORDS", 1999)
    with pytest.raises(InputError, match="2000 rows of columns are too many; send 1999"):
        _read({"inputs": columns})


@pytest.mark.parametrize(
    ("size", "binary", "datatype", "sentence"),
    [
        (32, b"short", "INT64", "The binary data ends before that of the input 'x'"),
        (5, b"short", "INT64", "5 bytes are no whole number of INT64 values"),
        (-1, b"", "INT64", "binary_data_size must be a number of bytes"),
        (32, 40 * b"\0", "INT64", "8 bytes of binary data belong to no input"),
        (2, b"ab", "BYTES", "ends within the length of a text"),
        (5, b"\2\0\0\0a", "BYTES", "ends within a text"),
        (5, b"\1\0\0\0\xff", "BYTES", "holds bytes that are not UTF-8"),
    ],
)
def test_wrong_binary_data_is_explained(
    size: int, binary: bytes, datatype: str, sentence: str
) -> None:
    tensor = _input(datatype=datatype, parameters={"binary_data_size": size})
    with pytest.raises(InputError, match=sentence):
        _read({"inputs": [tensor]}, binary)


def test_a_header_longer_than_the_body_is_explained() -> None:
    with pytest.raises(InputError, match="shorter than its Inference-Header-Content-Length"):
        read_inference(BINARY.pack(1000) + b"{}")


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_a_signature_is_described() -> None:
    from mlflow.models import infer_signature
    from mlflow.types.schema import ColSpec, Schema

    frame = pd.DataFrame({"a": [1.5], "n": [1], "t": ["x"]})
    assert describe(infer_signature(frame, np.array([1]))) == {
        "inputs": [
            {"name": "a", "datatype": "FP64", "shape": [-1, 1]},
            {"name": "n", "datatype": "INT64", "shape": [-1, 1]},
            {"name": "t", "datatype": "BYTES", "shape": [-1, 1]},
        ],
        "outputs": [{"name": "predict", "datatype": "INT64", "shape": [-1, 1]}],
    }
    images: Any = np.zeros((2, 28, 28), dtype="float32")
    assert describe(infer_signature(images, {"p": np.zeros(2), "q": np.zeros(2)})) == {
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 28, 28]}],
        "outputs": [
            {"name": "p", "datatype": "FP64", "shape": [-1, 1]},
            {"name": "q", "datatype": "FP64", "shape": [-1, 1]},
        ],
    }
    unnamed = infer_signature(frame)
    unnamed.inputs = Schema([ColSpec("double"), ColSpec("double")])
    assert describe(unnamed) == {
        "inputs": [{"name": "input", "datatype": "FP64", "shape": [-1, 2]}],
        "outputs": None,
    }
    assert describe(None) == {"inputs": None, "outputs": None}
