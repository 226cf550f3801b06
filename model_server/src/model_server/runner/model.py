"""One model: load it, ask it, put its errors into sentences."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from .estimators import is_usual, load_estimator
from .inputs import Column, InputError, as_they_are, model_input, refuse_wide_texts
from .mlmodel import read_mlmodel

_LONGEST_MESSAGE = 1000


class ModelError(Exception):
    """The model's own code failed."""


class Model(ABC):
    """A loaded model; its flavor decides what it takes."""

    batching = True
    """Whether callers' rows may go together; a model opts out in its metadata."""
    lists_become_floats = False
    """Whether its signature casts all numbers of rows that are lists, or values, to floats."""
    records_become_floats = False
    makes_arrays = False
    """Whether rows that are lists become one array, in which one float makes floats of all."""
    signature: Any = None
    """MLflow's, where the model has one."""

    def numbers_are_alike(self, data: list[Any], dtype: str | None) -> bool:
        """Whether 1 and 1.0 in these rows are the same to it, because they are cast."""
        if dtype is not None:
            return dtype.startswith("float")
        if data and isinstance(data[0], dict):
            return self.records_become_floats
        return self.lists_become_floats

    def predict(
        self, data: list[Any], function: str, dtype: str | None, params: dict[str, Any] | None
    ) -> Any:
        """The model's own answer, or its error as a sentence."""
        try:
            return self.ask(data, function, dtype, params)
        except InputError:
            raise
        except (ValueError, TypeError, LookupError) as error:
            raise InputError(f"The model refuses the data: {_sentence(error)}") from error
        except (Exception, SystemExit) as error:
            if type(error).__name__ == "MlflowException":
                raise InputError(f"The model refuses the data: {_sentence(error)}") from error
            raise ModelError(f"The model failed: {_sentence(error)}") from error

    @abstractmethod
    def ask(
        self, data: list[Any], function: str, dtype: str | None, params: dict[str, Any] | None
    ) -> Any:
        """Call the model's function."""


class PyfuncModel(Model):
    """A model of any kind, behind MLflow's common interface and the model's signature."""

    def __init__(self, folder: Path) -> None:
        import mlflow.pyfunc

        self._model = mlflow.pyfunc.load_model(str(folder))
        self.batching = _may_batch(self._model.metadata)
        self.signature = signature = self._model.metadata.signature
        self._schema = signature.inputs if signature else None
        self._takes_params = bool(signature and signature.params)
        # A model with type hints takes the rows as they are.
        self._takes_lists = bool(getattr(signature, "_is_signature_from_type_hint", False))
        self.makes_arrays = not self._takes_lists
        if self._schema is not None and not self._takes_lists:
            named = self._schema.has_input_names()
            tensors = self._schema.is_tensor_spec()
            floats = (
                all(spec.type.kind == "f" for spec in self._schema.inputs)
                if tensors
                else _are_floats(_columns(self._schema))
            )
            # Columns without a name are not cast, nor are all records and several tensors.
            self.records_become_floats = floats and named and not tensors
            self.lists_become_floats = floats and (
                len(self._schema.inputs) == 1 if tensors else named
            )
            self.makes_arrays = tensors or not named

    def numbers_are_alike(self, data: list[Any], dtype: str | None) -> bool:
        """No `dtype` is of use to a model that takes the rows as they are."""
        return not self._takes_lists and super().numbers_are_alike(data, dtype)

    def ask(
        self, data: list[Any], function: str, dtype: str | None, params: dict[str, Any] | None
    ) -> Any:
        """Call `predict` with the signature enforced, or the model's own `predict_proba`."""
        columns = None
        if self._schema is not None and not self._schema.is_tensor_spec():
            columns = _columns(self._schema) if self._schema.has_input_names() else None
        rows = as_they_are(data) if self._takes_lists else self._rows(data, dtype, columns)
        if function == "predict_proba":
            return _probabilities(self._own_model(), rows, columns, params)
        if not params:
            return self._model.predict(rows)
        if not self._takes_params:
            raise InputError("This model takes no params; its signature names none.")
        return self._model.predict(rows, params=params)

    def _rows(self, data: list[Any], dtype: str | None, columns: list[Column] | None) -> Any:
        if self._schema is None or not self._schema.is_tensor_spec():
            return model_input(data, dtype=dtype, columns=columns)
        specs = self._schema.inputs
        tensor_type = specs[0].type if len(specs) == 1 else None
        rows = model_input(data, dtype=dtype, tensor_type=tensor_type)
        for spec in specs if hasattr(rows, "columns") else ():
            # MLflow makes an array of each column.
            if spec.type.kind in "SU" and spec.name in rows.columns:
                refuse_wide_texts(rows[spec.name].tolist(), spec.type)
        return rows

    def _own_model(self) -> Any:
        """The model inside MLflow's wrapper, where the wrapper gives it away."""
        for method in ("get_raw_model", "unwrap_python_model"):
            try:
                model = getattr(self._model, method)()
            except Exception:  # noqa: BLE001, S112  each wrapper refuses in its own way
                continue
            if hasattr(model, "predict_proba"):
                return model
        return None


