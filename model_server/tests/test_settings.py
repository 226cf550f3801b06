import stat
from pathlib import Path

import pytest
from uv import find_uv_bin

from model_server.settings import InvalidSettingsError, Settings, read_settings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "uv"
    program.touch()
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MODEL_SERVER_STATE_DIR", "/var/lib/somewhere")


def test_defaults_need_only_the_state_dir() -> None:
    settings = read_settings()
    assert settings.sockets == Path("/var/lib/somewhere/run")
    assert settings.database == "sqlite:////var/lib/somewhere/catalog.sqlite"
    # Not the one on PATH, which may be any.
    assert settings.uv == find_uv_bin()


def test_where_uv_brings_no_program_the_one_on_the_path_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError

    monkeypatch.setattr("model_server.settings.find_uv_bin", nowhere)
    assert read_settings().uv == str(tmp_path / "uv")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InvalidSettingsError, match="the program 'uv' is not there; install uv"):
        read_settings()


def test_mlflow_is_configured_by_its_own_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate = tmp_path / "ca.crt"
    certificate.touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.test:5000/")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hidden")
    settings = read_settings()
    assert settings.tracking_uri == "https://mlflow.test:5000"
    assert settings.tracking_server_cert_path == certificate
    assert "hidden" not in repr(settings)


def test_no_secret_in_the_representation() -> None:
    settings = Settings(
        database_url="postgresql+psycopg://me:hidden@db/x",
        index_url="https://me:hidden@index/simple",
    )
    assert "hidden" not in repr(settings)
    assert settings.database == "postgresql+psycopg://me:hidden@db/x"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("MODEL_SERVER_STATE_DIR", "", "MODEL_SERVER_STATE_DIR is required."),
        ("MODEL_SERVER_STATE_DIR", "here", "MODEL_SERVER_STATE_DIR must be an absolute path."),
        ("MODEL_SERVER_STATE_DIR", "/" + 90 * "x", "too long for Unix sockets"),
        ("MODEL_SERVER_INDEX_URL", "hidden@index/simple", "MODEL_SERVER_INDEX_URL must be an addr"),
        ("MODEL_SERVER_UV", "/no/uv", "MODEL_SERVER_UV the program '/no/uv' is not there"),
        ("MODEL_SERVER_ROOT_PATH", "inference", "MODEL_SERVER_ROOT_PATH must start with a slash"),
        ("MODEL_SERVER_DATABASE_URL", "mysql://a:hidden@b/c", "MODEL_SERVER_DATABASE_URL must be"),
        ("MODEL_SERVER_DATABASE_URL", "hidden", "MODEL_SERVER_DATABASE_URL must be sqlite"),
        ("MODEL_SERVER_PREDICT_TIMEOUT_SECONDS", "0", "should be greater than 0"),
        ("MODEL_SERVER_IDLE_UNLOAD_SECONDS", "4", "must be 5 or more, or 0 for never"),
        ("MODEL_SERVER_RUNNER_THREADS", "many", "MODEL_SERVER_RUNNER_THREADS input should be a"),
        ("MLFLOW_TRACKING_URI", "file:///tmp", "MLFLOW_TRACKING_URI must be the http"),
        ("MLFLOW_TRACKING_URI", "http://", "MLFLOW_TRACKING_URI must be the http"),
        ("MLFLOW_TRACKING_URI", "http://me:hidden/1@mlflow.test", "MLFLOW_TRACKING_URI must be"),
        ("MLFLOW_TRACKING_CLIENT_CERT_PATH", "/no/file", "/no/file cannot be read by this user"),
    ],
)
def test_a_wrong_value_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettingsError) as raised:
        read_settings()
    assert sentence in str(raised.value)
    assert str(raised.value).endswith(".")
    assert "hidden" not in str(raised.value)


def test_a_trailing_slash_of_the_prefix_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_SERVER_ROOT_PATH", "/inference/")
    assert read_settings().root_path == "/inference"
