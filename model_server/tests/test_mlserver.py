"""V2 as a real MLServer answers it, to the same requests about the same models.

Its answers are in `data/mlserver.json`, recorded by `record_mlserver.py`. Whatever differs from
them and is not in the table of accepted differences fails.
"""

import json
import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

import pytest

from conftest import TrainedModels, make_settings
from model_server import create_app
from record_mlserver import RECORD, REQUESTS, ask
from registry_server import RegistryServer
from servers import served

# Six models are started.
pytestmark = pytest.mark.timeout(600)

_RECORDED = json.loads(RECORD.read_text())["exchanges"]

_ONLY_OURS = {"content_type is ours", "answer is ours"}
_SERVED = {
    "answer.id is MLServer's",
    "answer.model_name is MLServer's",
    "answer.model_version is MLServer's",
    "answer.parameters is MLServer's",
    "answer.outputs is MLServer's",
    "answer.error is ours",
    "status: 200 is MLServer's, 422 ours",
}
# Requests, what differs, why it may.
_ACCEPTED: list[tuple[tuple[str, ...], set[str], str]] = [
    (
        ("live", "ready", "model ready*"),
        _ONLY_OURS,
        "The protocol's text has these objects; clients look at the status only.",
    ),
    (
        ("server",),
        {
            "answer.name has another value",
            "answer.version has another value",
            "answer.extensions has another length",
        },
        "Another server, whose extensions MLServer has in part and does not tell.",
    ),
    (
        ("server: with a slash",),
        _ONLY_OURS | {"status: 307 is MLServer's, 200 ours"},
        "The protocol's OpenAPI document has this address; no client needs a redirection.",
    ),
    (
        ("metadata*",),
        {
            "answer.platform has another value",
            "answer.versions has another length",
            "answer.parameters is MLServer's",
        },
        "MLServer tells what its operator wrote; ours what is loaded, of which flavor.",
    ),
    (
        ("infer: *", "loaded: infer"),
        {"answer.id is MLServer's"},
        "MLServer makes an id up where none was sent; the protocol has the request's, if any.",
    ),
    (
        ("infer: *", "id: *", "loaded: infer"),
        {"answer.parameters is MLServer's", "answer.outputs[].parameters is MLServer's"},
        "Its codecs' names, an extension; its own and others' decode by datatype and shape.",
    ),
    (
        ("infer: both functions",),
        _SERVED,
        "A call of the model is one function; the answer says to ask for one in a request.",
    ),
    (
        ("infer: columns without pd",),
        {
            "answer.model_name is ours",
            "answer.model_version is ours",
            "answer.outputs is ours",
            "answer.error is MLServer's",
            "status: 400 is MLServer's, 200 ours",
        },
        "Several tensors can only be columns; tritonclient cannot name a content type for all.",
    ),
    (
        ("wrong: a size of -1",),
        _SERVED,
        "The protocol's sizes are unsigned; MLServer hands them to numpy's reshape.",
    ),
    (
        ("wrong: a content type",),
        _SERVED,
        "MLServer passes over a content type that it does not know; ours tells which there are.",
    ),
    (
        ("data: *",),
        {
            "status: 500 is MLServer's, 422 ours",
            "content_type has another value",
            "answer has another value",
        },
        "To MLServer an error of the model, whose reason its log has; ours says what to change.",
    ),
    (
        ("form: *",),
        {"answer.detail is MLServer's", "answer.error is ours"},
        "FastAPI's own answers; the protocol's is an object with `error`.",
    ),
    (
        ("index*", "unloaded: index"),
        {"answer[].model_flavor is ours"},
        "A version can be loaded as both flavors; other keys are as MLServer has them.",
    ),
    (
        ("index: no body",),
        {"status: 422 is MLServer's, 200 ours", "answer has another value"},
        "The extension's body is optional, and clients send none.",
    ),
    (
        ("load", "load: again", "unload"),
        _ONLY_OURS,
        "Ours tells what was loaded or unloaded; the extension says nothing of a body.",
    ),
]


