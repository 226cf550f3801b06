"""What the door does when something else breaks: a component, the disk, memory, time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import faults
import pytest
import scenario

UNIT = "odsp-nginx.service"
#: What stands behind the door.
BEHIND = "odsp-door-test.service"
SLOW = "odsp-door-slow.service"
DAY = 86400
Note = Callable[[str], None]


def clock_of(host: Any) -> float:
    """Return the host's time (seconds since 1970)."""
    return float(host.check_output("date +%s.%N"))


def seconds(answers: list[dict[str, Any]]) -> str:
    """Return the longest time that an answer took."""
    return f"{max(answer['seconds'] for answer in answers):.1f} s"


@pytest.mark.fault(
    "dependency away",
    "The door starts without its components, says within 10 s which unit on which host does not "
    "answer, as a page to people and as JSON to programs, and the other routes go on.",
)
def test_says_what_does_not_answer(
    host: Any, ask: Any, behind: Any, opens: Any, users: list[list[str]], measured: Note
) -> None:
    """With nobody behind a route the answer names the unit; the other routes work."""
    host.check_output(f"systemctl restart {UNIT}")
    scenario.wait_until(opens)
    away = {"mlflow": "/mlflow/", "jupyterlab": "/jupyter/", "dask_scheduler": "/dask/"}
    with behind("serve", "minio", "model_server"):
        answers = []
        for component, path in away.items():
            program, browser, post = ask(
                {"path": path + "x", "auth": users[0]},
                {"path": path + "x", "auth": users[0], "headers": {"Accept": "text/html,*/*"}},
                {"path": path + "x", "auth": users[0], "method": "POST", "size": 10},
            )
            answers += [program, browser, post]
            unit = f"odsp-{component}.service"
            for answer in (program, post):
                assert answer["headers"]["content-type"] == "application/json"
                assert unit in json.loads(answer["text"])["detail"]
            assert browser["headers"]["content-type"].startswith("text/html")
            assert f"journalctl --unit {unit}" in browser["text"]
        others = ask(*({"path": p, "auth": users[0]} for p in ("/", "/minio/", "/inference/")))
    assert {answer["status"] for answer in answers} == {502}
    assert max(answer["seconds"] for answer in answers) < 10
    assert [answer["status"] for answer in others] == [200] * 3
    measured(f"502 after {seconds(answers)}; other routes answered in {seconds(others)}.")


@pytest.mark.fault(
    "dependency late",
    "A component that accepts connections and stays silent costs its own users an error after "
    "10 s at most, and nobody else a thing, however many of them wait.",
)
def test_does_not_wait_for_ever(
    host: Any, ask: Any, behind: Any, users: list[list[str]], measured: Note
) -> None:
    """Thirty requests to a silent component end in errors; meanwhile the other routes answer."""
    silent = [{"path": "/mlflow/x", "auth": users[0]}] * 30
    lively = [{"path": path, "auth": users[0]} for path in ("/", "/minio/", "/inference/")]
    with (
        behind("serve", "minio", "model_server"),
        behind("serve", "mlflow", unit=SLOW),
        faults.frozen(host, SLOW),
    ):
        answers = ask(*silent, *lively, at_once=True)
        late, others = answers[:30], answers[30:]
    assert {answer["status"] for answer in late} == {504}
    assert max(answer["seconds"] for answer in late) < 10
    assert [answer["status"] for answer in others] == [200] * 3
    # Whoever waited for the silent one would take as long as its own users at least.
    assert max(answer["seconds"] for answer in others) < min(answer["seconds"] for answer in late)
    measured(f"504 after {seconds(late)}; other routes answered in {seconds(others)}.")


@pytest.mark.usefixtures("upstream")
@pytest.mark.fault(
    "full disk",
    "The door needs no disk: uploads and downloads pass, it reloads and it refuses as before.",
)
def test_needs_no_disk(
    host: Any, ask: Any, opens: Any, users: list[list[str]], measured: Note
) -> None:
    """With not a block left where nginx keeps temporary files everything passes nevertheless."""
    with faults.full_disk(host, UNIT, "/var/lib/nginx", 16) as disk:
        scenario.wait_until(opens)
        disk.fill()
        host.check_output(f"systemctl reload {UNIT}")
        put, get, stranger = ask(
            {"path": "/mlflow/x", "auth": users[0], "method": "PUT", "size": 50_000_000},
            {"path": "/inference/large", "auth": users[0]},
            {"path": "/mlflow/x", "method": "PUT", "size": 50_000_000},
        )
    scenario.wait_until(opens)
    assert json.loads(put["text"])["received"] == get["size"] == 50_000_000
    assert stranger["status"] == 401
    measured(f"50 MB in and 50 MB out passed in {seconds([put, get])} each at most.")