class SklearnModel(Model):
    """A scikit-learn estimator, as it was trained."""

    def __init__(self, folder: Path) -> None:
        self._model, metadata = _load_estimator(folder)
        self.batching = _may_batch(metadata)
        self.signature = signature = metadata.signature
        schema = signature.inputs if signature else None
        typed: list[Column] = []
        if schema is not None and not schema.is_tensor_spec() and schema.has_input_names():
            typed = _columns(schema)
        types = {column.name: column.type for column in typed}
        names = getattr(self._model, "feature_names_in_", None)
        self._columns = (
            None if names is None else [Column(str(name), types.get(str(name))) for name in names]
        )
        floats = bool(self._columns) and _are_floats(self._columns or [])
        self.lists_become_floats = self.records_become_floats = floats
        self.makes_arrays = not self._columns
        if self._columns:
            # Needed with the first request.
            import pandas  # noqa: F401, ICN001

    def ask(
        self, data: list[Any], function: str, dtype: str | None, params: dict[str, Any] | None
    ) -> Any:
        """Call the estimator's own function."""
        rows = model_input(data, dtype=dtype, columns=self._columns)
        if function == "predict_proba":
            return _probabilities(self._model, rows, self._columns, params)
        if params:
            raise InputError("params are for the flavor pyfunc; sklearn takes none.")
        if not hasattr(self._model, "predict"):
            raise InputError(f"This model, a {type(self._model).__name__}, has no predict.")
        return self._model.predict(_in_order(rows, self._columns))


def _load_estimator(folder: Path) -> tuple[Any, Any]:
    """The estimator and what MLmodel says of it, by MLflow itself where that is unusual."""
    mlmodel = read_mlmodel(folder)
    flavor = mlmodel.flavors.get("sklearn") if mlmodel else None
    if flavor is not None and is_usual(flavor):
        return load_estimator(folder, flavor), mlmodel
    import mlflow.models
    import mlflow.sklearn

    return mlflow.sklearn.load_model(str(folder)), mlflow.models.Model.load(str(folder))


def _may_batch(metadata: Any) -> bool:
    return (metadata.metadata or {}).get("batching") is not False


FLAVORS: dict[str, type[PyfuncModel] | type[SklearnModel]] = {
    "pyfunc": PyfuncModel,
    "sklearn": SklearnModel,
}


def load_model(folder: Path, flavor: str) -> Model:
    """Load the model of a folder."""
    try:
        return FLAVORS[flavor](folder)
    except (Exception, SystemExit) as error:
        raise ModelError(f"The model cannot be loaded as {flavor}: {_sentence(error)}") from error


def _columns(schema: Any) -> list[Column]:
    return [Column(str(spec.name), getattr(spec.type, "name", None)) for spec in schema.inputs]


def _are_floats(columns: list[Column]) -> bool:
    return all(column.type in ("double", "float") for column in columns)


def _in_order(rows: Any, columns: list[Column] | None) -> Any:
    """A data frame with the columns that the model was trained on, in their order."""
    if not columns or not hasattr(rows, "columns"):
        return rows
    names = [column.name for column in columns]
    missing = [name for name in names if name not in rows.columns]
    if missing:
        raise InputError(f"The rows of data lack the columns {', '.join(missing)}.")
    return rows[names]


def _probabilities(
    model: Any, rows: Any, columns: list[Column] | None, params: dict[str, Any] | None
) -> Any:
    if params:
        raise InputError("params are for predict; predict_proba takes none.")
    if not hasattr(model, "predict_proba"):
        raise InputError("This model has no predict_proba; use predict.")
    return model.predict_proba(_in_order(rows, columns))


def _sentence(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} ..."
