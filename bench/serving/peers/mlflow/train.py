"""Train into the registry at MLFLOW_TRACKING_URI, and lay what else servers need into a folder.

The folder gets `lr.joblib` and `rf.joblib` for servers that read no registry, and `answers.json`:
100 rows of four numbers, and what scikit-learn itself predicts for them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import joblib
import mlflow
import numpy as np
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

#: What version 2 adds to every class, so that an answer shows which version gave it.
SHIFT = 10


def register(name: str, model: Any, rows: Any) -> None:
    """Log a model as a new version; with an example, as MLflow's pages recommend."""
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            model,
            name="model",
            registered_model_name=name,
            input_example=rows[:2],
            serialization_format="cloudpickle",
        )


def main() -> None:
    """Train LR (two versions) and RF."""
    folder = Path(sys.argv[1])
    x, y = load_iris(return_X_y=True)
    rows = x[np.random.default_rng(0).permutation(len(x))[:100]]
    answers = {"rows": rows.tolist()}
    for name, model in {
        "lr": LogisticRegression(max_iter=500),
        "rf": RandomForestClassifier(n_estimators=100, random_state=0),
    }.items():
        model.fit(x, y)
        register(name, model, rows)
        joblib.dump(model, folder / f"{name}.joblib")
        answers[name] = model.predict(rows).tolist()
    register("lr", LogisticRegression(max_iter=500).fit(x, y + SHIFT), rows)
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