@pytest.mark.fault(
    "out of memory",
    "What takes more than nginx_memory_max is ended, and the door answers and refuses within 10 s.",
)
def test_stays_within_its_memory(host: Any, opens: Any, measured: Note) -> None:
    """The kernel ends what eats, never the door for good."""
    before = scenario.units(host)
    faults.eat_memory(host, UNIT)
    began = time.monotonic()
    scenario.wait_until(opens, 10)
    took = time.monotonic() - began
    again = scenario.restarted(before, scenario.units(host))
    measured(f"answered {took:.1f} s later; the unit {'restarted' if again else 'went on'}")


@contextmanager
def everywhere(host: Any, file: str) -> Iterator[None]:
    """Have the clock where its programs look without the environment, which nginx drops."""
    host.check_output(f"ln -s {file} /etc/faketimerc")
    try:
        yield
    finally:
        host.check_output("rm -f /etc/faketimerc")


def answers_of_all_workers(host: Any, ask: Any, request: dict[str, Any]) -> set[int]:
    """Send a request again and again until each of the door's workers has logged it."""
    workers = set(host.check_output(f"pgrep --parent {scenario.main_pid(host, UNIT)}").split())
    assert len(workers) > 1, "one worker cannot differ from another"
    since = clock_of(host)
    statuses: set[int] = set()
    shown = f"journalctl --unit {UNIT} --output json --since @{since:.6f} --grep {request['path']}"

    def all_asked() -> bool:
        """Tell whether each worker has logged the request."""
        statuses.update(answer["status"] for answer in ask(*[request] * 16, at_once=True))
        said = host.run(shown).stdout.splitlines()
        return workers <= {json.loads(line)["_PID"] for line in said}

    scenario.wait_until(all_asked)
    return statuses


def question_of_asking(host: Any, path: str, since: float) -> Callable[[], bool]:
    """Return the question whether what stands behind the door was asked for a path."""

    def asked() -> bool:
        """Tell whether a request for the path came through the door."""
        return path in scenario.journal(host, BEHIND, since)

    return asked


@pytest.mark.fault(
    "clock jump",
    "The door answers and refuses as before; a component whose certificate does not hold at the "
    "door's time counts as away, until the time is right again.",
)
def test_lives_with_a_wrong_clock(
    host: Any, ask: Any, behind: Any, opens: Any, users: list[list[str]], measured: Note
) -> None:
    """A day ahead harms nothing; ten years ahead and a month back only end what TLS must end."""
    seen = {}
    with faults.clock(host, UNIT) as clock, everywhere(host, clock.file):
        scenario.wait_until(opens)
        for days, status in ((1, 200), (3650, 502), (-30, 502), (0, 200)):
            clock.jump(days * DAY)
            request = {"path": f"/mlflow/odsp-{days}-days", "auth": users[0]}
            since = clock_of(host)
            # A new component each time, which knows no session: else nobody would look at its
            # certificate again. It answers on its port before the door is asked.
            with behind("serve", "mlflow"):
                statuses = answers_of_all_workers(host, ask, request)
                assert opens()
            assert statuses == {status}, days
            # Away for the door alone: without a certificate that holds it asks for nothing.
            asked = question_of_asking(host, f"odsp-{days}-days", since)
            if status == 200:
                scenario.wait_until(asked)
            else:
                assert not asked(), days
            seen[days] = status
    scenario.wait_until(opens)
    told = ", ".join(f"{status} at {days:+d} days" for days, status in seen.items() if days)
    measured(f"every worker's route gave {told}; start page and refusals as ever")


@pytest.mark.usefixtures("upstream")
@pytest.mark.fault(
    "expired certificate",
    "Clients notice, and the next run of the role renews the certificate by a reload.",
)
def test_renews_an_expired_certificate(
    host: Any, ask: Any, users: list[list[str]], measured: Note
) -> None:
    """Nobody who checks comes in with the old one; afterwards everybody does, without a restart."""

    def expired() -> bool:
        """Tell whether the door shows a certificate that has ended."""
        (answer,) = ask({"path": "/", "auth": users[0]})
        return answer["status"] == 0 and "certificate has expired" in answer["text"]

    def is_open() -> bool:
        """Tell whether users come in; a worker from before a reload may answer for a moment."""
        answers = ask(*({"path": path, "auth": users[0]} for path in ("/", "/mlflow/")))
        return [answer["status"] for answer in answers] == [200, 200]

    with faults.expired_certificate(host, "nginx", UNIT):
        scenario.wait_until(expired)
        before, began = scenario.units(host), time.monotonic()
        scenario.converge("nginx")
        took = time.monotonic() - began
        scenario.wait_until(is_open)
        after = scenario.units(host)
    assert scenario.restarted(before, after) == set()
    measured(f"clients: certificate has expired; after one run of {took:.0f} s 200, no restart")
