"""V2 as a client of another make speaks it, to a server with real models."""

from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from conftest import TrainedModels, make_settings
from model_server import __version__, create_app
from registry_server import RegistryServer
from servers import served

NAME = "iris & co."
PATH = "/v2/models/iris%20%26%20co."


@pytest.fixture(scope="module")
def url(trained: TrainedModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on loopback; a start of a model takes seconds, so the tests share it."""
    registry = RegistryServer()
    registry.versions = {
        (NAME, 1): trained.folder / "logistic",
        (NAME, 2): trained.folder / "tree",
        ("v2", 1): trained.folder / "linear",
    }
    registry.aliases = {(NAME, "champion"): 1}
    settings = make_settings(tmp_path_factory.mktemp("v2"), registry.url)
    with served(create_app(settings)) as url:
        for version in ("champion", 2):
            answer = httpx2.get(f"{url}/load_model/{NAME}/pyfunc/{version}", timeout=60)
            assert answer.status_code == 200, answer.text
        yield url
    registry.close()


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    client = triton.InferenceServerClient(url.removeprefix("http://"), network_timeout=60)
    yield client
    client.close()


def _tensor(rows: Any, datatype: str = "FP64", *, binary: bool = False) -> Any:
    array = np.array(rows, dtype=triton.triton_to_np_dtype(datatype) if datatype else None)
    tensor = triton.InferInput("x", list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def test_a_client_finds_its_way(client: Any, url: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata() == {
        "name": "model-server",
        "version": __version__,
        "extensions": ["model_repository", "binary_tensor_data"],
    }
    # The protocol's text has one address, its OpenAPI document the other.
    answers = [httpx2.get(f"{url}{path}", timeout=60).json() for path in ("/v2", "/v2/")]
    assert answers[0] == answers[1]
    assert client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, "1")
    assert not client.is_model_ready("rose")
    assert not client.is_model_ready(NAME, "3")
    entries = {(entry["name"], entry["version"]): entry for entry in _index(client)}
    assert entries[NAME, "1"] == {
        "name": NAME,
        "version": "1",
        "state": "READY",
        "reason": "",
        "model_flavor": "pyfunc",
    }


def _index(client: Any) -> Any:
    return client.get_model_repository_index()


def test_a_model_is_described_by_its_signature(client: Any, trained: TrainedModels) -> None:
    described = client.get_model_metadata(NAME, "champion")
    assert described == {
        "name": NAME,
        "versions": ["1", "2"],
        "platform": "mlflow_pyfunc",
        "inputs": [
            {"name": column, "datatype": "FP64", "shape": [-1, 1]} for column in trained.columns
        ],
        "outputs": [{"name": "predict", "datatype": "BYTES", "shape": [-1, 1]}],
    }
    # Without a version the highest is meant, which has no signature.
    assert client.get_model_metadata(NAME)["inputs"] == []


@pytest.mark.parametrize("binary", [False, True])
def test_rows_are_predicted(client: Any, trained: TrainedModels, binary: bool) -> None:
    tensor = _tensor(trained.rows, binary=binary)
    answer = client.infer(NAME, [tensor], model_version="2", request_id="r-7")
    response = answer.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == (NAME, "2", "r-7")
    assert answer.as_numpy("predict").tolist() == [[it] for it in trained.predictions["tree"]]
    # Without a version: the highest one.
    assert client.infer(NAME, [tensor]).get_response()["model_version"] == "2"


@pytest.mark.parametrize("binary", [False, True])
def test_columns_are_predicted_by_an_alias(
    client: Any, trained: TrainedModels, binary: bool
) -> None:
    tensors = []
    for column, values in zip(trained.columns, zip(*trained.rows, strict=True), strict=True):
        tensor = triton.InferInput(column, [len(values), 1], "FP32")
        tensor.set_data_from_numpy(np.array(values, dtype="f4").reshape(-1, 1), binary_data=binary)
        tensors.append(tensor)
    answer = client.infer(
        NAME,
        tensors,
        model_version="champion",
        outputs=[triton.InferRequestedOutput("predict_proba", binary_data=binary)],
    )
    expected = np.array(trained.probabilities["logistic"])
    np.testing.assert_allclose(answer.as_numpy("predict_proba"), expected, rtol=1e-5)
    texts = client.infer(NAME, tensors, model_version="1").as_numpy("predict")
    assert texts.tolist() == [[it] for it in trained.predictions["logistic"]]


def test_a_wrong_request_is_an_error_of_the_client(client: Any, url: str) -> None:
    with pytest.raises(InferenceServerException, match="the model takes 4") as told:
        client.infer(NAME, [_tensor([[1.0]])], model_version="1")
    assert told.value.status() == "422"
    with pytest.raises(InferenceServerException, match="There is no output 'score'"):
        client.infer(
            NAME,
            [_tensor([[1.0, 2, 3, 4]])],
            outputs=[triton.InferRequestedOutput("score", binary_data=False)],
        )
    with pytest.raises(InferenceServerException, match="No version of model 'rose' is loaded"):
        client.infer("rose", [_tensor([[1.0]])])
    with pytest.raises(InferenceServerException, match="gzip' is not taken"):
        client.infer(NAME, [_tensor([[1.0]])], request_compression_algorithm="gzip")


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "sentence"),
    [
        (f"{PATH}/infer", b"{", {}, 422, "The body is wrong"),
        (f"{PATH}/infer", b"{}", {}, 422, "missing required field `inputs`"),
        (f"{PATH}/infer", b'{"inputs": ' + 100_000 * b"[", {}, 422, "The body is wrong"),
        (f"{PATH}/infer", b'{"inputs": []}', {}, 422, "at least one tensor"),
        (
            f"{PATH}/infer",
            b'{"inputs": [], "parameters": {"model_flavor": "onnx"}}',
            {},
            422,
            "onnx",
        ),
        (f"{PATH}/infer", b"{}", {"Inference-Header-Content-Length": "9"}, 422, "the length of"),
        (f"{PATH}/infer", b"{}", {"Inference-Header-Content-Length": "-1"}, 422, "the length of"),
        (f"{PATH}/infer", b"\xff", {"Inference-Header-Content-Length": "1"}, 422, "body is wrong"),
        (f"{PATH}/versions/7/infer", b'{"inputs": []}', {}, 404, "with a version 7"),
        ("/v2/repository/index", b"[]", {}, 422, "The body is wrong"),
        ("/v2/repository/models/rose/load", b"", {}, 422, "Say which version of 'rose' to load"),
        ("/v2/repository/models/rose/load", b'{"parameters": {"version": "1"}}', {}, 404, "'rose'"),
        ("/v2/repository/models/rose/load", b'{"parameters": {"version": 1}}', {}, 422, "version"),
        ("/v2/repository/models/rose/unload", b"", {}, 404, "No version of model 'rose'"),
        ("/v2/nothing/here", b"", {}, 405, "there is no POST of this address"),
    ],
)
def test_a_wrong_request_is_told_in_a_sentence(
    url: str, path: str, content: bytes, headers: dict[str, str], status: int, sentence: str
) -> None:
    answer = httpx2.post(f"{url}{path}", content=content, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    (told,) = answer.json().items()
    assert told[0] == "error"
    assert sentence in told[1]


def test_a_model_may_be_called_v2(url: str, client: Any, trained: TrainedModels) -> None:
    """Loaded and unloaded by V2, it is asked by both protocols."""
    load = f"{url}/v2/repository/models/v2/load"
    loaded = httpx2.post(load, json={"parameters": {"version": "1"}}, timeout=60)
    assert loaded.json()["state"] == "READY"
    expected = trained.predictions["linear"]
    native = httpx2.post(f"{url}/v2/1", json={"data": trained.rows}, timeout=60)
    assert native.json()["prediction"] == pytest.approx(expected)
    answer = client.infer("v2", [_tensor(trained.rows)]).as_numpy("predict")
    np.testing.assert_allclose(answer[:, 0], expected)
    # Without a version, the highest one of those that are loaded: nothing is left to do.
    client.load_model("v2")
    client.unload_model("v2")
    assert not client.is_model_ready("v2")
    assert "v2" not in {entry["name"] for entry in _index(client)}
