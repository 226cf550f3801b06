"""Load a scikit-learn estimator as MLflow's flavor `sklearn` does, without importing MLflow."""

import importlib
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
_SETTINGS = {
    *("pickled_model", "serialization_format", "code", "sklearn_version", "skops_trusted_types"),
}
_MAY_UNPICKLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
_PANDAS = "pandas"


def is_usual(flavor: dict[str, Any] | None) -> bool:
    """Whether all that this part of a model's MLmodel says is understood here."""
    return (
        flavor is not None
        and flavor.keys() <= _SETTINGS
        and isinstance(flavor.get("pickled_model"), str)
        and isinstance(flavor.get("code"), str | None)
        and flavor.get("serialization_format", _FORMATS[0]) in _FORMATS
        and _MAY_UNPICKLE not in os.environ
    )


def load_estimator(folder: Path, flavor: dict[str, Any]) -> Any:
    """The estimator of a model's folder, where `is_usual`; raises whatever its code raises."""
    if flavor.get("code"):
        sys.path.insert(0, str(folder / flavor["code"]))
    with _pandas_waits(), suppress(ImportError):
        # The only one of scikit-learn's modules that imports pandas when it is imported.
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
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def _pandas_waits() -> Iterator[None]:
    """Whoever imports pandas meanwhile gets it with its first use, which may never come.

    Pandas and pyarrow take 40 to 65 MB, and an estimator of arrays needs neither.
    """
    if _PANDAS in sys.modules or importlib.util.find_spec(_PANDAS) is None:
        yield
        return
    later = sys.modules[_PANDAS] = _Later(_PANDAS)
    try:
        yield
    finally:
        if sys.modules.get(_PANDAS) is later:
            del sys.modules[_PANDAS]
