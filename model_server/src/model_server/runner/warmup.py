"""The first predictions, of the model's own input example, before anybody waits for one."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .batching import Answer, Batcher
from .inputs import InputError
from .model import ModelError
from .question import Question
from .values import to_json

_AS_SERVED, _AS_STORED = "serving_input_example.json", "input_example.json"
"""What MLflow stores; older releases have the second one only."""
_MOST_ROWS = 64
_ROWS_APART = 8


@dataclass(frozen=True)
class Example:
    """Rows of a model's input example."""

    rows: list[Any]
    exact: bool
    """Whether this is the example itself, not what could be made of it."""


def warm_up(batcher: Batcher, folder: Path) -> None:
    """Predict the example, where it has rows; ModelError where the model fails with it."""
    example = read_example(folder)
    if example is None:
        _log("no input example of rows is stored with it")
        return
    (answer,) = _ask(batcher, [example.rows])
    if isinstance(answer, InputError | ModelError):
        if example.exact:
            raise ModelError(f"The model fails with its own input example. {answer}") from answer
        _log("it does not take the rows made of its input example")
        return
    if len(example.rows) > 1:
        # The batcher learns whether the model answers row by row. Some take no single row.
        _ask(batcher, [[row] for row in example.rows[:_ROWS_APART]])


def _ask(batcher: Batcher, questions: list[list[Any]]) -> list[Answer]:
    for number, data in enumerate(questions):
        question = Question(data, "predict", dtype=None, params=None, reply=to_json)
        batcher.put(question, 0, number)
    answers = []
    while batcher:
        answers += [answer for *_, answer in batcher.answer_next()]
    return answers


def _log(reason: str) -> None:
    sys.stderr.write(f"The model is not warmed, its first caller may wait longer: {reason}.\n")


def read_example(folder: Path) -> Example | None:
    """The rows of the input example that MLflow stored with the model."""
    served = _read(folder / _AS_SERVED)
    if served is None:
        rows, exact = _stored(_read(folder / _AS_STORED)), False
    else:
        rows, exact = _served(served)
    return Example(rows[:_MOST_ROWS], exact) if rows else None


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _served(example: Any) -> tuple[list[Any] | None, bool]:
    """As MLflow's own server would be asked."""
    if not isinstance(example, dict):
        return None, False
    table = example.get("dataframe_split")
    if isinstance(table, dict):
        return _of_table(table), True
    for key in ("dataframe_records", "inputs", "instances"):
        if isinstance(example.get(key), list):
            return example[key], True
        if isinstance(example.get(key), dict):
            return _of_tensors(example[key]), False
    return None, False


def _stored(example: Any) -> list[Any] | None:
    """As older releases of MLflow stored it: rows, a table or tensors."""
    if isinstance(example, dict) and "inputs" in example:
        example = example["inputs"]
    if isinstance(example, dict):
        # Of a sparse matrix, data is something else.
        is_table = isinstance(example.get("data"), list) and "indptr" not in example
        return _of_table(example) if is_table else _of_tensors(example)
    return example if isinstance(example, list) else None


def _of_table(table: dict[str, Any]) -> list[Any] | None:
    rows, names = table.get("data"), table.get("columns")
    if not isinstance(rows, list):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return rows
    if not all(isinstance(row, list) and len(row) == len(names) for row in rows):
        return None
    return [dict(zip(names, row, strict=True)) for row in rows]


def _of_tensors(tensors: dict[str, Any]) -> list[Any] | None:
    """Records of what each tensor has for a row."""
    columns = list(tensors.values())
    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) != 1:
        return None
    return [dict(zip(tensors, row, strict=True)) for row in zip(*columns, strict=True)]
