import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LinearRegression

from model_server.runner.batching import Batcher
from model_server.runner.inputs import model_input
from model_server.runner.model import Model, ModelError
from model_server.runner.warmup import read_example, warm_up

ROWS = [[1.0, 2.0], [3.0, 4.0]]
RECORDS = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}]


class Summing(Model):
    """Adds up each row; refuses rows of other than two values, and fewer rows than it needs."""

    def __init__(self, least: int = 1) -> None:
        self.calls: list[int] = []
        self._least = least

    def ask(
        self, data: list[Any], function: str, dtype: str | None, params: dict[str, Any] | None
    ) -> Any:
        self.calls.append(len(data))
        rows = np.asarray(model_input(data))
        if rows.shape[1] != 2 or len(data) < self._least:
            raise ValueError("rows of two values, please")
        return rows.sum(axis=1)


@pytest.mark.parametrize(
    ("example", "rows"),
    [
        (
            {"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2.5], [3, None]]}},
            [{"a": 1, "b": 2.5}, {"a": 3, "b": None}],
        ),
        ({"dataframe_split": {"columns": [0, 1], "data": [[1, 2]]}}, [[1, 2]]),
        ({"dataframe_split": {"data": [[1, 2]]}}, [[1, 2]]),
        ({"dataframe_split": {"columns": ["a"], "data": [[1, 2]]}}, None),
        ({"dataframe_split": {"columns": ["a"], "data": 5}}, None),
        ({"dataframe_records": [{"a": 1}]}, [{"a": 1}]),
        ({"inputs": [[1, 2]]}, [[1, 2]]),
        ({"inputs": [[1, 2]], "params": {"a": 1}}, [[1, 2]]),
        ({"instances": 100 * [[1]]}, 64 * [[1]]),
        ({"inputs": {"a": [1, 2], "b": [[3], [4]]}}, [{"a": 1, "b": [3]}, {"a": 2, "b": [4]}]),
        ({"inputs": {"a": [1, 2], "b": [3]}}, None),
        ({"inputs": {"a": "text"}}, None),
        ({"inputs": {}}, None),
        ({"inputs": []}, None),
        ({"inputs": "text"}, None),
        ({"messages": []}, None),
        ([1], None),
    ],
)
def test_the_rows_of_the_example_that_mlflow_stores(
    tmp_path: Path, example: Any, rows: list[Any] | None
) -> None:
    (tmp_path / "serving_input_example.json").write_text(json.dumps(example))
    read = read_example(tmp_path)
    assert (read and read.rows) == rows


@pytest.mark.parametrize(
    ("example", "rows"),
    [
        (pd.DataFrame(ROWS, columns=["a", "b"]), RECORDS),
        (pd.DataFrame(ROWS), ROWS),
        (np.array(ROWS), ROWS),
        (ROWS, ROWS),
        (RECORDS, RECORDS),
        ({"a": np.array([1.0, 3.0]), "b": np.array([2.0, 4.0])}, RECORDS),
        ((np.array(ROWS), {"temperature": 1}), ROWS),
        (csr_matrix(ROWS), None),
    ],
    ids=["frame", "unnamed frame", "array", "lists", "records", "tensors", "params", "sparse"],
)
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_examples_of_new_and_of_older_releases_of_mlflow(
    tmp_path: Path, example: Any, rows: list[Any] | None
) -> None:
    mlflow.sklearn.save_model(
        LinearRegression().fit(ROWS, [0, 1]),
        tmp_path,
        input_example=example,
        pip_requirements=["mlflow"],
    )
    read = read_example(tmp_path)
    assert (read and read.rows) == (rows or ROWS)
    # Older releases store no example as it is served.
    (tmp_path / "serving_input_example.json").unlink()
    read = read_example(tmp_path)
    assert (read and read.rows) == rows


@pytest.mark.parametrize("name", ["serving_input_example.json", "input_example.json"])
def test_a_model_without_a_readable_example_is_not_warmed_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for content in (None, b"{", b"[]", 100_000 * b"["):
        if content:
            (tmp_path / name).write_bytes(content)
        model = Summing()
        warm_up(Batcher(model), tmp_path)
        assert model.calls == []
        assert "not warmed" in capsys.readouterr().err


def test_the_example_is_asked_whole_and_row_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "serving_input_example.json").write_text(json.dumps({"inputs": ROWS}))
    model = Summing()
    warm_up(Batcher(model), tmp_path)
    assert model.calls == [2, 1, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_model_may_need_more_than_one_row(tmp_path: Path) -> None:
    (tmp_path / "serving_input_example.json").write_text(json.dumps({"inputs": ROWS}))
    model = Summing(least=2)
    warm_up(Batcher(model), tmp_path)
    assert model.calls == [2, 1, 1]


def test_only_the_example_itself_can_fail_a_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input_example.json").write_text('[["secret", 2, 3]]')
    warm_up(Batcher(Summing()), tmp_path)
    log = capsys.readouterr().err
    assert "does not take the rows made of its input example" in log
    assert "secret" not in log
    (tmp_path / "serving_input_example.json").write_text('{"inputs": [[1, 2, 3]]}')
    with pytest.raises(ModelError, match=r"fails with its own input example\..*two values, please"):
        warm_up(Batcher(Summing()), tmp_path)
