from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from model_server.catalog import Catalog
from model_server.errors import CatalogUnavailableError
from model_server.registry import ModelVersion

ONE = ModelVersion("iris", 1, "digest-1")
TWO = ModelVersion("iris", 2, "digest-2")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'catalog.sqlite'}"


@pytest.fixture
def catalog(url: str) -> Catalog:
    return Catalog(url)


def test_what_is_recorded_is_there_for_others(catalog: Catalog, url: str) -> None:
    catalog.record(ONE, "pyfunc", asked_as="1", alias=False)
    catalog.record(TWO, "sklearn", asked_as="champion", alias=True)
    other = Catalog(url)
    assert [(entry.model, entry.flavor, entry.asked_as) for entry in other.entries()] == [
        (ONE, "pyfunc", "1"),
        (TWO, "sklearn", "champion"),
    ]
    found = other.find("iris", "sklearn", 2)
    assert found is not None
    assert found.aliases == ["champion"]
    assert abs(datetime.now(UTC) - found.since) < timedelta(minutes=1)
    assert other.find("iris", "pyfunc", 2) is None


def test_an_alias_means_the_version_loaded_last_by_it(catalog: Catalog) -> None:
    catalog.record(ONE, "pyfunc", asked_as="champion", alias=True)
    catalog.record(TWO, "pyfunc", asked_as="champion", alias=True)
    assert catalog.version_of("iris", "pyfunc", "champion") == 2
    assert catalog.version_of("iris", "sklearn", "champion") is None
    assert [entry.aliases for entry in catalog.entries()] == [[], ["champion"]]


def test_recording_again_keeps_since_unless_the_model_was_made_anew(catalog: Catalog) -> None:
    catalog.record(ONE, "pyfunc", asked_as="1", alias=False)
    first = catalog.entries()[0]
    catalog.note_problem(first, "it is broken")
    assert catalog.entries()[0].problem == "it is broken"
    catalog.record(ONE, "pyfunc", asked_as="champion", alias=True)
    again = catalog.entries()[0]
    assert (again.since, again.asked_as, again.problem) == (first.since, "1", None)
    catalog.record(ModelVersion("iris", 1, "another"), "pyfunc", asked_as="1", alias=False)
    assert catalog.entries()[0].since > first.since


def test_removing_forgets_the_aliases_too(catalog: Catalog) -> None:
    catalog.record(ONE, "pyfunc", asked_as="champion", alias=True)
    catalog.record(TWO, "pyfunc", asked_as="2", alias=False)
    catalog.remove("iris", "pyfunc", 1)
    assert [entry.model for entry in catalog.entries()] == [TWO]
    assert catalog.version_of("iris", "pyfunc", "champion") is None


def test_many_workers_may_begin_at_once(url: str) -> None:
    def work(number: int) -> None:
        model = ModelVersion("iris", number, "digest")
        Catalog(url).record(model, "pyfunc", asked_as=str(number), alias=False)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(16)))
    assert len(Catalog(url).entries()) == 16


def test_an_unreachable_database_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CatalogUnavailableError, match="does not answer"):
        Catalog(f"sqlite:///{tmp_path}/missing/catalog.sqlite").entries()
    postgres = Catalog("postgresql+psycopg://me:hidden@127.0.0.1:1/x")
    with pytest.raises(CatalogUnavailableError) as raised:
        postgres.entries()
    assert "hidden" not in str(raised.value)
