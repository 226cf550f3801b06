"""A package without a wheel whose build tries everything, and a model that tells what it saw."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import scenario
from client import Answer, Client
from hostile_code import ATTACK, CALL_OUT, FILL, FORK, LOOK, OPEN, WRITE

SOCKET = "/run/odsp/model_builder.sock"
UNIT = "odsp-model_builder@any.service"
#: Where tests change the units of all builds.
OVERRIDES = "/run/systemd/system/odsp-model_builder@.service.d"
#: The ceiling of systemd's own score for the unit: 0 is locked up, 10 is free.
EXPOSURE = 1.4
#: The folder that stands for the package index.
SOURCES = "/srv/odsp-sources"
PACKAGE = "odsp-sourced"
#: Published without a wheel.
OLD_PACKAGE = "docopt"

#: Registers a model that is a list of requirements and nothing else.
REGISTER = """
import mlflow
mlflow.set_experiment(v["name"])
with mlflow.start_run() as run:
    mlflow.log_text(v["requirement"], "model/requirements.txt")
client = mlflow.MlflowClient()
if not client.search_registered_models(f"name = '{v['name']}'"):
    client.create_registered_model(v["name"])
made = client.create_model_version(v["name"], f"{run.info.artifact_uri}/model", run.info.run_id)
print(json.dumps(str(made.version)))
"""
PUT = """
import base64, pathlib
folder = pathlib.Path(v["folder"])
folder.mkdir(mode=0o755, exist_ok=True)
(folder / v["name"]).write_bytes(base64.b64decode(v["content"]))
(folder / v["name"]).chmod(0o644)
print("null")
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
METADATA = "Metadata-Version: 2.2\nName: {}\nVersion: {}\n"
#: Builds a wheel of as much of MLflow as a runner needs, with all that was seen meanwhile.
BACKEND = """
import json, os, zipfile
ATTEMPTS = <attempts>
MODEL = '''
from types import SimpleNamespace
class Model:
    metadata = SimpleNamespace(metadata=None, signature=SimpleNamespace(
        inputs=None, outputs=None, params=None, _is_signature_from_type_hint=True))
    def predict(self, rows, params=None):
        return [SEEN for _ in rows]
def load_model(folder):
    return Model()
'''
def build_wheel(folder, config_settings=None, metadata_directory=None):
    seen = {}
    for name, (code, given) in ATTEMPTS.items():
        scope = {"at_load": [], **given}
        exec(code, scope)
        seen[name] = scope["told"]
    seen["user"] = os.getuid()
    seen["strangers"] = [process for process in seen["look"]["processes"]
                         if os.path.exists(f"/proc/{process}")
                         and os.stat(f"/proc/{process}").st_uid != os.getuid()]
    name, info = "<name>-py3-none-any.whl", "<name>.dist-info"
    files = {"mlflow/__init__.py": "", "mlflow/pyfunc.py": f"SEEN = {json.dumps(seen)!r}" + MODEL,
             f"{info}/METADATA": <metadata>, f"{info}/RECORD": "",
             f"{info}/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"}
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return name
"""
#: Takes more memory than a build with too little has, and less than would harm the host.
HOARD = """
told = len(b"x" * 640 * 2**20)
"""
TOO_LITTLE = "MemoryMax=384M"
#: With this, no unit starts.
NOWHERE = "WorkingDirectory=/none"
#: Asks the builder as the model server does; the wheels themselves are left unread.
ASK = """
import socket
with socket.socket(socket.AF_UNIX) as connection:
    try:
        connection.connect(v["socket"])
        connection.sendall(json.dumps(v["request"]).encode() + b"\\n")
        print(json.dumps(connection.makefile("rb").readline().decode()))
    except OSError as error:
        print(json.dumps(type(error).__name__))
"""


