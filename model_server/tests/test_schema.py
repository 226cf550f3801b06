"""The API as its description has it, asked with whatever that allows and with what it does not."""

from collections.abc import Iterator
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

from conftest import make_settings
from light_models import Shelf, write_uv
from model_server import create_app
from registry_server import RegistryServer
from servers import served

_EXAMPLES = 5
"""Of each operation, of what the description allows and of what it does not."""
_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    folder = tmp_path_factory.mktemp("schema")
    registry = RegistryServer()
    shelf = Shelf(registry, folder / "shelf")
    # The name, version and alias that the description has as examples.
    shelf.put("iris", 1, "one")
    shelf.point("iris", "champion", 1)
    light = make_settings(folder, registry.url).model_copy(update={"uv": str(write_uv(folder))})
    with served(create_app(light)) as url:
        for flavor in ("pyfunc", "sklearn"):
            assert httpx2.get(f"{url}/load_model/iris/{flavor}/champion").status_code == 200
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
    registry.close()


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


def _ask_often(cases: SearchStrategy[schemathesis.Case[Any]]) -> None:
    @settings(max_examples=_EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(cases)
    def ask(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(checks=_CHECKS, timeout=30)

    ask()
