"""The command `model-server`: the whole service by one command, on a laptop as on the platform."""

import argparse
import gc
import importlib
import os
import ssl
import sys
from pathlib import Path

from gunicorn.app.base import BaseApplication

from model_server import __version__
from model_server.app import create_app
from model_server.log import configure_logging
from model_server.metrics import share_metrics
from model_server.processes import serving
from model_server.settings import InvalidSettingsError, Settings, read_settings

_STATE_DIR = Path("~/.local/state/model-server")
_WRONG_USAGE = 2
_KEEP_ALIVE_SECONDS = 75
"""Longer than a door keeps its idle connections, so that it is the door that closes them."""

_WORKERS_MODULES = (
    *("prometheus_client", "uvicorn.lifespan.on"),
    *("uvicorn.loops.uvloop", "uvicorn.protocols.http.httptools_impl"),
)
"""What every worker imports sooner or later."""


class _Gunicorn(BaseApplication):
    """Gunicorn for one address."""

    def __init__(self, settings: Settings, options: argparse.Namespace) -> None:
        host = f"[{options.host}]" if ":" in options.host else options.host
        self._settings = settings
        self._options = {
            # One image for all: connections, threads and locks begin in each worker's lifespan.
            "preload_app": True,
            "bind": f"{host}:{options.port}",
            "workers": options.workers,
            "certfile": options.certfile,
            "keyfile": options.keyfile,
            "ca_certs": options.ca_certs,
            "cert_reqs": ssl.CERT_REQUIRED if options.ca_certs else ssl.CERT_NONE,
            "worker_class": "model_server.worker.Worker",
            "keepalive": _KEEP_ALIVE_SECONDS,
            "graceful_timeout": round(settings.predict_timeout_seconds),
            "proc_name": "model-server",
            "control_socket_disable": True,
        }
        super().__init__()

    def load_config(self) -> None:
        for key, value in self._options.items():
            if key in self.cfg.settings:
                self.cfg.set(key, value)

    def load(self) -> object:
        """Before the workers are forked: they share what is in memory now, until it changes."""
        for module in _WORKERS_MODULES:
            importlib.import_module(module)
        app = create_app(self._settings)
        # Of an application before this one, nothing is kept.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        return app

    def reload(self) -> None:
        """On SIGHUP: the next workers have certificates as they are now."""
        super().reload()
        self.callable = None


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to end; the status to exit with."""
    options = _parser().parse_args(arguments)
    state_dir = options.state_dir or os.environ.get("MODEL_SERVER_STATE_DIR") or _STATE_DIR
    os.environ["MODEL_SERVER_STATE_DIR"] = str(Path(state_dir).expanduser().absolute())
    if options.tracking_uri:
        os.environ["MLFLOW_TRACKING_URI"] = options.tracking_uri
    try:
        settings = read_settings()
    except InvalidSettingsError as error:
        sys.stderr.write(f"The model server cannot start: {error}\n")
        return _WRONG_USAGE
    configure_logging()
    share_metrics(settings.sockets, os.getpid())
    # Runners live as long as this does, whatever becomes of single workers.
    with serving(settings):
        _Gunicorn(settings, options).run()
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
    parser.add_argument("--certfile", metavar="FILE", help="serve HTTPS with this certificate")
    parser.add_argument("--keyfile", metavar="FILE", help="its key, where that is another file")
    parser.add_argument(
        "--ca-certs", metavar="FILE", help="let in only who has a certificate of one of these"
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        help=f"model files, environments and the list of what is loaded ({_STATE_DIR})",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
