"""The command `model-server`: the whole service by one command, on a laptop as on the platform."""

import argparse
import gc
import importlib
import logging
import os
import signal
import ssl
import sys
from pathlib import Path

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from model_server import __version__
from model_server.app import create_app
from model_server.log import configure_logging
from model_server.metrics import share_metrics
from model_server.processes import serving
from model_server.settings import InvalidSettingsError, Settings, read_settings

_LOG = logging.getLogger("model_server")

_STATE_DIR = Path("~/.local/state/model-server")
_WRONG_USAGE = 2
_LAST_PORT = 65535
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
        self._certificates = options.certfile, options.keyfile, options.ca_certs
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
            self.cfg.set(key, value)

    def load(self) -> object:
        """Before the workers are forked: they share what is in memory now, until it changes.

        Raises `InvalidSettingsError` where a certificate cannot be used.
        """
        _check_certificates(*self._certificates)
        for module in _WORKERS_MODULES:
            importlib.import_module(module)
        return create_app(self._settings)

    def wsgi(self) -> object:
        """The application; of one before it, nothing is kept."""
        if self.callable is None:
            self.renew()
        return self.callable

    def renew(self) -> None:
        """Have the next workers see certificates as they are now; raises what `load` does."""
        self.callable = self.load()
        gc.unfreeze()
        gc.collect()
        gc.freeze()


class _FirstProcess(Arbiter):
    """Gunicorn's first process.

    It goes on as it is where a reload cannot be. Workers that leave may take their time: they take
    no other's place, and nothing waits for them. Gunicorn's counts them until they are gone.
    """

    def handle_hup(self) -> None:
        """Have every worker replaced, as soon as all signals that there are have been handled."""
        try:
            self.app.renew()
        except (InvalidSettingsError, OSError) as error:
            _LOG.error("not reloaded", extra={"reason": str(error)})
        else:
            for worker in self.WORKERS.values():
                worker.leaving = True

    def manage_workers(self) -> None:
        """Keep as many as are wanted besides those that leave; asked at least once a second."""
        staying = [worker for worker in self.WORKERS.values() if not worker.leaving]
        for oldest in staying[: -self.num_workers]:
            oldest.leaving = True
        for _ in range(self.num_workers - len(staying)):
            self.spawn_worker()
        for process, worker in list(self.WORKERS.items()):
            # Told each time: one that has just been forked takes a signal for its parent's.
            if worker.leaving:
                self.kill_worker(process, signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to end; the status to exit with."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.certfile and (options.keyfile or options.ca_certs):
        parser.error("--keyfile and --ca-certs are for HTTPS; give --certfile, too")
    state_dir = options.state_dir or os.environ.get("MODEL_SERVER_STATE_DIR") or _STATE_DIR
    os.environ["MODEL_SERVER_STATE_DIR"] = str(Path(state_dir).expanduser().absolute())
    if options.tracking_uri:
        os.environ["MLFLOW_TRACKING_URI"] = options.tracking_uri
    try:
        settings = read_settings()
        _make_folder("MODEL_SERVER_STATE_DIR", settings.state_dir)
        _make_folder("MODEL_SERVER_RUNTIME_DIR", settings.sockets)
    except InvalidSettingsError as error:
        return _cannot_start(error)
    configure_logging()
    share_metrics(settings.sockets, os.getpid())
    # Runners live as long as this does, whatever becomes of single workers.
    with serving(settings):
        try:
            first = _FirstProcess(_Gunicorn(settings, options))
        except InvalidSettingsError as error:
            return _cannot_start(error)
        first.run()
    return 0


def _cannot_start(error: InvalidSettingsError) -> int:
    sys.stderr.write(f"The model server cannot start: {error}\n")
    return _WRONG_USAGE


def _check_certificates(certfile: str | None, keyfile: str | None, ca_certs: str | None) -> None:
    """Raise `InvalidSettingsError` where a server cannot use these."""
    if certfile is None:
        return
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    what = f"--certfile {certfile}"
    if keyfile:
        what += f" with --keyfile {keyfile}"
    try:
        # Nobody is there to be asked for a password.
        tls.load_cert_chain(certfile, keyfile, password="")
        if ca_certs:
            what = f"--ca-certs {ca_certs}"
            tls.load_verify_locations(ca_certs)
    except OSError as error:
        raise InvalidSettingsError(
            f"{what} cannot be used ({error.strerror}); give PEM files that this user may read."
        ) from None


def _make_folder(variable: str, folder: Path) -> None:
    """Make a folder that is written to; raises `InvalidSettingsError` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        if os.access(folder, os.W_OK | os.X_OK):
            return
        reason = "this user may not write there"
    raise InvalidSettingsError(
        f"{folder} cannot be used ({reason}); set {variable} to a folder of this user."
    )


def _port(given: str) -> int:
    if not given.isdecimal() or int(given) > _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{given!r} is no port; give a number up to {_LAST_PORT}")
    return int(given)


def _workers(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is no number of workers; give 1 or more")
    return int(given)


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
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on (%(default)s)")
    parser.add_argument("--workers", type=_workers, default=2, help="HTTP workers (%(default)s)")
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
