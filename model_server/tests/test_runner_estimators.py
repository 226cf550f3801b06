"""Estimators are loaded without MLflow, and are what MLflow would have loaded."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_server.runner.estimators import is_usual
from model_server.runner.mlmodel import read_mlmodel
from model_server.runner.model import ModelError, load_model
from model_server.runner.open_inference import describe

# What MLflow and scikit-learn warn of inside a model's process is for its log.
pytestmark = pytest.mark.filterwarnings("default")

FORMATS = ("pickle", "cloudpickle", "skops")
_RUNNER = """
import json, sys
from pathlib import Path
from model_server.runner.model import load_model
model = load_model(Path(sys.argv[1]), "sklearn")
answer = model.predict(json.loads(sys.argv[2]), "predict", None, None)
print(json.dumps([answer.tolist(), sorted({"mlflow", "pandas", "pyarrow"} & set(sys.modules))]))
"""


@dataclass(frozen=True)
class Saved:
    """A model in a folder, rows to ask it, and what it answered when it was trained."""

    folder: Path
    rows: list[Any]
    answer: list[Any]


Save = Callable[..., Saved]


def _python(code: str, *arguments: str | Path) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={"PYTHONPATH": str(Path(__file__).parents[1] / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Save]:
    """Train on iris and save as MLflow does."""
    from mlflow.models import infer_signature
    from mlflow.sklearn import save_model
    from sklearn.compose import make_column_transformer
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    frame, target = load_iris(return_X_y=True, as_frame=True)

    def save(kind: str, format_: str, **options: Any) -> Saved:
        data = frame.to_numpy() if kind == "array" else frame
        scaler: Any = StandardScaler()
        if kind == "columns":
            scaler = make_column_transformer((scaler, list(frame.columns[:2])))
        model = make_pipeline(scaler, LogisticRegression(max_iter=500)).fit(data, target)
        folder = tmp_path_factory.mktemp("estimator") / "model"
        if format_ == "skops":
            options.setdefault("skops_trusted_types", [])
        save_model(
            model,
            folder,
            serialization_format=format_,
            signature=infer_signature(data, model.predict(data)),
            pip_requirements=["mlflow", "scikit-learn"],
            **options,
        )
        sample = data[::50]
        rows = sample.tolist() if kind == "array" else sample.to_dict("records")
        return Saved(folder, rows, model.predict(sample).tolist())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield save


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("kind", ["array", "names", "columns"])
def test_an_estimator_predicts_as_it_was_trained(save: Save, kind: str, format_: str) -> None:
    saved = save(kind, format_)
    from mlflow.sklearn import load_model as load_by_mlflow

    mine = load_model(saved.folder, "sklearn")
    assert mine.predict(saved.rows, "predict", None, None).tolist() == saved.answer
    theirs: Any = load_by_mlflow(str(saved.folder))
    assert type(mine._model) is type(theirs)  # type: ignore[attr-defined]
    assert repr(mine._model) == repr(theirs)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "format_", "imported"),
    [
        ("array", "cloudpickle", []),
        ("array", "skops", []),
        ("names", "pickle", ["pandas", "pyarrow"]),
    ],
)
def test_only_what_the_model_needs_is_imported(
    save: Save, kind: str, format_: str, imported: list[str]
) -> None:
    saved = save(kind, format_)
    answer = _python(_RUNNER, saved.folder, json.dumps(saved.rows))
    assert json.loads(answer) == [saved.answer, imported]


def test_pandas_comes_with_its_first_use(save: Save) -> None:
    code = """
