"""The application for an ASGI server: `gunicorn -k model_server.worker.Worker ...`."""

import os
import sys

from model_server.app import create_app
from model_server.log import configure_logging
from model_server.metrics import share_metrics
from model_server.settings import InvalidSettingsError, read_settings

configure_logging()
try:
    _settings = read_settings()
except InvalidSettingsError as error:
    sys.stderr.write(f"The model server cannot start: {error}\n")
    # Gunicorn takes this status for "do not try again".
    raise SystemExit(3) from None
share_metrics(_settings.sockets, os.getppid())
app = create_app(_settings)
