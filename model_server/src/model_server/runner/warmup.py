"""The first predictions, of the model's own input example, before anybody waits for one."""

import json
from pathlib import Path
from typing import Any

from .batching import Batcher
from .model import ModelError
from .question import Question
from .values import to_json

_EXAMPLE = "serving_input_example.json"
_MOST_ROWS = 64
_ROWS_APART = 8


def warm_up(batcher: Batcher, folder: Path) -> None:
    """Predict the example, where the model has one of rows; ModelError where that fails."""
    rows = example_rows(folder)
    if not rows:
        return
    # Also one by one: the batcher learns whether the model answers row by row.
    apart = [[row] for row in rows[:_ROWS_APART]] if len(rows) > 1 else []
    for number, data in enumerate([rows, *apart]):
        question = Question(data, "predict", dtype=None, params=None, reply=to_json)
        batcher.put(question, 0, number)
    while batcher:
        for _, _, answer in batcher.answer_next():
            if isinstance(answer, Exception):
                raise ModelError(
                    f"The model fails with its own input example. {answer}"
                ) from answer


def example_rows(folder: Path) -> list[Any] | None:
    """The rows of the input example that MLflow stored with the model."""
    try:
        example = json.loads((folder / _EXAMPLE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(example, dict):
        return None
    table = example.get("dataframe_split")
    if isinstance(table, dict) and isinstance(table.get("data"), list):
        columns = table.get("columns")
        rows: Any = table["data"]
        if isinstance(columns, list) and all(isinstance(name, str) for name in columns):
            rows = [dict(zip(columns, row, strict=True)) for row in rows]
    else:
        rows = next((example[key] for key in ("inputs", "instances") if key in example), None)
    return rows[:_MOST_ROWS] if isinstance(rows, list) else None
