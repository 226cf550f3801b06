import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_server.runner.inputs import InputError
from model_server.runner.native import read_native


def test_a_question_has_defaults() -> None:
    question = read_native(b'{"data": [[1, 2.5]]}')
    assert (question.data, question.function, question.dtype, question.params) == (
        [[1, 2.5]],
        "predict",
        None,
        None,
    )
    assert question.reply([1, None]) == b'{"prediction":[1,null]}'


def test_a_question_may_say_all() -> None:
    question = read_native(
        b'{"data": [{"a": "\xc3\xbc"}], "predict_function": "predict_proba", "dtype": "int8",'
        b' "model_flavor": "sklearn", "params": {"t": 1}}'
    )
    assert question.data == [{"a": "ü"}]
    assert (question.function, question.dtype, question.params) == (
        "predict_proba",
        "int8",
        {"t": 1},
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is not valid JSON"),
        (b"{", "The body is not valid JSON"),
        (b'{"data": [[1]]} {', "The body is not valid JSON: Extra data"),
        (b'{"data": [[' + 5000 * b"9" + b"]]}", "The body is not valid JSON"),
        (b'{"data": [[NaN]]}', "JSON has no NaN; send null"),
        (b'{"data": [[-Infinity]]}', "JSON has no -Infinity"),
        (b'{"data": ["\xff"]}', r"not valid UTF-8 \(byte 12\)"),
        ('{"data": [[1]]}'.encode("utf-16"), "not valid UTF-8"),
        (b'{"data": ' + 100_000 * b"[", "nested too deeply"),
        (b"[]", "must be a JSON object, not a list"),
        (b"{}", "data is missing; send a list of rows"),
        (b'{"data": {"a": [1]}}', "data must be a list of rows, not an object"),
        (b'{"data": [[1]], "row": 1}', "'row' is not known; a prediction takes data, dtype"),
        (b'{"data": [[1]], "predict_function": "score"}', "must be predict or predict_proba, not"),
        (b'{"data": [[1]], "model_flavor": "onnx"}', "must be pyfunc or sklearn, not 'onnx'"),
        (b'{"data": [[1]], "model_flavor": []}', "must be pyfunc or sklearn, not a list"),
        (b'{"data": [[1]], "dtype": 5}', "dtype must be a numpy type name or null, not a whole"),
        (b'{"data": [[1]], "params": []}', "params must be an object or null, not a list"),
    ],
)
def test_a_wrong_body_is_explained(body: bytes, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_native(body)


@given(
    st.dictionaries(
        st.sampled_from(["data", "dtype", "params", "predict_function", "model_flavor", "x"]),
        st.recursive(
            st.none() | st.integers() | st.floats() | st.text("ab", max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner)
            ),
        ),
    )
)
def test_whatever_comes_is_a_question_or_explained(content: Any) -> None:
    sentence = None
    try:
        question = read_native(json.dumps(content).encode())
    except InputError as error:
        sentence = str(error)
    assert len(sentence) < 300 if sentence is not None else question.data == content["data"]
