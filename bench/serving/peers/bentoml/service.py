"""BentoML, with its adaptive batching or without."""

import os

import bentoml
import joblib
import numpy as np


@bentoml.service(
    workers=2,
    traffic={"timeout": 60},
    # Off, as it costs much and others are measured without one.
    logging={"access": {"enabled": False}},
)
class Model:
    """One model."""

    def __init__(self) -> None:
        self.model = joblib.load(os.environ["BENCH_FILE"])

    @bentoml.api(
        route="/predict",
        batchable=os.environ["BENCH_BATCH"] == "1",
        max_batch_size=128,
        max_latency_ms=1000,
    )
    def predict(self, data: np.ndarray) -> np.ndarray:
        """Classes of rows."""
        classes: np.ndarray = self.model.predict(data)
        return classes
