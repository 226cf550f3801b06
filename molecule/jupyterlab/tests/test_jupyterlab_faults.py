"""What notebooks do when something else breaks: the disk, memory, other components, time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faults
import pytest
import scenario

UNIT = "odsp-jupyterlab.service"
SAVED = (200, 201)
DAY = 86400
Note = Callable[[str], None]

#: Where this scenario's notebooks look for MLflow, Dask and MinIO.
ELSEWHERE = {"mlflow": 5000, "dask": 8786, "s3": 9000}
USE_THEM = """
import json, os
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # by default it tries for minutes
import boto3, distributed, mlflow
uses = {
    "mlflow": mlflow.search_experiments,
    "dask": lambda: distributed.Client(timeout="5s"),
    "s3": lambda: boto3.client("s3").list_buckets(),
}
told = {}
for name, use in uses.items():
    try:
        told[name] = f"no error: {use()}"
    except Exception as error:
        told[name] = str(error)
print(json.dumps(told))
"""
USE_ONE = """
import boto3, pathlib
store = boto3.client("s3")
pathlib.Path("asked").touch()
store.list_buckets()
"""
#: Has the kernel take connections, and never says a word.
SILENCE = """
import os, socket, time
held = [socket.create_server(("127.0.0.1", port)) for port in v["ports"]]
open(v["running"], "w").close()
while os.path.exists(v["running"]):
    time.sleep(0.1)
