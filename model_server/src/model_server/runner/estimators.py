"""Load a scikit-learn estimator as MLflow's flavor `sklearn` does, without importing MLflow."""

import importlib
import importlib.metadata
import importlib.util
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

_FORMATS = ("pickle", "cloudpickle", "skops")
_SETTINGS = frozenset(
    ("pickled_model", "serialization_format", "code", "sklearn_version", "skops_trusted_types")
)
_MAY_UNPICKLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
_LATER = ("pandas", "pyarrow")
"""What scikit-learn imports where it is installed, though an estimator of arrays needs neither."""


def is_usual(flavor: dict[str, Any]) -> bool:
    """Whether all that this part of a model's MLmodel says is understood here."""
    return (
        flavor.keys() <= _SETTINGS
        and isinstance(flavor.get("pickled_model"), str)
        and isinstance(flavor.get("code"), str | None)
        and flavor.get("serialization_format", _FORMATS[0]) in _FORMATS
        and _MAY_UNPICKLE not in os.environ
    )


def load_estimator(folder: Path, flavor: dict[str, Any]) -> Any:
    """The estimator of a model's folder, where `is_usual`; raises whatever its code raises."""
    if flavor.get("code"):
        sys.path.insert(0, str(folder / flavor["code"]))
    with _imported_later(), suppress(ImportError):
        # The only one of scikit-learn's modules that imports them when it is imported.
        importlib.import_module("sklearn.utils.fixes")
    path = folder / flavor["pickled_model"]
    format_ = flavor.get("serialization_format", _FORMATS[0])
    if format_ == "skops":
        return importlib.import_module("skops.io").load(
            path, trusted=flavor.get("skops_trusted_types")
        )
    # Of the user's own registry; the process keeps what is in it from everybody else.
    unpickler = pickle if format_ == "pickle" else importlib.import_module("cloudpickle")
    with path.open("rb") as file:
        return unpickler.load(file)


class _Later(ModuleType):
    """Stands for a module until somebody uses something of it."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            with suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(self.__name__)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def _imported_later() -> Iterator[None]:
    """Whoever imports pandas or pyarrow meanwhile gets it with its first use.

    That may never come, and they take 40 to 65 MB.
    """
    waiting = [
        _Later(name)
        for name in _LATER
        if name not in sys.modules and importlib.util.find_spec(name) is not None
    ]
    sys.modules.update({module.__name__: module for module in waiting})
    try:
        yield
    finally:
        for module in waiting:
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]
