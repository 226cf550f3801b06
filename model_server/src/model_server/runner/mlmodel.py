"""A model's description, the file MLmodel, read without MLflow, whose import costs 50 MB.

Only what MLflow writes for a usual scikit-learn model is understood. For everything else there is
no description, and MLflow itself has to read it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = "MLmodel"
_COLUMN_TYPES = frozenset(
    ("boolean", "integer", "long", "float", "double", "string", "binary", "datetime")
)


@dataclass(frozen=True)
class ColumnType:
    """The type of a column, by MLflow's name for it."""

    name: str


@dataclass(frozen=True)
class Spec:
    """A column, or a tensor with its shape."""

    name: str | None
    type: Any
    """A `ColumnType`; for a tensor numpy's type."""
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Schema:
    """What a model takes or gives; it answers as MLflow's class of this name does."""

    inputs: list[Spec]

    def is_tensor_spec(self) -> bool:
        """Whether it is made of tensors rather than of columns."""
        return self.inputs[0].shape is not None

    def has_input_names(self) -> bool:
        """Whether its parts have names; all have, or none."""
        return self.inputs[0].name is not None


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives, where that is known."""

    inputs: Schema | None
    outputs: Schema | None


@dataclass(frozen=True)
class MLmodel:
    """A model's description."""

    flavors: dict[str, dict[str, Any]]
    signature: Signature | None
    metadata: dict[str, Any] | None


def read_mlmodel(folder: Path) -> MLmodel | None:
    """The description in a model's folder; None where only MLflow understands it."""
    try:
        import yaml
    except ImportError:
        return None
    try:
        content = yaml.safe_load((folder / _FILE).read_text(encoding="utf-8"))
        signature = content.get("signature")
        return MLmodel(
            {str(name): dict(flavor) for name, flavor in content["flavors"].items()},
            signature
            and Signature(_schema(signature.get("inputs")), _schema(signature.get("outputs"))),
            dict(content.get("metadata") or {}),
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError):
        return None


def _schema(text: str | None) -> Schema | None:
    if not text:
        return None
    specs = [_spec(**item) for item in json.loads(text)]
    if len({(spec.name is None, spec.shape is None) for spec in specs}) != 1:
        raise ValueError("not all parts are alike")
    return Schema(specs)


def _spec(*, type: str, name: str | None = None, **more: Any) -> Spec:  # noqa: A002  MLflow's name
    if type == "tensor":
        import numpy as np

        tensor = more.pop("tensor-spec")
        spec = Spec(name, np.dtype(tensor["dtype"]), tuple(map(int, tensor["shape"])))
    elif type in _COLUMN_TYPES:
        more.pop("required", None)
        spec = Spec(name, ColumnType(type))
    else:
        raise ValueError(f"columns of type {type}")
    if more:
        raise ValueError(f"unknown: {sorted(more)}")
    return spec