print(json.dumps(len(held)))
"""


@pytest.mark.fault(
    "full disk",
    "With the home full a save says so and the former file stays whole, cells go on, and saving "
    "works again as soon as there is room.",
)
def test_keeps_notebooks_on_a_full_disk(
    host: Any, home: str, answers: Any, cell: Any, save: Any, measured: Note
) -> None:
    """Nothing that was saved is lost or cut."""
    with faults.full_disk(host, UNIT, home, 96) as disk:
        scenario.wait_until(answers)
        assert save("kept.txt", "first").status in SAVED
        disk.fill()
        refused = save("kept.txt", "x" * 50_000)
        kept = host.file(f"{home}/kept.txt").content_string
        printed = cell("print(6 * 7)")
        disk.free()
        freed = time.monotonic()
        again = save("kept.txt", "second")
        took = time.monotonic() - freed
    scenario.wait_until(answers)
    assert refused.status == 500 and "No space left on device" in refused.text
    assert (kept, printed) == ("first", "42")
    assert again.status in SAVED
    measured(f"the save: {refused.status}; a cell ran; saved {took:.1f} s after there was room")


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
    assert save("kept.txt", "before").status in SAVED
    server = scenario.main_pid(host, UNIT)
    with faults.memory_limit(host, UNIT, 768), ThreadPoolExecutor(1) as beside:
        patient = beside.submit(cell, "import time; time.sleep(15); print(6 * 7)")
        started = time.monotonic()
        greedy = run("hoard = [b'x' * 2**23 for _ in range(256)]; print(len(hoard))")
        took = time.monotonic() - started
        assert greedy == {"printed": "", "error": "", "died": True}
        assert patient.result() == "42"
    scenario.wait_until(answers)
    assert scenario.main_pid(host, UNIT) == server
    assert cell("print(open('kept.txt').read())") == "before"
    measured(f"the kernel was gone after {took:.0f} s; another one and the server went on")


@pytest.mark.fault(
    "dependency away",
    "With MLflow, Dask and MinIO away the server starts and cells run; a cell that uses one gets "
    "an error with its address.",
)
def test_needs_no_other_component(host: Any, answers: Any, cell: Any, measured: Note) -> None:
    """What is away is missed by the cell that uses it, and by nothing else."""
    for port in ELSEWHERE.values():
        assert not host.socket(f"tcp://127.0.0.1:{port}").is_listening
    host.check_output(f"systemctl restart {UNIT}")
    began = time.monotonic()
    scenario.wait_until(answers)
    assert cell("print(6 * 7)") == "42"
    started, began = time.monotonic() - began, time.monotonic()
    told = json.loads(cell(USE_THEM))
    for name, port in ELSEWHERE.items():
        assert f"127.0.0.1:{port}" in told[name] and "no error" not in told[name], told
    took = time.monotonic() - began
    measured(f"a cell ran {started:.0f} s after a start; three errors within {took:.0f} s")


@pytest.mark.fault(
    "dependency late",
    "Only the cell that asked a component that never answers waits, and it can be interrupted; "
    "the server and other kernels go on.",
)
def test_waits_for_no_other_component(
    host: Any, home: str, answers: Any, ask: Any, run: Any, cell: Any, save: Any, measured: Note
) -> None:
    """Beside a cell that waits others run, and what they print is saved."""
    asked = f"{home}/asked"
    host.check_output(f"rm -f {asked}")
    scenario.wait_until(answers)

    def waits() -> bool:
        """Tell whether the cell has come to its question to the store."""
        return bool(host.file(asked).exists)

    with (
        scenario.at_work(host, SILENCE, ports=list(ELSEWHERE.values())),
        ThreadPoolExecutor(1) as beside,
    ):
        waiting = beside.submit(run, USE_ONE)
        scenario.wait_until(waits, 120)
        began = time.monotonic()
        assert cell("print(6 * 7)") == "42"
        assert save("beside.txt", "saved").status in SAVED
        took = time.monotonic() - began
        assert not waiting.done()
        (kernel,) = json.loads(ask("api/kernels").text)
        assert kernel["execution_state"] == "busy"
        stop = ask(f"api/kernels/{kernel['id']}/interrupt", "POST", body={}, page=True)
        assert stop.status == 204
        began = time.monotonic()
        assert waiting.result()["error"].startswith("KeyboardInterrupt")
        ended = time.monotonic() - began
    measured(f"another cell and a save took {took:.0f} s; interrupted, it ended in {ended:.1f} s")


@pytest.mark.fault(
    "clock jump",
    "A jump of a day ahead and back harms nothing; where the clock says that certificates have "
    "ended nobody comes in, until it is right again.",
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
            there, kernels = ask().date, float(cell("import time; print(time.time())"))
            now = time.time() + days * DAY
            assert abs(there - now) < 600 and abs(kernels - now) < 600, (there, kernels, now)
        clock.jump(3650 * DAY)

        def refused() -> bool:
            """Tell whether the server takes the client's certificate for one that has ended."""
            return "certificate expired" in ask().text

        scenario.wait_until(refused)
        clock.jump(0)
        began = time.monotonic()
        scenario.wait_until(answers)
        took = time.monotonic() - began
        assert scenario.main_pid(host, UNIT) == server
    scenario.wait_until(answers)
    measured(
        f"cells ran a day ahead and back; ten years ahead: certificate expired; right again, it "
        f"answered after {took:.1f} s; the same process"
    )


@pytest.mark.fault(
    "expired certificate",
    "The door and every other client notice, and the next run of the role renews the certificate.",
)
def test_renews_an_expired_certificate(
    host: Any, door: dict[str, Any], ask: Any, cell: Any, answers: Any, measured: Note
) -> None:
    """Nobody comes in with the old one; a run of the role later cells run through the door."""
    with faults.expired_certificate(host, "jupyterlab", UNIT):

        def expired() -> bool:
            """Tell whether the server shows a certificate that has ended."""
            return "certificate has expired" in ask().text

        scenario.wait_until(expired)
        shut = ask(**door)
        assert shut.status == 502 and "odsp-jupyterlab.service" in shut.text
        before, began = scenario.units(host), time.monotonic()
        scenario.converge("jupyterlab")
        took = time.monotonic() - began
        assert scenario.restarted(before, scenario.units(host)) == {UNIT}
    scenario.wait_until(answers)
    assert cell("print(6 * 7)", **door) == "42"
    measured(f"clients: certificate has expired; after one run of {took:.0f} s a cell ran")
