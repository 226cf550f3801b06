import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from conftest import TrainedModels
from model_server.runner.inputs import InputError
from model_server.runner.model import Model, ModelError, load_model
from model_server.runner.native import read_native
from model_server.runner.values import NoJsonFormError

# What MLflow and scikit-learn warn of inside a model's process is for its log.
pytestmark = pytest.mark.filterwarnings("default")

Load = Callable[[str, str], Model]


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