@pytest.fixture(scope="module", params=["pyfunc", "sklearn"])
def answers(
    request: pytest.FixtureRequest,
    trained: TrainedModels,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Any]]:
    """Ours, by the names of the requests, from models of each flavor."""
    flavor: str = request.param
    registry = RegistryServer()
    registry.versions = {
        ("iris", 1): trained.folder / "logistic",
        ("iris", 2): trained.folder / "tree",
        ("linear", 1): trained.folder / "linear",
    }
    settings = make_settings(tmp_path_factory.mktemp(flavor), registry.url)
    with served(create_app(settings)) as url:
        port = urlsplit(url).port
        assert port
        for name, version in registry.versions:
            loaded = ask(port, "GET", f"/load_model/{name}/{flavor}/{version}", None)
            assert loaded["status"] == 200, loaded
        yield {name: ask(port, *_of_flavor(flavor, *asked)) for name, asked in REQUESTS.items()}
    registry.close()


def _of_flavor(flavor: str, method: str, path: str, body: Any) -> tuple[str, str, Any]:
    """The request as it is for pyfunc, which is meant where nothing is said."""
    if flavor == "pyfunc":
        return method, path, body
    if method == "GET":
        return method, f"{path}?model_flavor={flavor}", body
    if isinstance(body, dict):
        body = body | {"parameters": body.get("parameters", {}) | {"model_flavor": flavor}}
    return method, path, body


def _found(answers: dict[str, Any], name: str) -> set[str]:
    """How our answer differs from the recorded one."""
    (recorded,) = (one for one in _RECORDED if one["name"] == name)
    theirs, ours = recorded["status"], answers[name]["status"]
    found = set()
    # Of one class; whether something is there at all, is said by both or by none.
    if theirs // 100 != ours // 100 or (theirs == 404) != (ours == 404):
        found.add(f"status: {theirs} is MLServer's, {ours} ours")
    for key in ("content_type", "answer"):
        found |= set(_differences(_in_order(recorded[key]), _in_order(answers[name][key]), key))
    return found


def _differences(theirs: Any, ours: Any, where: str) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        # Sentences are everybody's own.
        told = {"error"} if type(theirs.get("error")) is type(ours.get("error")) else set()
        for key in (theirs.keys() | ours.keys()) - told:
            yield from _differences(theirs.get(key), ours.get(key), f"{where}.{key}")
    elif isinstance(theirs, list) and isinstance(ours, list):
        if len(theirs) != len(ours):
            yield f"{where} has another length"
            return
        for one, other in zip(theirs, ours, strict=True):
            yield from _differences(one, other, f"{where}[]")
    elif (theirs is None) != (ours is None):
        yield f"{where} is ours" if theirs is None else f"{where} is MLServer's"
    elif not _are_equal(theirs, ours):
        yield f"{where} has another value"


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return type(one) is type(other) and one == other


def _in_order(answer: Any) -> Any:
    """An index by names and versions; it has no order of its own."""
    if not isinstance(answer, list):
        return answer
    return sorted(answer, key=lambda entry: (entry["name"], entry["version"]))


def test_the_record_is_of_these_requests() -> None:
    recorded = {one["name"]: (one["method"], one["path"], one["body"]) for one in _RECORDED}
    assert recorded == REQUESTS


@pytest.mark.parametrize("name", REQUESTS)
def test_the_answer_is_mlservers(answers: dict[str, Any], name: str) -> None:
    accepted = [what for names, what, _ in _ACCEPTED if _is_of(name, names)]
    assert _found(answers, name) - set().union(*accepted) == set(), answers[name]


def test_what_is_accepted_is_so(answers: dict[str, Any]) -> None:
    """A difference that is gone goes from the table, too."""
    found = {name: _found(answers, name) for name in REQUESTS}
    for names, differences, reason in _ACCEPTED:
        assert differences <= set().union(
            *(what for name, what in found.items() if _is_of(name, names))
        ), reason


def _is_of(name: str, names: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in names)
