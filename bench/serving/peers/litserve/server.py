"""LitServe with batching: what is queued goes together, nothing waits for more."""

import os
from typing import Any

import joblib
import litserve
import numpy as np


class Api(litserve.LitAPI):
    """One model."""

    def setup(self, device: str) -> None:
        """Load it, once per process."""
        self.model = joblib.load(os.environ["BENCH_FILE"])

    def decode_request(self, request: dict[str, Any]) -> Any:
        """The rows of one caller."""
        return np.asarray(request["data"], dtype=float)

    def batch(self, inputs: list[Any]) -> Any:
        """All callers' rows."""
        self.lengths = [len(rows) for rows in inputs]
        return np.concatenate(inputs)

    def predict(self, rows: Any) -> Any:
        """Classes of all."""
        return self.model.predict(rows)

    def unbatch(self, output: Any) -> list[Any]:
        """Each caller's part."""
        return np.split(output, np.cumsum(self.lengths)[:-1])

    def encode_response(self, output: Any) -> dict[str, Any]:
        """One caller's answer."""
        return {"prediction": output.tolist()}


if __name__ == "__main__":
    litserve.LitServer(
        Api(max_batch_size=64, batch_timeout=0.0, api_path="/predict"),
        accelerator="cpu",
        workers_per_device=1,
        timeout=False,
    ).run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="error",
        access_log=False,
    )
