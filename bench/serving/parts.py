"""Time the work on one request in a model's process: run by its environment's Python.

`parts.py ESTIMATOR ROWS`, a joblib file and a JSON file of rows; prints microseconds as JSON, by
number of rows. Each part runs in a loop of its own, so these are the least that it takes.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_server/src/model_server"))
import joblib

# As in a model's process: there is no package `model_server` there.
model_input = importlib.import_module("runner.inputs").model_input
read_native = importlib.import_module("runner.native").read_native

LOOPS, TIMES = 500, 7


def microseconds(work: Callable[[], Any]) -> float:
    """Of one call, the quickest loop's."""
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        for _ in range(LOOPS):
            work()
        seconds.append(time.perf_counter() - started)
    return round(min(seconds) / LOOPS * 1e6, 1)


def parts(estimator: Any, rows: list[list[float]]) -> dict[str, float]:
    """Microseconds of each part."""
    body = json.dumps({"data": rows, "model_flavor": "sklearn"}).encode()
    question = read_native(body)
    array = model_input(rows)
    prediction = estimator.predict(array)
    return {
        "JSON to rows": microseconds(lambda: read_native(body)),
        "rows to an array": microseconds(lambda: model_input(rows)),
        "scikit-learn's predict": microseconds(lambda: estimator.predict(array)),
        "prediction to JSON": microseconds(lambda: question.reply(prediction)),
    }


if __name__ == "__main__":
    model, rows = joblib.load(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    print(json.dumps({count: parts(model, rows[:count]) for count in (1, len(rows))}))
