import json
from pathlib import Path
from typing import Any

import pytest

from model_server.runner.warmup import example_rows


@pytest.mark.parametrize(
    ("example", "rows"),
    [
        (
            {"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2.5], [3, None]]}},
            [{"a": 1, "b": 2.5}, {"a": 3, "b": None}],
        ),
        ({"dataframe_split": {"columns": [0, 1], "data": [[1, 2]]}}, [[1, 2]]),
        ({"dataframe_split": {"data": [[1, 2]]}}, [[1, 2]]),
        ({"inputs": [[1, 2]]}, [[1, 2]]),
        ({"instances": 100 * [[1]]}, 64 * [[1]]),
        ({"inputs": {"tensor": [1]}}, None),
        ({"messages": []}, None),
        ([1], None),
    ],
)
def test_the_rows_of_the_example_that_mlflow_stores(
    tmp_path: Path, example: Any, rows: list[Any] | None
) -> None:
    (tmp_path / "serving_input_example.json").write_text(json.dumps(example))
    assert example_rows(tmp_path) == rows


def test_a_model_without_a_readable_example_has_no_rows(tmp_path: Path) -> None:
    assert example_rows(tmp_path) is None
    (tmp_path / "serving_input_example.json").write_bytes(b"{")
    assert example_rows(tmp_path) is None
