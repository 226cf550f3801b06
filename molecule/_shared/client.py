"""A client on a platform's host: of MLflow by its own library, of every component by HTTPS."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import scenario

#: MLflow's environment: its own client, and the library that clients of REST use.
PYTHON = "/opt/odsp/mlflow/current/bin/python"

#: Sends requests, each on a connection of its own; why there is no answer is an answer, too.
ASK = """
import email.utils, requests
def ask(url):
    try:
        answer = requests.request(
            v["method"], url, headers=v["headers"], timeout=v["patience"], verify=v["authority"],
            data=v["body"].encode().ljust(v["size"]),
            cert=(v["pair"] + ".crt", v["pair"] + ".key"),
        )
    except requests.RequestException as failure:
        return [0, str(failure), 0]
    date = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
    return [answer.status_code, answer.text, date]
print(json.dumps([ask(url) for url in v["urls"]]))
"""
#: Connects as four different clients and asks for a page; who is let in gets an answer.
KNOCK = """
import socket, ssl
def knock(pair, plain):
    with socket.create_connection(v["address"], timeout=30) as connection:
        try:
            if plain:
                connection.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
                return connection.recv(100).decode() or "closed"
            context = ssl.create_default_context(cafile=v["authority"])
            if pair:
                context.load_cert_chain(pair + ".pem")
            with context.wrap_socket(connection, server_hostname=v["address"][0]) as tls:
                tls.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
                return "let in" if tls.recv(100) else "closed"
        except (ConnectionError, ssl.SSLError):
            return "closed"
print(json.dumps({name: knock(pair, name == "plain text") for name, pair in v["pairs"].items()}))
"""
#: Trains a real model, registers it under the alias champion, and says what it answers itself. The
#: next version has other answers and the same requirements.
TRAIN = """
import mlflow, pathlib
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
data, target = load_iris(return_X_y=True)
mlflow.set_experiment(v["name"])
def register(model, requirements=None):
    with mlflow.start_run():
        return mlflow.sklearn.log_model(model, name="model", pip_requirements=requirements,
                                        registered_model_name=v["name"])
model = LogisticRegression(max_iter=500).fit(data, target)
made = register(model)
mlflow.MlflowClient().set_registered_model_alias(v["name"], "champion", 1)
files = pathlib.Path(mlflow.artifacts.download_artifacts(made.model_uri))
other = LogisticRegression(max_iter=500).fit(data, target + 3)
made = register(other, (files / "requirements.txt").read_text().splitlines())
rows = data[::15].tolist()
print(json.dumps({"rows": rows, "predict": model.predict(rows).tolist(),
                  "predict_proba": model.predict_proba(rows).tolist(),
                  "next": {"version": int(made.registered_model_version),
                           "predict": other.predict(rows).tolist()}}))
"""


@dataclass(frozen=True)
class Answer:
    """What a request came to. Without an answer its status is 0, and the text says why."""

    status: int
    text: str
    #: What the server took for the time (seconds since 1970).
    date: float

    @property
    def body(self) -> Any:
        """What the text means as JSON."""
        return json.loads(self.text)


@dataclass(frozen=True)
class Client:
    """A client of the server at a URL, with a certificate of the platform."""

    host: Any
    url: str
    #: The path of the certificate and its key, less .crt, .key and .pem.
    pair: str

    def run(self, code: str, **values: Any) -> Any:
        """Run Python with MLflow's unchanged client and `values` as `v`; return its last line."""
        environment = {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_SERVER_CERT_PATH": scenario.CA,
            "MLFLOW_TRACKING_CLIENT_CERT_PATH": f"{self.pair}.pem",
            "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
            "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "DO_NOT_TRACK": "true",
            "GIT_PYTHON_REFRESH": "quiet",
        }
        return scenario.python(self.host, code, PYTHON, environment, **values)

    def train(self, name: str) -> dict[str, Any]:
        """Register a classifier as version 1 and `champion`; return some rows and its answers.

        Another one is `next`: its version, and what it predicts.
        """
        return dict(self.run(TRAIN, name=name))

    def ask_all(
        self,
        *paths: str,
        method: str = "GET",
        body: Any = None,
        size: int = 0,
        patience: float = 30,
        **headers: str,
    ) -> list[Answer]:
        """Send requests, one after the other; each waits so long for a piece of its answer.

        Their body is `body` in JSON and blanks up to `size`.
        """
        values: dict[str, Any] = {
            "urls": [self.url + path for path in paths],
            "method": method,
            "body": "" if body is None else json.dumps(body),
            "size": size,
            "headers": {"Content-Type": "application/json", **headers},
            "pair": self.pair,
            "authority": scenario.CA,
            "patience": patience,
        }
        return [Answer(*answer) for answer in scenario.python(self.host, ASK, PYTHON, **values)]

    def ask(self, path: str, method: str = "GET", **request: Any) -> Answer:
        """Send a single request."""
        return self.ask_all(path, method=method, **request)[0]

    def knocks(self) -> dict[str, str]:
        """Return what becomes of a connection with our certificate, a foreign one, none, no TLS."""
        where = urlsplit(self.url)
        with scenario.foreign_pair(self.host, Path(self.pair).name) as foreign:
            pairs = {"ours": self.pair, "foreign": foreign, "none": "", "plain text": ""}
            address = (where.hostname, where.port)
            told = scenario.python(
                self.host, KNOCK, PYTHON, address=address, pairs=pairs, authority=scenario.CA
            )
            return dict(told)

    def wait_for(self, path: str, *, seconds: float = 300, **request: Any) -> float:
        """Ask until the answer is 200; return the seconds until then."""
        began = time.monotonic()

        def answered() -> bool:
            """Tell whether the server answers this request with 200."""
            return self.ask(path, **request).status == 200

        scenario.wait_until(answered, seconds)
        return time.monotonic() - began
