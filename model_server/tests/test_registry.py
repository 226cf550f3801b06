import ssl
from pathlib import Path

import pytest

from model_server.errors import (
    ModelNotFoundError,
    ModelNotLoadableError,
    RegistryRefusedError,
    RegistryUnavailableError,
)
from model_server.registry import ModelRegistry, ModelVersion, version_number
from model_server.settings import Settings
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
    [("iris & co.", "4"), ("iris & co.", "challenger"), ("rose", "1"), ("../iris", "3")],
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
    registry.fetch(registry.resolve("iris & co.", "3"), target)
    found = {path.relative_to(target) for path in target.rglob("*") if path.is_file()}
    assert found == {Path("MLmodel"), Path("code #1/a&b?.py")}
    assert (target / "MLmodel").read_text() == (files / "MLmodel").read_text()


def test_a_broken_fetch_leaves_nothing(
    registry: ModelRegistry, registry_server: RegistryServer, tmp_path: Path
) -> None:
    registry_server.listed_name = "gone"
    target = tmp_path / "fetched" / "here"
    with pytest.raises(RegistryRefusedError, match="500"):
        registry.fetch(registry.resolve("iris & co.", "3"), target)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["..", ".", "", "../../etc/cron.d/evil", "a/b", "a\0b"])
def test_a_listing_cannot_leave_the_folder(
    registry: ModelRegistry, registry_server: RegistryServer, tmp_path: Path, name: str
) -> None:
    registry_server.listed_name = name
    with pytest.raises(RegistryRefusedError, match="impossible name"):
        registry.fetch(registry.resolve("iris & co.", "3"), tmp_path / "here")


def test_files_outside_mlflow_are_not_fetched(
    registry: ModelRegistry, registry_server: RegistryServer, tmp_path: Path
) -> None:
    model = registry.resolve("iris & co.", "3")
    for root in ("file:///", "/", "s3://bucket/", "mlflow-artifacts://elsewhere/"):
        registry_server.artifact_root = root
        with pytest.raises(ModelNotLoadableError, match="not behind MLflow"):
            registry.fetch(model, tmp_path / "here")


def test_a_model_without_files_is_refused(
    registry: ModelRegistry, registry_server: RegistryServer, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    registry_server.versions["empty", 1] = tmp_path / "empty"
    with pytest.raises(ModelNotLoadableError, match="no files"):
        registry.fetch(registry.resolve("empty", "1"), tmp_path / "here")
    with pytest.raises(ModelNotFoundError):
        registry.fetch(ModelVersion("gone", 1, "digest"), tmp_path / "here")


def test_an_unreachable_registry_is_named(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"tracking_uri": "http://127.0.0.1:1"})
    with pytest.raises(RegistryUnavailableError, match=r"http://127\.0\.0\.1:1"):
        ModelRegistry.connect(nowhere).resolve("iris", "1")


def test_something_else_than_mlflow_is_refused(
    settings: Settings, registry_server: RegistryServer
) -> None:
    elsewhere = settings.model_copy(update={"tracking_uri": f"{registry_server.url}/other"})
    with pytest.raises(RegistryRefusedError, match="404"):
        ModelRegistry.connect(elsewhere).resolve("iris", "1")


def test_a_client_certificate_that_is_none_is_refused(settings: Settings, tmp_path: Path) -> None:
    pem = tmp_path / "me.pem"
    pem.write_text("no certificate")
    with pytest.raises(ssl.SSLError):
        ModelRegistry.connect(settings.model_copy(update={"tracking_client_cert_path": pem}))
