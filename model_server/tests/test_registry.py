import base64
import errno
import math
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from model_server import registry as registries
from model_server.errors import (
    ModelNotFoundError,
    ModelNotLoadableError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from model_server.registry import ModelRegistry, ModelVersion, version_number
from model_server.settings import InvalidSettingsError, Settings
from registry_server import RegistryServer


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "artifacts of a model"
    (folder / "code #1").mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors:")
    (folder / "code #1" / "a&b?.py").write_text("pass")
    return folder


@pytest.fixture
def registry(settings: Settings, registry_server: RegistryServer, files: Path) -> ModelRegistry:
    registry_server.versions = {("iris & co.", 3): files}
    registry_server.aliases = {("iris & co.", "champion"): 3}
    return ModelRegistry.connect(settings)


@pytest.mark.parametrize(
    ("given", "number"),
    [("3", 3), ("003", 3), ("champion", None), ("v3", None), ("-3", None), ("٣", None)],
)
def test_a_version_is_told_from_an_alias(given: str, number: int | None) -> None:
    assert version_number(given) == number


def test_versions_and_aliases_are_resolved(registry: ModelRegistry) -> None:
    assert registry.resolve("iris & co.", "champion") == registry.resolve("iris & co.", "3")
    assert registry.resolve("iris & co.", "3").version == 3


def test_a_model_made_anew_is_another_model(
    registry: ModelRegistry, registry_server: RegistryServer
) -> None:
    before = registry.resolve("iris & co.", "3")
    registry_server.created += 1
    assert registry.resolve("iris & co.", "3").digest != before.digest


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        *(("iris & co.", "4"), ("iris & co.", "challenger"), ("rose", "1")),
        *((name, reference) for name in ("../iris", "..", "a:b", " ") for reference in ("3", "x")),
    ],
)
def test_what_is_unknown_is_named(registry: ModelRegistry, name: str, reference: str) -> None:
    with pytest.raises(ModelNotFoundError) as raised:
        registry.resolve(name, reference)
    assert repr(name) in str(raised.value)
    assert reference in str(raised.value)


def test_a_version_that_is_not_ready_is_refused(
    registry: ModelRegistry, registry_server: RegistryServer
) -> None:
    registry_server.status = "FAILED_REGISTRATION"
    with pytest.raises(ModelNotLoadableError, match="FAILED_REGISTRATION"):
        registry.resolve("iris & co.", "3")


def test_all_files_are_fetched(registry: ModelRegistry, files: Path, tmp_path: Path) -> None:
    target = tmp_path / "fetched" / "here"
    registry.fetch(registry.resolve("iris & co.", "3"), target, math.inf)
    found = {path.relative_to(target) for path in target.rglob("*") if path.is_file()}
    assert found == {Path("MLmodel"), Path("code #1/a&b?.py")}
    assert (target / "MLmodel").read_text() == (files / "MLmodel").read_text()


@pytest.mark.parametrize(
    ("status", "error", "sentence"),
    [
        (404, ModelNotLoadableError, "lists the artifact .*gone' of model .* and does not have it"),
        (500, RegistryRefusedError, "answered 500 for the artifact"),
        (503, RegistryRefusedError, "answered 503 for the artifact"),
    ],
)
def test_a_broken_fetch_leaves_nothing(
    registry: ModelRegistry,
    registry_server: RegistryServer,
    tmp_path: Path,
    status: int,
    error: type[Exception],
    sentence: str,
) -> None:
    registry_server.listed = [{"path": "gone", "is_dir": False}]
    registry_server.status_of_missing = status
    target = tmp_path / "fetched" / "here"
    with pytest.raises(error, match=sentence):
        registry.fetch(registry.resolve("iris & co.", "3"), target, math.inf)
    assert list(target.parent.iterdir()) == []


def test_what_a_killed_fetch_left_is_swept(registry: ModelRegistry, tmp_path: Path) -> None:
    target = tmp_path / "fetched" / "here"
    stale = target.with_name(f"{target.name}.partial-abc")
    stale.mkdir(parents=True)
    (stale / "MLmodel").write_text("fla")
    registry.fetch(registry.resolve("iris & co.", "3"), target, math.inf)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("sent", ["everything", "a file"])
def test_a_fetch_that_takes_too_long_ends_and_leaves_nothing(
    registry: ModelRegistry,
    registry_server: RegistryServer,
    files: Path,
    tmp_path: Path,
    sent: str,
) -> None:
    model = registry.resolve("iris & co.", "3")
    target = tmp_path / "fetched" / "here"
    (files / "MLmodel").write_text(200 * "#")
    if sent == "a file":
        # What comes before it comes at once.
        registry_server.slow = "/MLmodel"
    registry_server.seconds_for_a_byte = 0.1
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        registry.fetch(model, target, began + 0.5)
    assert time.monotonic() - began < 10
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


