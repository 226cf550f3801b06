"""The command `model-server`: everything alone on one machine, by one command."""

import argparse
import gc
import os
import sys
from pathlib import Path

from gunicorn.app.base import BaseApplication

from model_server import __version__
from model_server.log import configure_logging
from model_server.processes import serving
from model_server.settings import InvalidSettingsError, read_settings

_STATE_DIR = Path("~/.local/state/model-server")
_WRONG_USAGE = 2
_KEEP_ALIVE_SECONDS = 75
"""Longer than a door keeps its idle connections, so that it is the door that closes them."""


class _Gunicorn(BaseApplication):  # type: ignore[misc]  # it has no types
    """Gunicorn with uvicorn's workers, for one address."""

    def __init__(self, bind: str, workers: int, drain_seconds: int) -> None:
        self._options = {
            "bind": bind,
            "workers": workers,
            "worker_class": "uvicorn_worker.UvicornWorker",
            "keepalive": _KEEP_ALIVE_SECONDS,
            "graceful_timeout": drain_seconds,
            "proc_name": "model-server",
            "control_socket_disable": True,
        }
        super().__init__()

    def load_config(self) -> None:
        for key, value in self._options.items():
            if key in self.cfg.settings:
                self.cfg.set(key, value)

    def load(self) -> object:
        """In each worker."""
        from model_server.asgi import app  # noqa: PLC0415  reads the settings

        return app


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to end; the status to exit with."""
    options = _parser().parse_args(arguments)
    state_dir = options.state_dir or os.environ.get("MODEL_SERVER_STATE_DIR") or _STATE_DIR
    os.environ["MODEL_SERVER_STATE_DIR"] = str(Path(state_dir).expanduser().absolute())
    if options.tracking_uri:
        os.environ["MLFLOW_TRACKING_URI"] = options.tracking_uri
    configure_logging()
    try:
        settings = read_settings()
    except InvalidSettingsError as error:
        sys.stderr.write(f"The model server cannot start: {error}\n")
        return _WRONG_USAGE
    # The workers share what has been imported until here.
    gc.collect()
    gc.freeze()
    host = f"[{options.host}]" if ":" in options.host else options.host
    # Runners live as long as this does, whatever becomes of single workers.
    with serving(settings):
        _Gunicorn(
            f"{host}:{options.port}", options.workers, round(settings.predict_timeout_seconds)
        ).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="model-server",
        description="REST inference for the models of an MLflow registry, each in a process and "
        "an environment of its own.",
        epilog="Everything else is set by MODEL_SERVER_* and MLFLOW_* in the environment. "
        "SIGTERM lets requests under way end; SIGHUP replaces the workers without losing one.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--tracking-uri", metavar="URL", help="the MLflow server (else MLFLOW_TRACKING_URI)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="HTTP workers (%(default)s)")
    parser.add_argument(
        "--state-dir",
        type=Path,
        help=f"model files, environments and the list of what is loaded ({_STATE_DIR})",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
