import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, Schema, TensorSpec
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder

from conftest import TrainedModels
from model_server.runner.batching import Batcher
from model_server.runner.inputs import InputError
from model_server.runner.model import Model, ModelError, load_model
from model_server.runner.native import read_native
from model_server.runner.open_inference import read_inference
from model_server.runner.values import NoJsonFormError

# What MLflow and scikit-learn warn of inside a model's process is for its log.
pytestmark = pytest.mark.filterwarnings("default")

Load = Callable[[str, str], Model]
ADDING, HINTED, TELLING = (
    str(Path(__file__).parent / "models" / f"{name}.py") for name in ("adding", "hinted", "telling")
)


@pytest.fixture(scope="module")
def load(trained: TrainedModels) -> Load:
    @cache
    def cached(name: str, flavor: str) -> Model:
        return load_model(trained.folder / name, flavor)

    return cached


def _ask(model: Model, data: list[Any], **options: Any) -> Any:
    question = read_native(json.dumps({"data": data, **options}).encode())
    prediction = model.predict(question.data, question.function, question.dtype, question.params)
    return json.loads(question.reply(prediction))["prediction"]


@pytest.mark.parametrize("flavor", ["pyfunc", "sklearn"])
@pytest.mark.parametrize("name", ["logistic", "tree", "linear"])
def test_predictions_are_the_models_own(
    trained: TrainedModels, load: Load, name: str, flavor: str
) -> None:
    assert _ask(load(name, flavor), trained.rows) == trained.predictions[name]


@pytest.mark.parametrize("flavor", ["pyfunc", "sklearn"])
@pytest.mark.parametrize("name", ["logistic", "tree"])
def test_probabilities_are_the_models_own(
    trained: TrainedModels, load: Load, name: str, flavor: str
) -> None:
    answer = _ask(load(name, flavor), trained.rows, predict_function="predict_proba")
    assert answer == trained.probabilities[name]


@pytest.mark.parametrize("function", ["predict", "predict_proba"])
@pytest.mark.parametrize("flavor", ["pyfunc", "sklearn"])
def test_records_find_their_columns_in_any_order(
    trained: TrainedModels, load: Load, flavor: str, function: str
) -> None:
    records = [
        dict(reversed(list(zip(trained.columns, row, strict=True)))) | {"more": 1}
        for row in trained.rows
    ]
    expected = trained.predictions if function == "predict" else trained.probabilities
    answer = _ask(load("logistic", flavor), records, predict_function=function)
    assert answer == expected["logistic"]


def test_whole_numbers_do_where_the_signature_wants_doubles(load: Load) -> None:
    assert _ask(load("logistic", "pyfunc"), [[5, 3, 1, 0]]) == ["a"]