def test_what_the_disk_did_not_take_is_not_there(
    registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "the disk is broken", str(folder))

    monkeypatch.setattr(registries, "write_out", fail)
    target = tmp_path / "fetched" / "here"
    with pytest.raises(OSError, match="the disk is broken"):
        registry.fetch(registry.resolve("iris & co.", "3"), target, math.inf)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../../etc/cron.d/evil", "a/b", "a\0b", "a\n/b", "\ud800"]
)
def test_a_listing_cannot_leave_the_folder(
    registry: ModelRegistry, registry_server: RegistryServer, tmp_path: Path, name: str
) -> None:
    registry_server.listed = [{"path": name, "is_dir": False}]
    with pytest.raises(ModelNotLoadableError, match="impossible name"):
        registry.fetch(registry.resolve("iris & co.", "3"), tmp_path / "here", math.inf)


@pytest.mark.parametrize(
    ("names", "reason"),
    [(["MLmodel", "MLmodel"], "File exists"), ([300 * "x"], "File name too long")],
)
def test_files_that_no_disk_takes_are_the_models_fault(
    registry: ModelRegistry,
    registry_server: RegistryServer,
    tmp_path: Path,
    names: list[str],
    reason: str,
) -> None:
    registry_server.listed = [{"path": name, "is_dir": False} for name in names]
    with pytest.raises(ModelNotLoadableError, match=f"cannot be stored \\({reason}"):
        registry.fetch(registry.resolve("iris & co.", "3"), tmp_path / "here", math.inf)


def test_files_outside_mlflow_are_not_fetched(
    registry: ModelRegistry, registry_server: RegistryServer, tmp_path: Path
) -> None:
    model = registry.resolve("iris & co.", "3")
    for root in ("file:///", "/", "s3://bucket/", "mlflow-artifacts://elsewhere/"):
        registry_server.artifact_root = root
        with pytest.raises(ModelNotLoadableError, match="not behind MLflow"):
            registry.fetch(model, tmp_path / "here", math.inf)


def test_a_model_without_files_is_refused(
    registry: ModelRegistry, registry_server: RegistryServer, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    registry_server.versions["empty", 1] = tmp_path / "empty"
    with pytest.raises(ModelNotLoadableError, match="no files"):
        registry.fetch(registry.resolve("empty", "1"), tmp_path / "here", math.inf)
    (tmp_path / "empty").rmdir()
    with pytest.raises(ModelNotLoadableError, match="no artifacts"):
        registry.fetch(registry.resolve("empty", "1"), tmp_path / "here", math.inf)
    with pytest.raises(ModelNotFoundError):
        registry.fetch(ModelVersion("gone", 1, "digest"), tmp_path / "here", math.inf)


def test_an_unreachable_registry_is_named(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"tracking_uri": "http://127.0.0.1:1"})
    with pytest.raises(RegistryUnavailableError, match=r"http://127\.0\.0\.1:1"):
        ModelRegistry.connect(nowhere).resolve("iris", "1")


@pytest.mark.parametrize(
    ("more", "credentials"),
    [
        ({}, "me:hid@den"),
        ({"tracking_username": "you", "tracking_password": SecretStr("other")}, "you:other"),
    ],
)
def test_a_password_in_the_address_is_sent_and_not_told(
    settings: Settings,
    registry_server: RegistryServer,
    registry: ModelRegistry,
    more: dict[str, Any],
    credentials: str,
) -> None:
    uri = registry_server.url.replace("//", "//me:hid%40den@")
    private = settings.model_copy(update={"tracking_uri": uri} | more)
    assert ModelRegistry.connect(private).resolve("iris & co.", "3").version == 3
    expected = f"Basic {base64.b64encode(credentials.encode()).decode()}"
    assert registry_server.authorization == expected
    registry_server.close()
    with pytest.raises(
        RegistryUnavailableError, match=f"MLflow at {registry_server.url}"
    ) as raised:
        ModelRegistry.connect(private).resolve("iris & co.", "3")
    assert "hid" not in str(raised.value)


def test_something_else_than_mlflow_is_refused(
    settings: Settings, registry_server: RegistryServer
) -> None:
    elsewhere = settings.model_copy(update={"tracking_uri": f"{registry_server.url}/other"})
    with pytest.raises(RegistryRefusedError, match="404"):
        ModelRegistry.connect(elsewhere).resolve("iris", "1")


@pytest.mark.parametrize("whose", ["client", "server"])
@pytest.mark.parametrize("content", ["no certificate", None])
def test_a_certificate_that_is_none_is_one_sentence(
    settings: Settings, tmp_path: Path, whose: str, content: str | None
) -> None:
    pem = tmp_path / "me.pem"
    if content:
        pem.write_text(content)
    wrong = settings.model_copy(update={f"tracking_{whose}_cert_path": pem})
    sentence = rf"MLFLOW_TRACKING_{whose.upper()}_CERT_PATH {pem} cannot be used \(.+\); give a PEM"
    with pytest.raises(InvalidSettingsError, match=sentence):
        ModelRegistry.connect(wrong)
