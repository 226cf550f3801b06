"""The Open Inference Protocol (V2): tensors in, tensors out.

A single tensor is an array of rows, or of values where it has one dimension; several, or one with
the content type `pd`, are the named columns of records. Values are row by row, flat or nested, and
may be binary as the protocol's extension has them; answers are JSON.
"""

import base64
import binascii
import json
import math
import struct
import sys
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import mul
from typing import Any

from .inputs import InputError, shown
from .question import FUNCTIONS, Question, json_type, read_object
from .values import plain, to_json

BINARY = struct.Struct("!I")
"""Before a body with binary tensors: the length of its JSON, whose first byte is then 0."""

_LARGEST_FLOATS = {"FP16": 65504.0, "FP32": 3.4028234663852886e38, "FP64": sys.float_info.max}
_NUMPY_TYPES = {
    "BOOL": "bool",
    **{f"UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
_DATATYPES = {name: datatype for datatype, name in _NUMPY_TYPES.items()}
_COLUMN_DATATYPES = {
    "boolean": "BOOL",
    "integer": "INT32",
    "long": "INT64",
    "float": "FP32",
    "double": "FP64",
}
_CONTENT_TYPES = ("np", "pd", "str", "base64", "datetime")
_MOST_DIMENSIONS = 32
_LARGEST_SIZE = 2**31
_USUAL_DIMENSIONS = 5
"""With so many, a shape nests its values into four times as many lists, at most."""
_FEW_LISTS = 4096
_MOST_LISTS = 2**23
_MOST_RECORDS = 2**22
"""As many as 32 MiB of the native protocol's JSON hold; of both, more would take gigabytes."""


@dataclass
class _Tensor:
    name: str
    datatype: str
    shape: list[int]
    values: list[Any]
    """Flat, in row-major order."""

    def rows(self) -> list[Any]:
        """Nested as the shape says; a column of shape [n, 1] too."""
        rows = self.values
        for size in reversed(self.shape[1:]):
            rows = [rows[start : start + size] for start in range(0, len(rows), size)]
        return rows

    def lists(self) -> int:
        """How many lists the nested rows take, each of which is larger than many values."""
        return sum(accumulate(self.shape[:-1], mul))

    def column(self) -> list[Any]:
        """One item a row: a value where there is one."""
        return self.values if self.is_plain() else self.rows()

    def is_plain(self) -> bool:
        """Whether each row has one value."""
        return math.prod(self.shape[1:]) == 1


def read_inference(body: bytes) -> Question:
    """The question in the body of an infer request, or InputError that says what to change."""
    request, binary = _parts(body)
    parameters = _parameters(request, "The request")
    content_type = _content_type(parameters, "The request")
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise InputError("inputs must be a list of at least one tensor.")
    tensors, types = [], set()
    for entry in inputs:
        tensor, type_ = _read_tensor(entry, content_type, binary)
        tensors.append(tensor)
        types.add(type_)
    binary.end()
    function, names = _wanted(request, parameters)
    id_, params = request.get("id"), parameters.get("params")
    if not isinstance(id_, str | None):
        raise InputError(f"id must be a text, not {json_type(id_)}.")
    if not isinstance(params, dict | None):
        raise InputError(f"The parameter params must be an object, not {json_type(params)}.")
    as_columns = len(tensors) > 1 or content_type == "pd" or "pd" in types
    if len(body) > _MOST_LISTS // _USUAL_DIMENSIONS:
        _refuse_many_lists([one for one in tensors if not (as_columns and one.is_plain())])
    return Question(
        data=_records(tensors) if as_columns else tensors[0].rows(),
        function=function,
        dtype=_dtype(parameters, None if as_columns else tensors[0]),
        params=params,
        reply=_Reply(function, names, id_),
        body=body,
    )


class _Binary:
    """What follows the JSON of a body with binary tensors, taken piece by piece."""

    def __init__(self, content: memoryview) -> None:
        self._content = content

    def take(self, size: int, tensor: str) -> memoryview:
        if size > len(self._content):
            raise InputError(f"The binary data ends before that of the input {tensor}.")
        piece, self._content = self._content[:size], self._content[size:]
        return piece

    def end(self) -> None:
        if len(self._content):
            raise InputError(f"{len(self._content)} bytes of binary data belong to no input.")


def _parts(body: bytes) -> tuple[dict[str, Any], _Binary]:
    content = memoryview(body)
    if body[:1] != b"\0" or len(body) < BINARY.size:
        return read_object(body), _Binary(content[:0])
    (length,) = BINARY.unpack_from(body)
    content = content[BINARY.size :]
    if length > len(content):
        raise InputError("The body is shorter than its Inference-Header-Content-Length.")
    return read_object(content[:length]), _Binary(content[length:])


def _parameters(holder: dict[str, Any], whose: str) -> dict[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InputError(f"{whose}: parameters must be an object, not {json_type(parameters)}.")
    return parameters


def _content_type(parameters: dict[str, Any], whose: str) -> str | None:
    content_type = parameters.get("content_type")
    if content_type is None or content_type in _CONTENT_TYPES:
        return content_type
    told = shown(content_type) if isinstance(content_type, str) else json_type(content_type)
    raise InputError(
        f"{whose}: the content_type must be one of {', '.join(_CONTENT_TYPES)}, not {told}."
    )


def _read_tensor(
    entry: Any, request_type: str | None, binary: _Binary
) -> tuple[_Tensor, str | None]:
    if not isinstance(entry, dict):
        raise InputError(f"An input must be an object, not {json_type(entry)}.")
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise InputError("Every input needs a name.")
    told = shown(name)
    datatype = entry.get("datatype")
    if not isinstance(datatype, str) or datatype not in {*_NUMPY_TYPES, "BYTES"}:
        known = ", ".join([*_NUMPY_TYPES, "BYTES"])
        raise InputError(f"Input {told}: the datatype must be one of {known}.")
    shape = _shape(entry.get("shape"), told)
    parameters = _parameters(entry, f"Input {told}")
    content_type = _content_type(parameters, f"Input {told}")
    size = parameters.get("binary_data_size")
    if size is None:
        values = _flat(entry.get("data"), shape, told)
        _refuse_misfits(values, datatype, told)
    else:
        values = _from_binary(size, datatype, binary, told)
    if len(values) != math.prod(shape):
        raise InputError(
            f"Input {told}: the shape {shape} takes {math.prod(shape)} values, but data has "
            f"{len(values)}."
        )
    if "base64" in (content_type, request_type) and datatype == "BYTES":
        values = _from_base64(values, told)
    tensor = _Tensor(name, datatype, shape, values)
    if len(shape) > _USUAL_DIMENSIONS and tensor.lists() > max(_FEW_LISTS, 4 * len(values)):
        raise InputError(
            f"Input {told}: the shape {shape} makes {tensor.lists()} lists of {len(values)} "
            "values; leave out sizes of 1."
        )
    return tensor, content_type


def _refuse_many_lists(tensors: list[_Tensor]) -> None:
    lists = sum(tensor.lists() for tensor in tensors)
    if lists > _MOST_LISTS:
        raise InputError(
            f"The shapes of the inputs make {lists} lists, more than {_MOST_LISTS}; send fewer "
            "rows at a time."
        )


def _shape(shape: Any, told: str) -> list[int]:
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise InputError(f"Input {told}: the shape must be a list of whole numbers.")
    if not 0 < len(shape) <= _MOST_DIMENSIONS or min(shape) < 1 or max(shape) > _LARGEST_SIZE:
        raise InputError(
            f"Input {told}: the shape needs 1 to {_MOST_DIMENSIONS} sizes of at least 1; its first "
            "is the number of rows."
        )
    return shape


def _flat(data: Any, shape: list[int], told: str) -> list[Any]:
    if not isinstance(data, list):
        raise InputError(f"Input {told}: data must be a list, not {json_type(data)}.")
    values: list[Any] = data
    if not values or not isinstance(values[0], list):
        return values
    for size in shape[1:]:
        if not all(isinstance(item, list) and len(item) == size for item in values):
            raise InputError(f"Input {told}: the nested data has not the shape {shape}.")
        values = list(chain.from_iterable(values))
    return values


def _refuse_misfits(values: list[Any], datatype: str, told: str) -> None:
    types = set(map(type, values))
    if datatype == "BYTES":
        fits, needed = types <= {str}, "texts"
    elif datatype == "BOOL":
        needed = "true and false"
        fits = types <= {bool} or (types <= {bool, int} and set(values) <= {0, 1})
    elif datatype.startswith("FP"):
        fits, needed = types <= {int, float, type(None)}, "numbers"
        largest = _LARGEST_FLOATS[datatype]
        numbers = [value for value in values if value is not None] if fits else []
        if any(not -largest <= value <= largest for value in numbers):
            raise InputError(f"Input {told} holds a number too big for {datatype}.")
    else:
        fits, needed = types <= {int}, "whole numbers"
        bits = int(datatype.lstrip("UINT"))
        low, high = (0, 2**bits) if datatype[0] == "U" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        if fits and values and not (low <= min(values) and max(values) < high):
            raise InputError(f"Input {told} holds a number too big for {datatype}.")
    if not fits:
        raise InputError(f"Input {told} is {datatype} and must hold {needed} only.")


def _from_binary(size: Any, datatype: str, binary: _Binary, told: str) -> list[Any]:
    if type(size) is not int or size < 0:
        raise InputError(f"Input {told}: binary_data_size must be a number of bytes.")
    content = binary.take(size, told)
    if datatype == "BYTES":
        return _texts(content, told)
    import numpy as np

    dtype = np.dtype(_NUMPY_TYPES[datatype]).newbyteorder("<")
    if size % dtype.itemsize:
        raise InputError(f"Input {told}: {size} bytes are no whole number of {datatype} values.")
    values: list[Any] = np.frombuffer(content, dtype).tolist()
    return values


def _texts(content: memoryview, told: str) -> list[str]:
    """Each element after its length, four bytes, little endian."""
    texts, start = [], 0
    while start < len(content):
        if len(content) - start < _LENGTH.size:
            raise InputError(f"Input {told}: its binary data ends within the length of a text.")
        (length,) = _LENGTH.unpack_from(content, start)
        start += _LENGTH.size
        if len(content) - start < length:
            raise InputError(f"Input {told}: its binary data ends within a text.")
        try:
            texts.append(str(content[start : start + length], "utf-8"))
        except UnicodeDecodeError:
            raise InputError(
                f"Input {told} holds bytes that are not UTF-8; send them in Base64 with the "
                "content_type base64."
            ) from None
        start += length
    return texts


_LENGTH = struct.Struct("<I")


def _from_base64(values: list[str], told: str) -> list[bytes]:
    try:
        return [base64.b64decode(value, validate=True) for value in values]
    except (binascii.Error, ValueError):
        raise InputError(f"Input {told} holds a text that is not Base64.") from None


def _records(tensors: list[_Tensor]) -> list[dict[str, Any]]:
    names: dict[str, None] = {}
    rows = tensors[0].shape[0]
    for tensor in tensors:
        if tensor.name in names:
            raise InputError(f"Two inputs have the name {shown(tensor.name)}.")
        names[tensor.name] = None
        if tensor.shape[0] != rows:
            raise InputError(
                f"Input {shown(tensor.name)} has {tensor.shape[0]} rows, but "
                f"{shown(tensors[0].name)} has {rows}."
            )
    if rows > _MOST_RECORDS:
        raise InputError(f"{rows} rows of columns are too many; send {_MOST_RECORDS} at a time.")
    columns = [tensor.column() for tensor in tensors]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _dtype(parameters: dict[str, Any], tensor: _Tensor | None) -> str | None:
    """What the caller asks for, else the single tensor's own type."""
    dtype = parameters.get("dtype")
    if not isinstance(dtype, str | None):
        raise InputError(f"The parameter dtype must be a text, not {json_type(dtype)}.")
    if dtype is None and tensor is not None:
        return _NUMPY_TYPES.get(tensor.datatype)
    return dtype


def _wanted(request: dict[str, Any], parameters: dict[str, Any]) -> tuple[str, list[str]]:
    """The function to call, and the names of the outputs asked for, if any are."""
    outputs = request.get("outputs")
    if outputs is None:
        outputs = []
    if not isinstance(outputs, list):
        raise InputError(f"outputs must be a list, not {json_type(outputs)}.")
    names: list[Any] = [
        output.get("name") if isinstance(output, dict) else None for output in outputs
    ]
    if not all(isinstance(name, str) for name in names):
        raise InputError("Every output needs a name.")
    if len(set(names)) < len(names):
        raise InputError("An output is asked for twice.")
    functions = {name for name in names if name in FUNCTIONS}
    function = parameters.get("predict_function")
    if function is not None:
        if function not in FUNCTIONS:
            raise InputError("The parameter predict_function must be predict or predict_proba.")
        functions.add(function)
    if len(functions) > 1:
        raise InputError("Ask for predict or for predict_proba: one in a request.")
    return functions.pop() if functions else FUNCTIONS[0], names


@dataclass(frozen=True)
class _Reply:
    """Tells one caller's part of the prediction; the model's name is the HTTP worker's to add."""

    function: str
    names: list[str]
    id: str | None

    def __call__(self, prediction: Any) -> bytes:
        outputs = _outputs(prediction, self.function)
        if self.names:
            found = {output["name"]: output for output in outputs}
            if len(outputs) == 1:
                found.setdefault(self.function, outputs[0] | {"name": self.function})
            missing = [name for name in self.names if name not in found]
            if missing:
                raise InputError(
                    f"There is no output {shown(missing[0])}; there is "
                    f"{', '.join(map(shown, list(found)[:8]))}."
                )
            outputs = [found[name] for name in self.names]
        answer: dict[str, Any] = {"outputs": outputs}
        if self.id is not None:
            answer["id"] = self.id
        return to_json(answer)


def _outputs(prediction: Any, function: str) -> list[dict[str, Any]]:
    """Tensors: one for each column of a data frame or key of a record, else one in all."""
    columns = getattr(prediction, "columns", None)
    if columns is not None and hasattr(prediction, "iloc"):
        return [_output(str(name), prediction[name]) for name in columns]
    if isinstance(prediction, dict) and prediction:
        return [_output(str(name), part) for name, part in prediction.items()]
    return [_output(function, prediction)]


def _output(name: str, part: Any) -> dict[str, Any]:
    datatype = _DATATYPES.get(str(getattr(part, "dtype", "")))
    values = plain(part)
    if not isinstance(values, list):
        values = [values]
    flat, shape = _flattened(values)
    if datatype is None:
        datatype, flat = _typed(flat)
    if len(shape) == 1:
        shape.append(1)
    return {"name": name, "datatype": datatype, "shape": shape, "data": flat}


def _flattened(values: list[Any]) -> tuple[list[Any], list[int]]:
    """Row-major values and their shape, as deep as the lists are regular."""
    shape = [len(values)]
    while values and all(isinstance(item, list) for item in values):
        lengths = set(map(len, values))
        if len(lengths) > 1 or 0 in lengths:
            break
        shape.append(lengths.pop())
        values = list(chain.from_iterable(values))
    return values, shape


def _typed(values: list[Any]) -> tuple[str, list[Any]]:
    """The datatype of values of Python's; what no datatype has becomes JSON in a text."""
    types = set(map(type, values)) - {type(None)}
    if types <= {bool} and types:
        return "BOOL", values
    if types == {int} and not any(value is None for value in values):
        if all(-(2**63) <= value < 2**63 for value in values):
            return "INT64", values
        return "BYTES", [str(value) for value in values]
    if types <= {int, float} and types:
        return "FP64", values
    if types <= {str}:
        return "BYTES", values
    return "BYTES", [
        value if isinstance(value, str) else json.dumps(value, allow_nan=False) for value in values
    ]


def describe(signature: Any) -> dict[str, list[dict[str, Any]] | None]:
    """The tensors that a model's signature (MLflow's, or None) names, for V2's metadata."""
    return {
        "inputs": _tensors(getattr(signature, "inputs", None), "input"),
        "outputs": _tensors(getattr(signature, "outputs", None), FUNCTIONS[0]),
    }


def _tensors(schema: Any, unnamed: str) -> list[dict[str, Any]] | None:
    if schema is None:
        return None
    specs = list(schema.inputs)
    if not schema.is_tensor_spec() and not schema.has_input_names() and len(specs) > 1:
        # Columns without names are one tensor of rows.
        types = {_column_datatype(spec) for spec in specs}
        datatype = types.pop() if len(types) == 1 else "FP64"
        return [{"name": unnamed, "datatype": datatype, "shape": [-1, len(specs)]}]
    tensors = []
    are_outputs = unnamed in FUNCTIONS
    for spec in specs:
        only_output = len(specs) == 1 and are_outputs
        tensor = schema.is_tensor_spec()
        shape = [int(size) for size in spec.shape] if tensor else [-1, 1]
        if are_outputs and len(shape) == 1:
            # As they are answered.
            shape.append(1)
        tensors.append(
            {
                "name": unnamed if only_output or not spec.name else str(spec.name),
                "datatype": _DATATYPES.get(str(spec.type), "BYTES")
                if tensor
                else _column_datatype(spec),
                "shape": shape,
            }
        )
    return tensors


def _column_datatype(spec: Any) -> str:
    return _COLUMN_DATATYPES.get(str(getattr(spec.type, "name", "")), "BYTES")