@pytest.mark.parametrize(
    ("name", "flavor", "request_", "sentence"),
    [
        ("logistic", "pyfunc", {"data": [[1, 2, 3]]}, "have 3 values, but the model takes 4"),
        ("logistic", "pyfunc", {"data": [{"x": 1}]}, "sepal length"),
        ("logistic", "sklearn", {"data": [{"x": 1}]}, "lack the columns sepal length"),
        ("logistic", "pyfunc", {"data": [["x", 1, 1, 1]]}, "sepal length"),
        ("logistic", "pyfunc", {"data": [[1, 1, 1, 1]], "params": {"a": 1}}, "takes no params"),
        ("logistic", "sklearn", {"data": [[1, 1, 1, 1]], "params": {"a": 1}}, "for the flavor pyf"),
        (
            "logistic",
            "pyfunc",
            {"data": [[1, 1, 1, 1]], "params": {"a": 1}, "predict_function": "predict_proba"},
            "predict_proba takes none",
        ),
        ("tree", "sklearn", {"data": [[1, 2, 3]]}, "3 features"),
        ("tree", "pyfunc", {"data": [["a", "b", "c", "d"]]}, "could not convert string"),
        (
            "linear",
            "pyfunc",
            {"data": [[1, 1, 1, 1]], "predict_function": "predict_proba"},
            "has no predict_proba",
        ),
        (
            "linear",
            "sklearn",
            {"data": [[1, 1, 1, 1]], "predict_function": "predict_proba"},
            "has no predict_proba",
        ),
    ],
)
def test_a_request_that_does_not_fit_the_model_is_explained(
    load: Load, name: str, flavor: str, request_: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        _ask(load(name, flavor), **request_)


def _infer(model: Model, *inputs: dict[str, Any]) -> Any:
    question = read_inference(json.dumps({"inputs": inputs}).encode())
    prediction = model.predict(question.data, question.function, question.dtype, question.params)
    (output,) = json.loads(question.reply(prediction))["outputs"]
    return output["data"]


TENSOR_ROWS = [[5, 3, 1, 0], [6, 2, 4, 1], [0, 1, 2, 3]]


@pytest.fixture(scope="module", params=["float64", "float32", "int64", "uint8"])
def tensor_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["unnamed", "named"])
def tensor_model(
    request: pytest.FixtureRequest, tensor_type: str, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    """Takes a tensor of one type, which MLflow compares with the signature's."""
    folder = tmp_path_factory.mktemp("tensor") / "model"
    spec = TensorSpec(np.dtype(tensor_type), (-1, 4), "x" if request.param == "named" else None)
    if request.param == "named":
        return _adding(folder, [spec])
    estimator = LinearRegression().fit(TENSOR_ROWS, [9, 13, 6])
    signature = ModelSignature(Schema([spec]))
    mlflow.sklearn.save_model(estimator, folder, signature=signature, pip_requirements=["mlflow"])
    return load_model(folder, "pyfunc")


def test_a_tensor_gets_the_type_of_the_signature(tensor_model: Model, tensor_type: str) -> None:
    """MLflow itself takes no other type than the signature's."""
    right = tensor_model.predict(TENSOR_ROWS, "predict", None, None).tolist()
    assert len(right) == 3
    assert _ask(tensor_model, [list(map(float, row)) for row in TENSOR_ROWS]) == right
    assert _ask(tensor_model, TENSOR_ROWS, dtype="float16") == right
    for datatype in ("FP64", "FP32", "FP16", "INT64", "INT8", "UINT16"):
        tensor = {"name": "x", "shape": [3, 4], "datatype": datatype, "data": TENSOR_ROWS}
        assert _infer(tensor_model, tensor) == list(np.ravel(right))
    if "int" in tensor_type:
        with pytest.raises(InputError, match=f"must hold {tensor_type} only"):
            _ask(tensor_model, [[5.5, 3, 1, 0]])
        half = {"name": "x", "shape": [1, 4], "datatype": "FP64", "data": 4 * [0.5]}
        with pytest.raises(InputError, match=f"must hold {tensor_type} only"):
            _infer(tensor_model, half)


def _adding(folder: Path, specs: list[TensorSpec]) -> Model:
    """A model of tensors with these names and types."""
    return _saved(ADDING, folder, Schema(specs))


def _saved(code: str, folder: Path, schema: Schema | None) -> Model:
    signature = None if schema is None else ModelSignature(schema)
    mlflow.pyfunc.save_model(
        folder, python_model=code, signature=signature, pip_requirements=["mlflow"]
    )
    return load_model(folder, "pyfunc")


def test_several_tensors_get_the_types_of_the_signature(tmp_path: Path) -> None:
    specs = [
        TensorSpec(np.dtype(type_), (-1,), name)
        for name, type_ in zip("ab", ("f8", "f4"), strict=True)
    ]
    model = _adding(tmp_path, specs)
    assert _ask(model, [{"a": 1, "b": 2}, {"a": 0.5, "b": 1}]) == [3.0, 1.5]
    for datatype in ("FP64", "FP32", "INT64"):
        tensor = {"shape": [2], "datatype": datatype}
        inputs = ({"name": "a", "data": [1, 2], **tensor}, {"name": "b", "data": [3, 4], **tensor})
        assert _infer(model, *inputs) == [4.0, 6.0]


def test_a_long_text_does_not_widen_a_column_of_texts(tmp_path: Path) -> None:
    specs = [TensorSpec(np.dtype("str"), (-1,), name) for name in "ab"]
    model = _adding(tmp_path, specs)
    texts = ["x" * 100_000, *1000 * ["y"]]
    with pytest.raises(InputError, match="would take 381 MiB"):
        _ask(model, [{"a": "z", "b": text} for text in texts])


def test_a_model_with_type_hints_gets_rows_as_they_are(tmp_path: Path) -> None:
    model = _saved(HINTED, tmp_path, None)
    assert _ask(model, [0.5, 2.0]) == [1.0, 4.0]
    for data, sentence in (([], "no row"), ([1e999], "too big"), ([2**70], "beyond 64 bits")):
        with pytest.raises(InputError, match=sentence):
            model.predict(data, "predict", None, None)


def _texts(rows: Any) -> Any:
    return rows.astype(str)


def _answers(batcher: Batcher, *requests: dict[str, Any]) -> list[Any]:
    """To callers who wait at the same time."""
    for number, request in enumerate(requests):
        batcher.put(read_native(json.dumps(request).encode()), 100, number)
    answers: dict[int, Any] = {}
    while batcher:
        answers |= {number: answer for number, _, _, answer in batcher.answer_next()}
    return [repr(answers[number]) for number in range(len(requests))]


def test_a_callers_whole_numbers_stay_what_they_are_beside_others_floats(tmp_path: Path) -> None:
    """An estimator may have been trained on whole numbers as categories."""
    codes = np.array([[10115], [20095], [80331], [50667]])
    for name, rows in (("array", codes), ("frame", pd.DataFrame(codes, columns=["code"]))):
        encoder = OneHotEncoder(handle_unknown="ignore")
        estimator = make_pipeline(FunctionTransformer(_texts), encoder, LogisticRegression())
        estimator.fit(rows, [0, 1, 0, 1])
        folder = tmp_path / name
        mlflow.sklearn.save_model(
            estimator, folder, serialization_format="cloudpickle", pip_requirements=["mlflow"]
        )
        batcher = Batcher(load_model(folder, "sklearn"))
        whole, float_ = (
            {"data": [[code]], "model_flavor": "sklearn", "predict_function": "predict_proba"}
            for code in (20095, 20095.0)
        )
        right = _answers(batcher, whole)
        assert _answers(batcher, whole, whole) == 2 * right
        assert _answers(batcher, whole, float_)[:1] == right
        assert _answers(batcher, float_, whole)[1:] == right


_SCHEMAS = {
    "none": None,
    "long": Schema([ColSpec("long", "n")]),
    "double": Schema([ColSpec("double", "n")]),
    "float and long": Schema([ColSpec("float", "n"), ColSpec("long", "m")]),
    "double without a name": Schema([ColSpec("double")]),
    "float64": Schema([TensorSpec(np.dtype("float64"), (-1, 2))]),
    "float32 named": Schema([TensorSpec(np.dtype("float32"), (-1,), "n")]),
    "int64": Schema([TensorSpec(np.dtype("int64"), (-1, 1))]),
}


@pytest.mark.parametrize("schema", _SCHEMAS)
def test_nobodys_numbers_change_with_the_company(tmp_path: Path, schema: str) -> None:
    """Whatever the signature makes of them, and in whatever form they come."""
    model = _saved(TELLING, tmp_path / "model", _SCHEMAS[schema])
    batcher = Batcher(model)
    requests = [
        {"data": data, "dtype": dtype, "predict_function": function}
        for dtype, function in (
            *((dtype, "predict") for dtype in (None, "float64", "int64")),
            (None, "predict_proba"),
        )
        for n in (2**53 + 1, 5.0, 7, 8)
        for data in ([[n]], [[n, 1]], [{"n": n}], [{"n": n, "m": 1}], [n])
    ]
    alone = [_answers(Batcher(model), request)[0] for request in requests]
    # Callers are joined after some trials.
    for _ in range(10):
        assert _answers(batcher, *requests) == alone
    # Nor did a trial have to find it out.
    assert not any(learnt.apart for learnt in batcher._learnt.values())


def test_an_error_of_the_model_is_its_own(load: Load) -> None:
    with pytest.raises(ModelError, match="RuntimeError: this number is too much"):
        _ask(load("fragile", "pyfunc"), [[-2]])
    with pytest.raises(NoJsonFormError, match="no JSON form"):
        _ask(load("fragile", "pyfunc"), [[-3]])
    with pytest.raises(InputError, match="has no predict_proba"):
        _ask(load("fragile", "pyfunc"), [[1]], predict_function="predict_proba")


def test_a_model_without_the_flavor_is_not_loaded(trained: TrainedModels) -> None:
    with pytest.raises(ModelError, match="cannot be loaded as sklearn"):
        load_model(trained.folder / "fragile", "sklearn")


def test_a_model_may_opt_out_of_batching(
    trained: TrainedModels, load: Load, tmp_path: Path
) -> None:
    assert load("tree", "sklearn").batching
    shutil.copytree(trained.folder / "tree", tmp_path / "tree")
    with (tmp_path / "tree" / "MLmodel").open("a") as mlmodel:
        mlmodel.write("\nmetadata:\n  batching: false\n")
    assert not load_model(tmp_path / "tree", "sklearn").batching
    assert not load_model(tmp_path / "tree", "pyfunc").batching
