"""REST inference for the models of an MLflow registry."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_server.app import create_app

__all__ = ["__version__", "create_app"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Not before it is asked for: counters decide when they are imported whether they are shared.
    if name == "create_app":
        from model_server.app import create_app  # noqa: PLC0415

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
