"""What a user does in a notebook: search on the workers, log to MLflow, register the best model."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import time
import uuid
from typing import Any

import mlflow
import mlflow.sklearn
from distributed import Client, get_worker
from link import INPUTS, BrokenLinkError, prove, tell_facts
from mlflow.models import infer_signature
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

NAME = f"odsp-verify-{uuid.uuid4().hex[:8]}"
ALIAS = "champion"
SECONDS_TO_JOIN = 15
#: Packages that the model needs wherever it is loaded.
NEEDED = ("mlflow", "scikit-learn", "numpy", "pandas", "skops")


def fit(strength: float) -> dict[str, Any]:
    """Fit one candidate and tell its score and, on a worker, which one it was."""
    rows, labels = load_breast_cancer(return_X_y=True)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
    score = float(cross_val_score(model, rows, labels, cv=3).mean())
    try:
        worker = get_worker().address
    except ValueError:  # no cluster: the notebook itself
        worker = ""
    return {
        "score": score,
        "strength": strength,
        "worker": worker,
        "model": model.fit(rows, labels),
    }


def workers_by_host(client: Any, expected: dict[str, int]) -> dict[str, list[str]]:
    """Return the addresses of every host's workers once all are there, or raise BrokenLinkError."""
    deadline = time.monotonic() + SECONDS_TO_JOIN
    while True:
        found: dict[str, list[str]] = {host: [] for host in expected}
        for address, worker in client.scheduler_info(n_workers=-1)["workers"].items():
            found.setdefault(str(worker["name"]).split("/")[0], []).append(address)
        missing = {h: n - len(found[h]) for h, n in expected.items() if len(found[h]) < n}
        if not missing:
            return found
        if time.monotonic() > deadline:
            host = next(iter(missing))
            text = ", ".join(f"{n} of {expected[h]} on {h}" for h, n in missing.items())
            raise BrokenLinkError(f"workers are missing: {text}", role="dask_worker", host=host)
        time.sleep(0.5)


def search_on_workers(expected: dict[str, int]) -> dict[str, Any]:
    """Search with every worker of the cluster and return the best candidate."""
    cluster = ["dask_scheduler", "dask_worker", "jupyterlab"]
    with prove("a notebook's Client() finds every worker", "dask_scheduler", cluster) as proof:
        client = Client(timeout=SECONDS_TO_JOIN)
        found = workers_by_host(client, expected)
        count = sum(len(addresses) for addresses in found.values())
        address = str(client.scheduler.address)
        proof.detail = f"{count} on {', '.join(sorted(found))}, {address}"
        if not address.startswith("tls://"):
            raise BrokenLinkError(f"the scheduler is reached without TLS: {address}")
    with prove("every worker host trains", "dask_worker", cluster) as proof:
        workers = [address for addresses in found.values() for address in addresses]
        candidates = max(6, len(workers))
        futures = [
            client.submit(fit, 10 ** (3 * i / candidates - 2), workers=[worker], pure=False)
            for i, worker in zip(range(candidates), itertools.cycle(workers), strict=False)
        ]
        results = client.gather(futures)
        client.close()
        worked = {result["worker"] for result in results}
        for host, addresses in found.items():
            if addresses and not worked & set(addresses):
                raise BrokenLinkError(f"{host} trained nothing", role="dask_worker", host=host)
        best = max(results, key=lambda result: result["score"])
        proof.detail = f"{candidates} fits, best accuracy {best['score']:.3f}"
        if best["score"] < 0.9:
            raise BrokenLinkError(
                f"the best accuracy is {best['score']:.3f}, it should be above 0.9"
            )
        return dict(best)


def log_and_register(best: dict[str, Any]) -> None:
    """Log the best candidate as a run with a model, register it and give it an alias."""
    storage = ["postgres", "minio", "mlflow"]
    with prove("the run is logged and its model registered", "mlflow", storage) as proof:
        rows = load_breast_cancer().data
        predictions = best["model"].predict(rows)
        probabilities = best["model"].predict_proba(rows)
        mlflow.set_experiment(NAME)
        with mlflow.start_run(run_name=NAME) as run:
            mlflow.log_param("strength", best["strength"])
            mlflow.log_metric("accuracy", best["score"])
            logged = mlflow.sklearn.log_model(
                best["model"],
                name="model",
                signature=infer_signature(rows, predictions),
                registered_model_name=NAME,
                pip_requirements=[f"{p}=={importlib.metadata.version(p)}" for p in NEEDED],
            )
        client = mlflow.MlflowClient()
        version = str(logged.registered_model_version)
        client.set_registered_model_alias(NAME, ALIAS, version)
        if client.get_model_version_by_alias(NAME, ALIAS).version != version:
            raise BrokenLinkError(f"the alias {ALIAS} does not lead to version {version}")
        model = mlflow.get_logged_model(logged.model_id)
        proof.detail = f"{NAME} version {version} @{ALIAS}"
        tell_facts(
            run=run.info.run_id,
            version=version,
            alias=ALIAS,
            artifacts=model.artifact_location,
            rows=rows[::10].tolist(),
            predictions=predictions[::10].tolist(),
            probabilities=probabilities[::10].tolist(),
        )


def main() -> None:
    """Walk from the notebook to the registry, as far as this platform has components."""
    tell_facts(name=NAME, user=os.environ.get("USER", ""))
    expected: dict[str, int] = INPUTS["workers"]
    best = search_on_workers(expected) if expected else fit(1.0)
    if INPUTS["mlflow"]:
        log_and_register(best)


main()
