"""The application for an ASGI server: `gunicorn -k uvicorn_worker.UvicornWorker ...`."""

import sys

from model_server.settings import InvalidSettingsError, read_settings
from model_server.sharing import share_metrics

try:
    _settings = read_settings()
except InvalidSettingsError as error:
    sys.stderr.write(f"The model server cannot start: {error}\n")
    # Gunicorn takes this status for "do not try again".
    raise SystemExit(3) from None
share_metrics(_settings.sockets)

# Only now, as counters decide when they are imported whether they are shared.
from model_server.app import create_app  # noqa: E402
from model_server.log import configure_logging  # noqa: E402

configure_logging()
app = create_app(_settings)
