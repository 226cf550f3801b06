"""Walk through the door as users and strangers do: load, predict, unload, and be refused."""

from __future__ import annotations

import base64
import http.client
import json
import math
import re
import ssl
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from link import INPUTS, SECRET, BrokenLinkError, prove

#: The first load of a model builds its environment.
SECONDS = 300
WRONG = "not-the-password"
SERVING = ["postgres", "minio", "mlflow", "model_server", "nginx"]


def connect() -> http.client.HTTPSConnection:
    """Return a connection to the door that trusts the platform's authority beside the system's."""
    tls = ssl.create_default_context()
    tls.load_verify_locations(cadata=INPUTS["ca"])
    door = urlsplit(INPUTS["url"])
    assert door.hostname is not None
    return http.client.HTTPSConnection(door.hostname, door.port, timeout=SECONDS, context=tls)


def ask(
    method: str, path: str, body: object = None, password: str | None = SECRET
) -> tuple[int, Any]:
    """Return status and answer of a request; without a password, a stranger's."""
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    if password is not None:
        user = f"{INPUTS['user']}:{password}".encode()
        headers["Authorization"] = "Basic " + base64.b64encode(user).decode()
    connection = connect()
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, headers)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    try:
        return answer.status, json.loads(content)
    except ValueError:  # a page for people
        page = re.sub(rb"<style.*?</style>|<[^>]*>", b" ", content, flags=re.DOTALL)
        return answer.status, " ".join(page[:300].decode(errors="replace").split())


def expect_ok(method: str, path: str, body: object = None) -> Any:
    """Return the answer of a request that must succeed."""
    status, answer = ask(method, path, body)
    if status != 200:
        reason = answer.get("detail", answer) if isinstance(answer, dict) else answer
        fault = "nginx" if status in (401, 403) else ""
        raise BrokenLinkError(f"{method} {path} gave {status}: {reason}", role=fault)
    return answer


def equal(left: Any, right: Any) -> bool:
    """Return whether two answers are the same, numbers to the last but one digit."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return math.isclose(left, right, rel_tol=1e-9)


def predict(model: dict[str, Any]) -> None:
    """Ask pyfunc for labels and sklearn for probabilities, and compare each one."""
    path = f"/inference/{model['name']}/{model['alias']}"
    for flavor, function, expected in (
        ("pyfunc", "predict", model["predictions"]),
        ("sklearn", "predict_proba", model["probabilities"]),
    ):
        question = {
            "data": model["rows"],
            "predict_function": function,
            "model_flavor": flavor,
            "dtype": None,
            "params": None,
        }
        answer = expect_ok("POST", path, question)["prediction"]
        if not equal(answer, expected):
            raise BrokenLinkError(
                f"{flavor} {function} through the door differs from the model's own"
            )


def unload(path: str) -> tuple[int, Any]:
    """Unload a model, also when something before went wrong."""
    try:
        return ask("DELETE", path)
    except OSError as error:
        return 0, str(error)


def serve(model: dict[str, Any]) -> None:
    """Load by alias, predict, unload; what was loaded is unloaded whatever happens between."""
    name, alias = model["name"], model["alias"]
    flavors = ("pyfunc", "sklearn")
    try:
        with prove("the door loads the model", "model_server", SERVING) as proof:
            paths = [f"/inference/load_model/{name}/{flavor}/{alias}" for flavor in flavors]
            with ThreadPoolExecutor() as pool:
                list(pool.map(expect_ok, ["GET"] * len(paths), paths))
            proof.detail = f"{name} @{alias} as {' and '.join(flavors)}"
        with prove("predictions equal the model's own", "model_server", SERVING) as proof:
            for _ in range(INPUTS["model_servers"]):  # at rest the door takes them in turn
                predict(model)
            proof.detail = f"{len(model['rows'])} rows, labels and probabilities"
    finally:
        statuses = [unload(f"/inference/{name}/{flavor}/{alias}") for flavor in flavors]
    with prove("the door unloads the model", "model_server", SERVING) as proof:
        for status, answer in statuses:
            if status != 200:
                raise BrokenLinkError(f"DELETE gave {status}: {answer}")
        left = [m for m in expect_ok("GET", "/inference/loaded_models") if m["model_name"] == name]
        if left:
            raise BrokenLinkError(f"{name} is still loaded: {left}")
        proof.detail = "nothing of it is loaded; its environment stays cached"


def guard(routes: list[dict[str, str]]) -> None:
    """Each route lets the user in and nobody else."""
    for route in routes:
        path = route["path"]
        behind = [route["role"], "nginx"] if route["role"] != "nginx" else ["nginx"]
        with prove(f"{path} asks who it is", "nginx", behind) as proof:
            for stranger, password in (("nobody", None), ("a wrong password", WRONG)):
                status, _ = ask("GET", path, password=password)
                if status != 401:
                    raise BrokenLinkError(f"{stranger} gets {status} from {path}, not 401")
            status, answer = ask("GET", path)
            if status >= 400:
                raise BrokenLinkError(f"{INPUTS['user']} gets {status} from {path}: {answer}")
            proof.detail = f"401 to strangers, {status} to {INPUTS['user']}"


if INPUTS["model"]:
    serve(INPUTS["model"])
guard(INPUTS["routes"])
