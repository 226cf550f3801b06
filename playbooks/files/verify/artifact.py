"""Look the model up as objects in MinIO, past MLflow, with the account of MLflow."""

from __future__ import annotations

import os

import boto3
from link import INPUTS, BrokenLinkError, prove

with prove("the model is an object in MinIO", "minio") as proof:
    store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    prefix = "artifacts/" + INPUTS["artifacts"].removeprefix("mlflow-artifacts:/").strip("/") + "/"
    listing = store.list_objects_v2(Bucket=INPUTS["bucket"], Prefix=prefix)
    sizes = {entry["Key"]: entry["Size"] for entry in listing.get("Contents", [])}
    if f"{prefix}MLmodel" not in sizes:
        raise BrokenLinkError(f"the bucket {INPUTS['bucket']} has no object {prefix}MLmodel")
    text = store.get_object(Bucket=INPUTS["bucket"], Key=f"{prefix}MLmodel")["Body"].read().decode()
    if INPUTS["run"] not in text:
        raise BrokenLinkError(f"{prefix}MLmodel is not of run {INPUTS['run']}")
    total = sum(sizes.values())
    proof.detail = f"{len(sizes)} objects, {total} bytes, s3://{INPUTS['bucket']}/{prefix}"
