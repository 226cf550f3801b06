"""The estimators that tests serve, without MLflow: the same in every environment."""

from typing import Any, NamedTuple

from sklearn.datasets import load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.tree import DecisionTreeClassifier


class IrisModels(NamedTuple):
    """What was learnt of the iris data set, and from which rows."""

    frame: Any
    """All rows, with named columns."""
    sample: Any
    """One row of each class."""
    models: dict[str, Any]
    """`logistic` on named columns, with texts for classes; `tree` and `linear` on arrays."""


def fit_models() -> IrisModels:
    """Train them anew."""
    frame, target = load_iris(return_X_y=True, as_frame=True)
    array = frame.to_numpy()
    models = {
        # By a solver that goes on to the one solution: where others stop is up to the processor.
        "logistic": LogisticRegression(solver="newton-cholesky").fit(
            frame, target.map("abc".__getitem__)
        ),
        "tree": DecisionTreeClassifier(random_state=0).fit(array, target),
        "linear": LinearRegression().fit(array, target),
    }
    return IrisModels(frame, frame.iloc[[0, 60, 120]], models)
