"""NVIDIA Triton through pytriton: dynamic batching without delay, the V2 protocol in JSON."""

import os
from typing import Any

import joblib
import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

model = joblib.load(os.environ["BENCH_FILE"])


@batch
def predict(rows: Any) -> dict[str, Any]:
    """Classes of all callers' rows."""
    return {"classes": model.predict(rows).astype(np.int64).reshape(-1, 1)}


def main() -> None:
    """Serve until SIGTERM."""
    http, grpc, metrics = (int(port) for port in os.environ["BENCH_PORTS"].split(","))
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=http,
        grpc_address="127.0.0.1",
        grpc_port=grpc,
        metrics_address="127.0.0.1",
        metrics_port=metrics,
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name=os.environ["BENCH_MODEL"],
            infer_func=predict,
            inputs=[Tensor(name="rows", dtype=np.float64, shape=(4,))],
            outputs=[Tensor(name="classes", dtype=np.int64, shape=(1,))],
            config=ModelConfig(
                max_batch_size=256, batcher=DynamicBatcher(max_queue_delay_microseconds=0)
            ),
        )
        triton.serve()


if __name__ == "__main__":
    main()
