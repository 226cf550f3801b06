"""What an operator may turn: environment variables, each with a type and a default."""

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal, Self

import httpx2
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic import model_validator as validate_model
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from uv import find_uv_bin

Seconds = Annotated[float, Field(gt=0)]

# A Unix socket's address holds 107 bytes; our socket names take 22 of them.
_LONGEST_RUNTIME_DIR = 85
# Whoever is asked tells so each second, from a process that may be busy.
_SHORTEST_IDLE_SECONDS = 5
_DATABASES = ("sqlite", "postgresql+psycopg")
_INDEXES = ("https://", "http://", "file://")


class InvalidSettingsError(Exception):
    """The environment asks for something that cannot be; the message says what to change."""


class Settings(BaseSettings):
    """The model server's settings, read from `MODEL_SERVER_*` and MLflow's own `MLFLOW_*`."""

    model_config = SettingsConfigDict(
        env_prefix="MODEL_SERVER_", env_ignore_empty=True, populate_by_name=True, frozen=True
    )

    state_dir: Path
    """Model files, environments and the default database."""
    runtime_dir: Path | None = None
    """Sockets and locks of the runners; `<state_dir>/run` when not set."""
    database_url: SecretStr | None = None
    """What shall be loaded: an SQLAlchemy URL; `<state_dir>/catalog.sqlite` when not set."""
    root_path: str = ""
    """The prefix that the door strips, such as `/inference`."""
    user_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]*$")] = ""
    """The header in which the door tells the user for the log; only where nobody else can call."""

    uv: str = ""
    """The program that builds environments; what came with this package when not set."""
    uv_cache_dir: Path | None = None
    """uv's cache; `<state_dir>/cache/uv` when not set."""
    index_url: SecretStr | None = None
    """The package index for models' requirements; uv's own default when not set."""
    wheels_dir: Path | None = None
    """A folder of wheels to install from instead of an index."""
    allow_source_builds: bool = False
    """Whether requirements without a wheel may be built, which runs their code; with
    `runner_units` in a unit of its own, else as this user."""
    environment_keep_days: Annotated[float, Field(ge=0)] = 30
    """How long environments and model files are kept that nobody uses."""

    idle_unload_seconds: Annotated[float, Field(ge=0)] = 0
    """How long without a request before a model is unloaded until the next one; 0 is never."""
    memory_budget: Annotated[int, Field(ge=0)] = 0
    """Bytes that all models of this host may use together; 0 is no limit."""
    memory_policy: Literal["refuse", "unload_least_recent"] = "refuse"
    """What happens when one more model does not fit into the budget."""

    load_timeout_seconds: Seconds = 900
    """The longest a load may take: fetch, environment and start together."""
    startup_seconds: Seconds = 15
    """The longest a request waits for a model that is being brought back."""
    predict_timeout_seconds: Seconds = 60
    registry_timeout_seconds: Seconds = 30
    stop_timeout_seconds: Seconds = 10
    """How long a runner may take to end before it is killed."""
    runner_units: bool = False
    """Whether runners are units of systemd, as the platform's role installs them."""
    runner_threads: Annotated[int, Field(ge=1)] = 1
    """Threads of BLAS and OpenMP in each runner."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 32 * 2**20

    tracking_uri: str = Field(
        validation_alias=AliasChoices("MLFLOW_TRACKING_URI", "tracking_uri"),
        default="http://127.0.0.1:5000",
    )
    tracking_server_cert_path: Path | None = Field(
        validation_alias=AliasChoices(
            "MLFLOW_TRACKING_SERVER_CERT_PATH", "tracking_server_cert_path"
        ),
        default=None,
    )
    tracking_client_cert_path: Path | None = Field(
        validation_alias=AliasChoices(
            "MLFLOW_TRACKING_CLIENT_CERT_PATH", "tracking_client_cert_path"
        ),
        default=None,
    )
    tracking_username: str | None = Field(
        validation_alias=AliasChoices("MLFLOW_TRACKING_USERNAME", "tracking_username"),
        default=None,
    )
    tracking_password: SecretStr | None = Field(
        validation_alias=AliasChoices("MLFLOW_TRACKING_PASSWORD", "tracking_password"),
        default=None,
    )

    @property
    def sockets(self) -> Path:
        """Where sockets and locks lie."""
        return self.runtime_dir or self.state_dir / "run"

    @property
    def database(self) -> str:
        """The catalog's database; it may hold a password."""
        if self.database_url:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.state_dir / 'catalog.sqlite'}"

    @field_validator("idle_unload_seconds")
    @classmethod
    def _idle_unload_seconds(cls, value: float) -> float:
        if 0 < value < _SHORTEST_IDLE_SECONDS:
            raise ValueError(f"must be {_SHORTEST_IDLE_SECONDS} or more, or 0 for never")
        return value

    @field_validator("root_path")
    @classmethod
    def _root_path(cls, value: str) -> str:
        value = value.rstrip("/")
        if value and not value.startswith("/"):
            raise ValueError("must start with a slash, such as /inference")
        return value

    @field_validator("tracking_uri")
    @classmethod
    def _tracking_uri(cls, value: str) -> str:
        # It may hold a password: not repeated.
        wanted = "must be the http:// or https:// address of an MLflow server"
        try:
            url = httpx2.URL(value)
        except httpx2.InvalidURL:
            raise ValueError(wanted) from None
        if url.scheme not in {"http", "https"} or not url.host:
            raise ValueError(wanted)
        return value.rstrip("/")

    @field_validator("index_url")
    @classmethod
    def _index_url(cls, value: SecretStr | None) -> SecretStr | None:
        # It may hold a password: not repeated.
        if value and not value.get_secret_value().startswith(_INDEXES):
            raise ValueError("must be an address that starts with https://, http:// or file://")
        return value

    @field_validator("state_dir", "runtime_dir", "wheels_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("must be an absolute path")
        return value

    @field_validator("tracking_server_cert_path", "tracking_client_cert_path")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None and not os.access(value, os.R_OK):
            raise ValueError(f"{value} cannot be read by this user")
        return value

    @field_validator("database_url")
    @classmethod
    def _database_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        wanted = "must be sqlite:///<file> or postgresql+psycopg://<user>:<password>@<host>/<name>"
        try:
            url = make_url(value.get_secret_value())
        except ArgumentError:
            # The cause would show the password.
            raise ValueError(wanted) from None
        if url.drivername not in _DATABASES or not url.database:
            raise ValueError(wanted)
        return value

    @field_validator("uv")
    @classmethod
    def _uv(cls, value: str) -> str:
        wanted = value or _own_uv()
        found = shutil.which(wanted)
        if found is None:
            raise ValueError(f"the program {wanted!r} is not there; install uv or give its path")
        return found

    @validate_model(mode="after")
    def _socket_names_fit(self) -> Self:
        if len(os.fsencode(self.sockets)) > _LONGEST_RUNTIME_DIR:
            raise ValueError(
                f"the path {self.sockets} is too long for Unix sockets; set "
                f"MODEL_SERVER_RUNTIME_DIR to one of at most {_LONGEST_RUNTIME_DIR} bytes"
            )
        return self


def read_settings() -> Settings:
    """Read the settings from the environment, or say in one sentence what is wrong with it."""
    try:
        return Settings()
    except ValidationError as error:
        raise InvalidSettingsError("; ".join(_sentences(error)) + ".") from None


def _own_uv() -> str:
    """The uv of this environment, which may be none that is activated; else the one on `PATH`."""
    try:
        return find_uv_bin()
    except FileNotFoundError:
        return "uv"


def _sentences(error: ValidationError) -> list[str]:
    sentences = []
    for item in error.errors(include_url=False, include_input=False):
        message = item["msg"].removeprefix("Value error, ")
        name = str(item["loc"][0]) if item["loc"] else ""
        if name and not name.startswith("MLFLOW_"):
            name = f"MODEL_SERVER_{name.upper()}"
        if item["type"] == "missing":
            message = "is required"
        sentences.append(f"{name} {message[:1].lower()}{message[1:]}" if name else message)
    return sentences


PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The version that models' environments get: the server's own."""
