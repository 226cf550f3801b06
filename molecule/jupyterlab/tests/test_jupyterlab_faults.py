"""What notebooks do when something else breaks: the disk, memory, time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import faults
import pytest
import scenario

UNIT = "odsp-jupyterlab.service"
SAVED = ("200", "201")
DAY = 86400
Note = Callable[[str], None]


@pytest.fixture
def answers(ask: Any) -> Callable[[], bool]:
    """Return a question: does JupyterLab answer?"""

    def answered() -> bool:
        """Tell whether JupyterLab answers to the door's certificate."""
        return bool(ask()[0] == "200")

    return answered


@pytest.mark.fault(
    "full disk",
    "With the home full a save says so and the former file stays whole, cells go on, and saving "
    "works again as soon as there is room.",
)
def test_keeps_notebooks_on_a_full_disk(
    host: Any, inputs: dict[str, Any], answers: Any, cell: Any, save: Any, measured: Note
) -> None:
    """Nothing that was saved is lost or cut."""
    folder = host.user(inputs["jupyterlab_user"]).home
    with faults.full_disk(host, UNIT, folder, 96) as disk:
        scenario.wait_until(answers)
        assert save("kept.txt", "first") in SAVED
        disk.fill()
        refused = save("kept.txt", "x" * 50_000)
        kept = host.file(f"{folder}/kept.txt").content_string
        printed = cell("print(6 * 7)").strip()
        disk.free()
        again = save("kept.txt", "second")
    scenario.wait_until(answers)
    assert (refused, kept, printed) == ("500", "first", "42")
    assert again in SAVED
    measured("The save ended with 500, the former file was whole, a cell printed its result.")


@pytest.mark.fault(
    "out of memory",
    "A cell that takes more than jupyterlab_memory_max loses its kernel; the server, its other "
    "kernels and every notebook stay.",
)
def test_a_greedy_cell_ends_its_kernel_only(
    host: Any, answers: Any, run: Any, cell: Any, save: Any, measured: Note
) -> None:
    """The kernel dies and says so; the server is the same process as before."""
    scenario.wait_until(answers)
    assert save("kept.txt", "before") in SAVED
    server, started = scenario.main_pid(host, UNIT), time.monotonic()
    limit = "MemoryMax=768M MemorySwapMax=0"
    host.check_output(f"systemctl set-property --runtime {UNIT} {limit}")
    try:
        greedy = run("hoard = [b'x' * 2**23 for _ in range(256)]; print(len(hoard))")
    finally:
        host.check_output(f"rm -rf /run/systemd/system.control/{UNIT}.d; systemctl daemon-reload")
    assert greedy.rc == 3, greedy.stdout + greedy.stderr
    took = time.monotonic() - started
    scenario.wait_until(answers, 10)
    assert scenario.main_pid(host, UNIT) == server
    assert cell("print(open('kept.txt').read())").strip() == "before"
    measured(f"The kernel was gone after {took:.0f} s, the server went on, the next cell ran.")


@pytest.mark.long
@pytest.mark.fault(
    "clock jump",
    "A day back or ahead harms nothing; where the clock says that certificates have ended nobody "
    "comes in, until it is right again.",
)
def test_lives_with_a_wrong_clock(
    host: Any, ask: Any, answers: Any, cell: Any, measured: Note
) -> None:
    """Cells run at every time at which the certificates hold; no restart is needed."""
    with faults.clock(host, UNIT) as clock:
        scenario.wait_until(answers)
        server = scenario.main_pid(host, UNIT)
        for days in (1, 0):
            clock.jump(days * DAY)
            assert cell("print(6 * 7)").strip() == "42"
        clock.jump(3650 * DAY)
        scenario.wait_until(lambda: ask()[0] == "refused", 15)
        clock.jump(0)
        scenario.wait_until(answers, 15)
        assert scenario.main_pid(host, UNIT) == server
    scenario.wait_until(answers)
    measured("Cells ran a day ahead; ten years ahead it refused; then it answered again.")


@pytest.mark.fault(
    "expired certificate",
    "The door and every other client notice, and the next run of the role renews the certificate.",
)
def test_renews_an_expired_certificate(
    host: Any, ask: Any, cell: Any, answers: Any, measured: Note
) -> None:
    """Nobody comes in with the old one; a run of the role later cells run through the door."""
    with faults.expired_certificate(host, "jupyterlab", UNIT):

        def expired() -> bool:
            """Tell whether the server shows a certificate that has ended."""
            return "certificate has expired" in ask()[1]

        scenario.wait_until(expired)
        before = scenario.units(host)
        run = scenario.site("--tags", "jupyterlab")
        assert run.returncode == 0, run.stdout + run.stderr
        assert scenario.restarted(before, scenario.units(host)) == {UNIT}
    scenario.wait_until(answers, 10)
    assert cell("print(6 * 7)", door=True).strip() == "42"
    measured("Clients refused it; one run later a cell ran through the door.")