import sys
from pathlib import Path
from model_server.runner.model import load_model
load_model(Path(sys.argv[1]), "sklearn")
assert "pandas" not in sys.modules
from sklearn.utils import fixes
series = fixes.pd.Series([1.0])
import pandas
assert type(series) is pandas.Series
"""
    _python(code, save("array", "cloudpickle").folder)


@pytest.mark.parametrize("kind", ["array", "names"])
def test_the_signature_says_what_mlflows_own_says(save: Save, kind: str) -> None:
    from mlflow.models import Model

    saved = save(kind, "cloudpickle")
    mlmodel = read_mlmodel(saved.folder)
    assert mlmodel is not None
    assert mlmodel.signature is not None
    theirs = Model.load(str(saved.folder)).signature
    assert describe(mlmodel.signature) == describe(theirs)


def test_modules_that_were_logged_with_a_model_are_found(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shifting_of_rows.py").write_text(
        "def shift(rows):\n    return [[x + 1] for (x,) in rows]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import shifting_of_rows  # type: ignore[import-not-found]
    from mlflow.sklearn import save_model
    from sklearn.linear_model import LinearRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    model = make_pipeline(FunctionTransformer(shifting_of_rows.shift), LinearRegression())
    model.fit([[0.0], [1.0]], [1.0, 2.0])
    save_model(
        model,
        tmp_path / "model",
        serialization_format="pickle",
        code_paths=[str(tmp_path / "shifting_of_rows.py")],
        pip_requirements=["mlflow", "scikit-learn"],
    )
    (tmp_path / "shifting_of_rows.py").unlink()
    (value,), imported = json.loads(_python(_RUNNER, tmp_path / "model", "[[4.0]]"))
    assert value == pytest.approx(5.0)
    assert imported == []


def test_types_that_nobody_trusts_are_not_loaded(save: Save) -> None:
    import skops.io
    from sklearn.preprocessing import FunctionTransformer

    saved = save("array", "skops")
    skops.io.dump(FunctionTransformer(json.loads), saved.folder / "model.skops")
    with pytest.raises(ModelError, match="UntrustedTypesFoundException"):
        load_model(saved.folder, "sklearn")


def test_mlflows_own_switch_against_pickles_is_obeyed(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save("array", "pickle")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with pytest.raises(ModelError, match="MLFLOW_ALLOW_PICKLE_DESERIALIZATION"):
        load_model(saved.folder, "sklearn")


@pytest.mark.parametrize(
    ("change", "understood"),
    [
        ({}, True),
        ({"serialization_format": "joblib"}, False),
        ({"of_a_later_mlflow": True}, False),
        ({"pickled_model": None}, False),
        ({"code": ["code"]}, False),
    ],
)
def test_what_is_unusual_is_left_to_mlflow(
    save: Save, change: dict[str, Any], understood: bool
) -> None:
    saved = save("array", "cloudpickle")
    path = saved.folder / "MLmodel"
    content = yaml.safe_load(path.read_text())
    content["flavors"]["sklearn"] |= change
    path.write_text(yaml.safe_dump(content))
    mlmodel = read_mlmodel(saved.folder)
    assert mlmodel is not None
    assert is_usual(mlmodel.flavors["sklearn"]) is understood


@pytest.mark.parametrize(
    "inputs",
    [
        '[{"type": "array", "items": {"type": "double"}, "name": "a", "required": true}]',
        '[{"type": "double"}, {"type": "double", "name": "b"}]',
        '[{"type": "double", "name": "a", "optional": true}]',
        '{"type": "double"}',
        '[{"type": "tensor", "tensor-spec": {"dtype": "no type", "shape": [-1]}}]',
        "[",
    ],
)
def test_signatures_of_other_kinds_are_left_to_mlflow(tmp_path: Path, inputs: str) -> None:
    content = {"flavors": {"sklearn": {}}, "signature": {"inputs": inputs, "outputs": None}}
    (tmp_path / "MLmodel").write_text(yaml.safe_dump(content))
    assert read_mlmodel(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", "flavors: 1", "a: [", "\x00"])
def test_a_description_that_is_none_is_left_to_mlflow(tmp_path: Path, content: str) -> None:
    (tmp_path / "MLmodel").write_text(content)
    assert read_mlmodel(tmp_path) is None
