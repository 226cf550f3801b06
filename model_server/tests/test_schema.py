"""The API as its description has it, asked with whatever that allows and with what it does not."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from conftest import TrainedModels, make_settings
from model_server import create_app
from registry_server import RegistryServer
from servers import served

_EXAMPLES = 5
"""Of each operation, of what the description allows and of what it does not."""
_PREDICTIONS = 40
"""Of each operation that predicts, asked of a real model."""
_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def schema(
    tmp_path_factory: pytest.TempPathFactory, trained: TrainedModels
) -> Iterator[schemathesis.BaseSchema]:
    """Of a server with a model of named columns, and a later version that takes arrays."""
    registry = RegistryServer()
    # The name, version and alias that the description has as examples.
    registry.versions = {
        ("iris", 1): trained.folder / "logistic",
        ("iris", 2): trained.folder / "tree",
    }
    registry.aliases = {("iris", "champion"): 1}
    with served(create_app(make_settings(tmp_path_factory.mktemp("schema"), registry.url))) as url:
        for flavor, reference in product(("pyfunc", "sklearn"), ("champion", "2")):
            path = f"/load_model/iris/{flavor}/{reference}"
            assert httpx2.get(f"{url}{path}", timeout=60).status_code == 200
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
    registry.close()


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/{model_name}/{model_version_or_alias}", {"model_version_or_alias": "champion"}),
        ("/{model_name}/{model_version_or_alias}", {"model_version_or_alias": "2"}),
        ("/v2/models/{model_name}/versions/{model_version}/infer", {"model_version": "1"}),
        ("/v2/models/{model_name}/infer", {}),
    ],
)
def test_every_prediction_of_a_real_model_gets_what_the_description_says(
    schema: schemathesis.BaseSchema, path: str, named: dict[str, str]
) -> None:
    named = {"model_name": "iris", **named}
    _ask_often(schema[path]["POST"].as_strategy(path_parameters=named), _PREDICTIONS)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_request_gets_what_the_description_says(
    schema: schemathesis.BaseSchema, mode: GenerationMode
) -> None:
    operations = [
        operation
        for operation in map(_operation, schema.get_all_operations())
        # What takes nothing cannot be asked wrongly.
        if {"parameters", "requestBody"} & operation.definition.raw.keys()
    ]
    assert len(operations) > 10
    for operation in operations:
        _ask_often(operation.as_strategy(generation_mode=mode))


def _operation(result: Any) -> Any:
    return result.ok()


def _ask_often(cases: SearchStrategy[schemathesis.Case[Any]], examples: int = _EXAMPLES) -> None:
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(cases)
    def ask(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(checks=_CHECKS, timeout=90)

    ask()