def put_sources(host: Any, attempts: dict[str, tuple[str, dict[str, Any]]]) -> str:
    """Offer a new version of the package, whose build runs programs, each with some values given.

    Returns what to require.
    """
    version = f"1.{time.time_ns()}"
    name, metadata = f"odsp_sourced-{version}", METADATA.format(PACKAGE, version)
    backend = BACKEND.replace("<name>", name).replace("<metadata>", repr(metadata))
    backend = backend.replace("<attempts>", repr(attempts))
    files = {"PKG-INFO": metadata, "pyproject.toml": PYPROJECT, "backend.py": backend}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(f"{name}/{path}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    text = base64.b64encode(content.getvalue()).decode()
    scenario.python(host, PUT, folder=SOURCES, name=f"{name}.tar.gz", content=text)
    return f"{PACKAGE}=={version}"


@contextmanager
def asked(server: Client, tracking: Client, requirement: str) -> Iterator[Answer]:
    """Ask a model with this requirement for a prediction; it is unloaded afterwards."""
    name = f"odsp-needs-{requirement.partition('=')[0]}"
    version = tracking.run(REGISTER, name=name, requirement=requirement)
    try:
        yield server.ask(f"/{name}/{version}", "POST", body={"data": [["any"]]}, patience=300)
    finally:
        server.ask(f"/{name}/pyfunc/{version}", "DELETE")


def ask(host: Any, account: str, requirement: str, index_url: str) -> Any:
    """Return the first line of the builder's answer to an account, or what keeps it from asking."""
    request = {
        "requirements": [requirement], "constraints": [],
        "index_url": index_url or None, "wheels_dir": None,
    }  # fmt: skip
    program = scenario.program(ASK, {"socket": SOCKET, "request": request})
    answer = host.run(f"{program} | runuser -u {account} -- timeout 120 python3 -")
    assert answer.rc == 0, answer.stderr
    return json.loads(answer.stdout)


def assert_built_in_a_cell(
    host: Any, server: Client, tracking: Client, processes: list[int], address: str
) -> None:
    """The package is built and the model predicts; its build saw and reached nothing of ours."""
    paths = ["/etc/odsp/model_server.env", "/etc/shadow", "/etc/passwd"]
    paths.append("/var/lib/odsp/model_server/known.json")
    paths += [f"/proc/{pid}/{name}" for pid in processes for name in ("environ", "root/etc/hosts")]
    helper = "/run/odsp/model_runnerd.sock"
    requirement = put_sources(
        host,
        {
            "look": (LOOK, {}),
            "open": (OPEN, {"paths": paths}),
            "call": (CALL_OUT, {"address": address, "helper": helper}),
            "write": (WRITE, {}),
            "attack": (ATTACK, {"processes": processes}),
            "fork": (FORK, {}),
            "fill": (FILL, {}),
        },
    )
    with asked(server, tracking, requirement) as answer:
        assert answer.status == 200, answer
        (text,) = answer.body["prediction"]
    seen = json.loads(text)
    assert seen["user"] not in (0, int(host.check_output("id -u model_server")))
    known = [one for one in scenario.secrets().values() if isinstance(one, str)]
    assert known
    assert [one for one in known if one in text] == []
    assert [name for name in seen["look"]["environ"] if re.match("MODEL_SERVER|MLFLOW", name)] == []
    private = ("/etc/odsp", "/var/lib", "/run/odsp", "/run/dbus", "/home", "/root", "/opt")
    assert [file for file in seen["look"]["files"] if file.startswith(private)] == []
    assert (seen["strangers"], seen["open"], seen["attack"]) == ([], [], [])
    # By the network alone: neither by Unix sockets of whatever kind nor by netlink.
    assert {family for family, *_ in seen["call"]} <= {2, 10}, seen["call"]
    assert seen["write"].keys() <= {"/scratch", "/dev/shm", "/tmp", "/var/tmp", "/run"}
    assert set(seen["write"].values()) == {"tmpfs"}
    # Processes, and MiB of its scratch.
    tasks = int(host.service(UNIT).systemd_properties["TasksMax"])
    assert 8 < seen["fork"] < tasks
    assert 8 < seen["fill"] < 1024


def assert_greed_ends_alone(host: Any, server: Client, tracking: Client) -> None:
    """A build that takes more memory than it may is ended, and its model refused for that."""
    requirement = put_sources(host, {"look": (LOOK, {}), "hoard": (HOARD, {})})
    with builds_with(host, TOO_LITTLE), asked(server, tracking, requirement) as answer:
        assert answer.status == 422, answer
    assert "cannot be built" in answer.body["detail"], answer
    # The kernel ends what takes most, or systemd all of it, as the host's control groups are.
    assert re.search("for want of memory|signal: 9", answer.body["detail"]), answer


def assert_broken_unit_is_told(host: Any, server: Client, tracking: Client) -> None:
    """A unit that cannot start is the host's fault, not the model's."""
    requirement = put_sources(host, {"look": (LOOK, {})})
    with builds_with(host, NOWHERE), asked(server, tracking, requirement) as answer:
        assert answer.status == 503, answer
    assert "odsp-model_builder does not answer" in answer.body["detail"], answer


@contextmanager
def builds_with(host: Any, setting: str) -> Iterator[None]:
    """Let the units of builds have a setting of systemd's meanwhile."""
    host.check_output(
        f"mkdir -p {OVERRIDES} && printf '[Service]\\n{setting}\\n' > {OVERRIDES}/test.conf && "
        "systemctl daemon-reload"
    )
    try:
        yield
    finally:
        host.check_output(f"rm -r {OVERRIDES} && systemctl daemon-reload")


def assert_confined(host: Any) -> None:
    """Of what systemd looks for, the unit lacks little more than a life without network."""
    unit = host.service(UNIT).systemd_properties
    limits = ("MemoryMax", "TasksMax", "CPUQuotaPerSecUSec", "RuntimeMaxUSec")
    assert [unit[name] for name in limits if unit[name] == "infinity"] == []
    assert unit["User"] == "odsp-mb-any"
    assert "io_uring_setup" not in unit["SystemCallFilter"]
    verdict = host.check_output(f"systemd-analyze security --no-pager {UNIT} | tail -n 1")
    score = re.search(r"for \S+: ([0-9.]+) ", verdict)
    assert score, verdict
    assert float(score[1]) <= EXPOSURE, verdict
