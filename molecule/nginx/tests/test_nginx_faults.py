"""What the door does when something else breaks: a component, the disk, memory, time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import faults
import pytest
import scenario

UNIT = "odsp-nginx.service"
SLOW = "odsp-door-slow.service"
DAY = 86400
Note = Callable[[str], None]


def seconds(answers: list[dict[str, Any]]) -> str:
    """Return the longest time that an answer took."""
    return f"{max(answer['seconds'] for answer in answers):.1f} s"


@pytest.mark.fault(
    "dependency away",
    "The door starts without its components, says within 10 s which unit on which host does not "
    "answer, as a page to people and as JSON to programs, and the other routes go on.",
)
def test_says_what_does_not_answer(
    ask: Any, behind: Any, users: list[list[str]], measured: Note
) -> None:
    """With nobody behind a route the answer names the unit; the other routes work."""
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
    assert max(answer["seconds"] for answer in others) < 3
    measured(f"504 after {seconds(late)}; other routes answered in {seconds(others)}.")


@pytest.mark.usefixtures("upstream")
@pytest.mark.fault(
    "full disk",
    "The door needs no disk: uploads and downloads pass, it reloads and it refuses as before.",
)
def test_needs_no_disk(host: Any, ask: Any, users: list[list[str]], measured: Note) -> None:
    """With not a block left where nginx keeps temporary files everything passes nevertheless."""
    with faults.full_disk(host, UNIT, "/var/lib/nginx", 16) as disk:
        disk.fill()
        host.check_output(f"systemctl reload {UNIT}")
        put, get, stranger = ask(
            {"path": "/mlflow/x", "auth": users[0], "method": "PUT", "size": 50_000_000},
            {"path": "/inference/large", "auth": users[0]},
            {"path": "/mlflow/x", "method": "PUT", "size": 50_000_000},
        )
    assert json.loads(put["text"])["received"] == get["size"] == 50_000_000
    assert stranger["status"] == 401
    measured(f"50 MB in and 50 MB out passed in {seconds([put, get])} each at most.")


@pytest.mark.fault(
    "out of memory",
    "What takes more than nginx_memory_max is ended, and the door answers and refuses within 10 s.",
)
def test_stays_within_its_memory(
    host: Any, ask: Any, users: list[list[str]], measured: Note
) -> None:
    """The kernel ends what eats, never the door for good."""
    before = scenario.units(host)
    faults.eat_memory(host, UNIT)

    def answers() -> bool:
        """Tell whether strangers get 401 and users the start page."""
        stranger, user = ask({"path": "/"}, {"path": "/", "auth": users[0]})
        return (stranger["status"], user["status"]) == (401, 200)

    scenario.wait_until(answers, 10)
    again = scenario.restarted(before, scenario.units(host))
    measured(f"The eater was ended; the door {'restarted' if again else 'went on'}.")


@contextmanager
def everywhere(host: Any, file: str) -> Iterator[None]:
    """Have the clock where its programs look without the environment, which nginx drops."""
    host.check_output(f"ln -s {file} /etc/faketimerc")
    try:
        yield
    finally:
        host.check_output("rm -f /etc/faketimerc")


@pytest.mark.fault(
    "clock jump",
    "The door answers and refuses as before; a component whose certificate does not hold at the "
    "door's time counts as away, until the time is right again.",
)
def test_lives_with_a_wrong_clock(
    host: Any, ask: Any, behind: Any, users: list[list[str]], measured: Note
) -> None:
    """A day ahead harms nothing; ten years ahead and a month back only end what TLS must end."""
    seen = {}
    with faults.clock(host, UNIT) as clock, everywhere(host, clock.file):
        for days in (1, 3650, -30, 0):
            clock.jump(days * DAY)
            expected = 200 if days in (0, 1) else 502

            def settled(expected: int = expected) -> bool:
                """Tell whether the component is there as the door's time says."""
                return bool(ask({"path": "/mlflow/", "auth": users[0]})[0]["status"] == expected)

            # A new component each time: an open connection would not be checked again.
            with behind("serve", "mlflow"):
                scenario.wait_until(settled, 15)
                stranger, page, route = ask(
                    {"path": "/mlflow/"},
                    {"path": "/", "auth": users[0]},
                    {"path": "/mlflow/", "auth": users[0]},
                )
            assert (stranger["status"], page["status"], route["status"]) == (401, 200, expected)
            seen[days] = route["status"]
    told = ", ".join(f"{status} at {days:+d} days" for days, status in seen.items() if days)
    measured(f"The route gave {told}; start page and refusals as ever.")


@pytest.mark.usefixtures("upstream")
@pytest.mark.fault(
    "expired certificate",
    "Clients notice, and the next run of the role renews the certificate by a reload.",
)
def test_renews_an_expired_certificate(
    host: Any, ask: Any, users: list[list[str]], measured: Note
) -> None:
    """Nobody who checks comes in with the old one; afterwards everybody does, without a restart."""
    with faults.expired_certificate(host, "nginx", UNIT):
        (late,) = ask({"path": "/", "auth": users[0]})
        before = scenario.units(host)
        run = scenario.site("--tags", "nginx")
        assert run.returncode == 0, run.stdout + run.stderr
        page, route = ask({"path": "/", "auth": users[0]}, {"path": "/mlflow/", "auth": users[0]})
        after = scenario.units(host)
    assert late["status"] == 0 and "certificate has expired" in late["text"], late
    assert (page["status"], route["status"]) == (200, 200)
    assert scenario.restarted(before, after) == set()
    measured("Clients refused it; one run later they came in, and nothing had restarted.")
