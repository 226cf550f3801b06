"""Remove what the proof made: rows by MLflow's own stores, objects by the account of MLflow.

Works on the stores themselves, hence also when the MLflow server is what is broken. `mlflow gc`
would remove what users have deleted and may still want back.
"""

from __future__ import annotations

import os
import time
from typing import Any

import boto3
from link import INPUTS, BrokenLinkError, prove
from mlflow.entities import ViewType
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as TrackingStore

PREFIX = "odsp-verify-"
#: What an interrupted proof left behind is removed by a later one, never while it may still run.
OLD_MS = 3600 * 1000


def mine(name: str, created_ms: int) -> bool:
    """Return whether something is this proof's, or an old one's."""
    return name == INPUTS["name"] or (
        name.startswith(PREFIX) and created_ms < time.time() * 1000 - OLD_MS
    )


def remove_models(uri: str) -> None:
    """Remove registered models with their versions and aliases."""
    registry = RegistryStore(uri)
    for model in registry.search_registered_models(f"name LIKE '{PREFIX}%'"):
        if mine(model.name, model.creation_timestamp):
            registry.delete_registered_model(model.name)


def remove_experiments(uri: str, bucket: str) -> list[str]:
    """Remove experiments with runs and logged models for good; return their ids."""
    store = TrackingStore(uri, f"s3://{bucket}/artifacts")
    removed = []
    for experiment in store.search_experiments(
        ViewType.ALL, filter_string=f"name LIKE '{PREFIX}%'"
    ):
        if not mine(experiment.name, experiment.creation_time):
            continue
        number = experiment.experiment_id
        for run in store.search_runs([number], "", ViewType.ALL):
            store._hard_delete_run(run.info.run_id)  # noqa: SLF001 - what `mlflow gc` calls
        for model in store.search_logged_models([number]):
            store.delete_logged_model(model.model_id)
            store._hard_delete_logged_model(model.model_id)  # noqa: SLF001
        if experiment.lifecycle_stage == "active":
            store.delete_experiment(number)
        store._hard_delete_experiment(number)  # noqa: SLF001
        removed.append(number)
    return removed


def remove_objects(store: Any, bucket: str, experiments: list[str]) -> int:
    """Remove the objects of experiments; return how many there were."""
    count = 0
    for number in experiments:
        prefix = f"artifacts/{number}/"
        while entries := store.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents"):
            for entry in entries:
                store.delete_object(Bucket=bucket, Key=entry["Key"])
                count += 1
    return count


with prove("the proof removes what it made", "mlflow", ["postgres", "minio", "mlflow"]) as proof:
    if not INPUTS["name"].startswith(PREFIX):
        raise BrokenLinkError(f"{INPUTS['name']} is not a name this proof gives")
    uri, bucket = os.environ["MLFLOW_BACKEND_STORE_URI"], INPUTS["bucket"]
    remove_models(uri)
    experiments = remove_experiments(uri, bucket)
    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    objects = remove_objects(client, bucket, experiments)
    proof.detail = f"{len(experiments)} experiment, {objects} objects"
