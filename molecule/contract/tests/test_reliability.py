"""docs/reliability.py puts what runs have measured beside what the tests promise."""

from __future__ import annotations

import json
from pathlib import Path

from house import program
from small_house import build

proofs = program("reliability")
RUN = {"scenario": "cache", "test": "test_fault_0[ansible://node-1]", "kind": "full disk"}
TRIED = {"role": "cache", "name": "one", "caught_by": ["test_works"], "seconds": 41.7}


def test_the_latest_figures_stand_beside_the_promise(tmp_path: Path) -> None:
    """Of each release the newest, once where both saw the same."""
    build(tmp_path)
    figures = [
        RUN | {"release": "trixie", "measured": "lost 2 rows", "date": "2026-01-01"},
        RUN | {"release": "trixie", "measured": "lost | nothing", "date": "2026-01-03T12:00:00"},
        RUN | {"release": "bookworm", "measured": "lost 1 row", "date": "2026-01-02"},
        RUN | {"test": "test_of_yesterday", "release": "trixie", "measured": "-", "date": "2026"},
    ]
    (tmp_path / "docs/reliability.json").write_text(json.dumps(figures))
    said = "Debian 12: lost 1 row (2026-01-02)<br>Debian 13: lost \\| nothing (2026-01-03)"
    page = proofs.reliability_page(tmp_path)
    assert f"| full disk | It goes on. | {said} |\n" in page
    assert "lost 2 rows" not in page
    same = [{**run, "measured": "lost nothing", "date": "2026-01-04"} for run in figures[1:3]]
    (tmp_path / "docs/reliability.json").write_text(json.dumps(same))
    page = proofs.reliability_page(tmp_path)
    assert "| Debian 12 and 13: lost nothing (2026-01-04) |\n" in page


def test_the_latest_verdict_stands_beside_the_mutation(tmp_path: Path) -> None:
    """Which test it was, how long it took, and when."""
    build(tmp_path)
    tried = TRIED | {"release": "trixie", "date": "2026-01-01", "verdict": "caught"}
    (tmp_path / "docs/mutations.json").write_text(json.dumps([tried]))
    page = proofs.mutations_page(tmp_path)
    said = "Debian 13: caught by test_works in 42 s (2026-01-01)"
    assert f"| cache | one | `test_works` | {said} |\n" in page


def test_figures_alone_do_not_make_a_page_stale(tmp_path: Path) -> None:
    """What was measured differs from run to run; what is promised does not."""
    build(tmp_path)
    run = RUN | {"release": "trixie", "measured": "lost | nothing", "date": "2026-01-01"}
    (tmp_path / "docs/reliability.json").write_text(json.dumps([run]))
    assert proofs.stale(tmp_path) == []
