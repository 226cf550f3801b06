"""REST inference for the models of an MLflow registry."""

from model_server.app import create_app

__version__ = "0.1.0"

__all__ = ["__version__", "create_app"]
