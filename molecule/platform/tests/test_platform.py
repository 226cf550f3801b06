"""The platform as a newcomer gets it: made by `make up`, used, broken, enlarged, removed.

A copy of this checkout brings up hosts of its own beside whatever runs on this machine. The tests
build on each other in this order; `-s` shows how far they are.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
import websocket
import yaml
from botocore.exceptions import ClientError

ROOT = Path(__file__).resolve().parents[3]
ROUTES = ("/", "/jupyter/", "/mlflow/", "/dask/", "/minio/", "/inference/")
#: What holds on the host once a unit serves again; the last worker host runs two processes, each
#: with a nanny, and each of these four is connected to the scheduler.
READY = {
    "postgres": "ss -Hltn 'sport = :5432' | grep -q .",
    "minio": "ss -Hltn 'sport = :9000' | grep -q .",
    "mlflow": "ss -Hltn 'sport = :5000' | grep -q .",
    "dask_scheduler": "ss -Hltn 'sport = :8786' | grep -q .",
    "dask_worker": "test $(ss -Htn state established 'dport = :8786' | wc -l) -ge 4",
    "jupyterlab": "ss -Hltn 'sport = :8888' | grep -q .",
    "model_server": "ss -Hltn 'sport = :8000' | grep -q .",
    "nginx": "ss -Hltn 'sport = :443' | grep -q .",
}
#: What of this test's own surroundings a newcomer does not have.
FOREIGN = (
    "ANSIBLE_",
    "MOLECULE_",
    "ODSP_",
    "PYTEST_",
    "CONTAINERS_CONF",
    "YAMLLINT_",
    "VIRTUAL_ENV",
    "MAKE",
)
INHERITED = ("ODSP_CACHE_DIR", "ODSP_DEBIAN_MIRRORS")


@dataclass
class Platform:
    """A checkout of its own, and the platform it makes."""

    path: Path
    is_up: bool = False

    def environment(self) -> dict[str, str]:
        """Return the environment of a newcomer's shell."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(FOREIGN) or name in INHERITED
        }
        own = str(Path(sys.executable).parent)
        kept["PATH"] = ":".join(p for p in kept["PATH"].split(":") if p != own)
        return kept

    def run(self, *command: str) -> tuple[int, str]:
        """Run a command in the checkout, shown as it goes; return its status and output."""
        started, lines = time.monotonic(), []
        print(f"\n   $ {' '.join(command)}", flush=True)
        with subprocess.Popen(
            command,
            cwd=self.path,
            env=self.environment(),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if command[0] == "make":
                    print(f"   | {line}", end="", flush=True)
            status = process.wait()
        print(f"   {time.monotonic() - started:.0f} s, status {status}", flush=True)
        return status, "".join(lines)

    def succeed(self, *command: str) -> str:
        """Run a command that must succeed; return its output."""
        status, output = self.run(*command)
        assert status == 0, output[-6000:]
        return output

    def playbook(self, name: str, *arguments: str) -> str:
        """Run a playbook as an operator does; return its output."""
        return self.succeed(".venv/bin/ansible-playbook", name, *arguments)

    @property
    def state(self) -> Path:
        """Where the checkout keeps what is its own."""
        return self.path / ".odsp"

    @property
    def machine(self) -> dict[str, Any]:
        """What the checkout wrote down about its hosts."""
        return dict(json.loads((self.state / "machine.json").read_text()))

    @property
    def verdict(self) -> dict[str, Any]:
        """The last proof's verdict."""
        return dict(json.loads((self.state / "verdict.json").read_text()))

    @property
    def secrets(self) -> dict[str, Any]:
        """The secrets that `make up` made."""
        text = (self.path / "inventories/local/group_vars/all/vault.yml").read_text()
        return dict(yaml.safe_load(text))

    @property
    def ca(self) -> str:
        """The authority that clients are told to trust."""
        return str(self.state / "ca.crt")

    @property
    def door(self) -> str:
        """The URL that users type."""
        return f"https://127.0.0.1:{self.machine['door_port']}"

    @property
    def user(self) -> tuple[str, str]:
        """Name and password of the user, as `make up` hands them over."""
        words = (self.state / "netrc").read_text().split()
        return words[words.index("login") + 1], words[words.index("password") + 1]

    def host_of(self, group: str) -> str:
        """Return the last host of a group of the inventory."""
        groups = yaml.safe_load((self.path / "inventories/local/hosts.yml").read_text())
        return str(list(groups[group]["hosts"])[-1])

    def podman(self, *arguments: str) -> str:
        """Ask podman, as the platform does."""
        sudo = [] if os.getuid() == 0 else ["sudo", "--preserve-env=CONTAINERS_CONF"]
        configuration = self.state / "containers.conf"
        extra = {"CONTAINERS_CONF": str(configuration)} if configuration.exists() else {}
        done = subprocess.run(
            [*sudo, "podman", *arguments],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, **extra},
        )
        return done.stdout.strip()

    def on(self, host: str, *command: str) -> str:
        """Run a command on a host, as root, past SSH."""
        return self.podman("exec", f"{self.machine['platform']}-{host}", *command)

    def wait(self, host: str, condition: str, seconds: float = 300) -> None:
        """Wait until a shell condition holds on a host."""
        deadline = time.monotonic() + seconds
        while self.on(host, "sh", "-c", f"{condition} && echo yes || true") != "yes":
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s on {host}: {condition}"
            time.sleep(1)


def copy_of_the_checkout(target: Path) -> None:
    """Copy what a clone would hold, links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


@pytest.fixture(scope="session")
def fresh() -> Iterator[Platform]:
    """Return a checkout in which nothing has been made yet; leave nothing of it behind."""
    with tempfile.TemporaryDirectory(prefix="odsp-platform-") as folder:
        path = Path(folder) / "checkout"
        path.mkdir()
        copy_of_the_checkout(path)
        platform = Platform(path)
        try:
            yield platform
        finally:
            if platform.state.exists():
                platform.run("make", "down")


@pytest.fixture
def platform(fresh: Platform) -> Platform:
    """Return the platform once it is up; what needs it fails at once while it is not."""
    if not fresh.is_up:
        pytest.fail("`make up` did not bring the platform up")
    return fresh


def changes(output: str) -> list[str]:
    """Return the hosts of a recap on which something changed or failed."""
    recap = re.findall(
        r"^(\S+) +: .*changed=(\d+) +unreachable=(\d+) +failed=(\d+)", output, re.MULTILINE
    )
    assert recap, "there is no recap"
    return [host for host, *counts in recap if counts != ["0", "0", "0"]]


def test_make_up_from_nothing(fresh: Platform) -> None:
    """One command: hosts, secrets, all components, and their proof."""
    output = fresh.succeed("make", "up")
    assert fresh.door in output
    assert fresh.verdict["ok"] is True
    fresh.is_up = True


def test_make_up_again_changes_nothing(platform: Platform) -> None:
    """The second run finds everything as it should be."""
    assert "changed=0" in platform.succeed("make", "up")


def test_dry_run_finds_nothing_to_change(platform: Platform) -> None:
    """`--check` passes on an installed platform and agrees."""
    assert changes(platform.playbook("site.yml", "--check")) == []


def test_passwords_are_for_their_owner(platform: Platform) -> None:
    """Files with secrets are private, and no secret is in what was printed or logged."""
    for name in ("password", "netrc"):
        assert (platform.state / name).stat().st_mode & 0o077 == 0, name
    secrets = [s for s in platform.secrets.values() if isinstance(s, str) and len(s) < 100]
    assert len(secrets) >= 6
    logs = list((platform.state / "log").glob("*.log"))
    assert logs
    for log in logs:
        text = log.read_text()
        assert not any(secret in text for secret in [*secrets, platform.user[1]]), log.name


@pytest.mark.parametrize("route", ROUTES)
def test_door_is_shut_and_opens(platform: Platform, route: str) -> None:
    """Nobody without the password; with it, the component behind the route."""
    url = platform.door + route
    assert requests.get(url, verify=platform.ca, timeout=30).status_code == 401
    wrong = (platform.user[0], "wrong-password")
    assert requests.get(url, verify=platform.ca, auth=wrong, timeout=30).status_code == 401
    right = requests.get(url, verify=platform.ca, auth=platform.user, timeout=60)
    assert right.status_code == 200
    assert "</html>" in right.text.lower()


MLFLOW = """
import mlflow, os, pathlib, tempfile
big = os.urandom(3_000_000)
mlflow.set_experiment("platform-test")
with mlflow.start_run() as run:
    mlflow.log_metric("accuracy", 0.5)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "big.bin"
        path.write_bytes(big)
        mlflow.log_artifact(str(path))
client = mlflow.MlflowClient()
found = client.get_run(run.info.run_id)
assert found.data.metrics == {"accuracy": 0.5}, found.data
with tempfile.TemporaryDirectory() as folder:
    path = mlflow.artifacts.download_artifacts(
        f"runs:/{run.info.run_id}/big.bin", dst_path=folder
    )
    assert pathlib.Path(path).read_bytes() == big
print(found.data.tags.get("mlflow.user"))
client.delete_run(run.info.run_id)
"""


def test_unchanged_mlflow_client_works_through_the_door(platform: Platform) -> None:
    """URI, user, password and authority are all a client outside needs."""
    user, password = platform.user
    environment = {
        **platform.environment(),
        "MLFLOW_TRACKING_URI": f"{platform.door}/mlflow",
        "MLFLOW_TRACKING_USERNAME": user,
        "MLFLOW_TRACKING_PASSWORD": password,
        "MLFLOW_TRACKING_SERVER_CERT_PATH": platform.ca,
        "DO_NOT_TRACK": "true",
    }
    client = [sys.executable, "-c", MLFLOW]
    done = subprocess.run(client, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    environment["MLFLOW_TRACKING_PASSWORD"] = "wrong-password"
    environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    assert subprocess.run(client, env=environment, check=False, capture_output=True).returncode


def store(platform: Platform, secret: str) -> Any:
    """Return a client of the object store with an account of the platform."""
    address = platform.machine["hosts"][platform.host_of("minio")]
    return boto3.client(
        "s3",
        endpoint_url=f"https://{address}:9000",
        aws_access_key_id="jupyterlab",
        aws_secret_access_key=secret,
        region_name="us-east-1",
        verify=platform.ca,
    )


def test_unchanged_boto3_works_on_the_store(platform: Platform) -> None:
    """An account writes and reads its bucket, not another's; a wrong key gets nowhere."""
    client = store(platform, platform.secrets["vault_jupyterlab_s3_secret_key"])
    client.put_object(Bucket="jupyterlab", Key="platform-test", Body=b"kept")
    found = client.get_object(Bucket="jupyterlab", Key="platform-test")["Body"].read()
    client.delete_object(Bucket="jupyterlab", Key="platform-test")
    assert found == b"kept"
    with pytest.raises(ClientError, match="AccessDenied"):
        client.list_objects_v2(Bucket="mlflow")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        store(platform, "wrong-secret-key").list_objects_v2(Bucket="jupyterlab")


def test_user_signs_in_to_the_console(platform: Platform) -> None:
    """MinIO's console takes the name and password of the door, and shows the shared bucket only."""
    name, password = platform.user
    base = f"{platform.door}/minio/api/v1"
    with requests.Session() as session:
        # Else a variable of the environment outranks the authority given here.
        session.trust_env = False
        session.auth, session.verify = platform.user, platform.ca

        def login(secret: str) -> int:
            body = {"accessKey": name, "secretKey": secret}
            return session.post(f"{base}/login", json=body, timeout=60).status_code

        assert login("wrong-password") == 401
        assert session.get(f"{base}/buckets", timeout=60).status_code != 200
        assert login(password) == 204
        found = session.get(f"{base}/buckets", timeout=60).json()["buckets"]
        assert [bucket["name"] for bucket in found] == ["jupyterlab"]
        assert session.get(f"{base}/buckets/jupyterlab/objects", timeout=60).status_code == 200
        assert session.get(f"{base}/buckets/mlflow/objects", timeout=60).status_code == 403
        made = session.post(f"{base}/buckets", json={"name": "platform-test"}, timeout=60)
        assert made.status_code == 403


def test_nobody_writes_to_the_store_in_another_name(platform: Platform) -> None:
    """The authentication holes of the last upstream source are closed in what runs here."""
    address = platform.machine["hosts"][platform.host_of("minio")]
    holes = [sys.executable, str(ROOT / "molecule/minio/tests/holes.py")]
    done = subprocess.run(
        [*holes, "--url", f"https://{address}:9000", "--ca", platform.ca],
        env={
            **os.environ,
            "ODSP_HOLES_ACCESS_KEY": "jupyterlab",
            "ODSP_HOLES_SECRET_KEY": platform.secrets["vault_jupyterlab_s3_secret_key"],
            "ODSP_HOLES_BUCKET": "jupyterlab",
        },
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_cell(platform: Platform, code: str) -> str:
    """Run a cell in a kernel, through the door and its WebSocket, as a browser does."""
    with requests.Session() as session:
        # Else a variable of the environment outranks the authority given here.
        session.trust_env = False
        session.auth, session.verify = platform.user, platform.ca
        return run_cell_in(session, platform, code)


def run_cell_in(session: requests.Session, platform: Platform, code: str) -> str:
    """Run a cell with the cookies of a browser's session."""
    base = f"{platform.door}/jupyter/"
    session.get(f"{base}lab", timeout=60).raise_for_status()
    session.headers["X-XSRFToken"] = session.cookies["_xsrf"]
    made = session.post(f"{base}api/kernels", json={}, timeout=60)
    made.raise_for_status()
    kernel = made.json()["id"]
    basic = base64.b64encode(":".join(platform.user).encode()).decode()
    cookies = "; ".join(f"{c.name}={c.value}" for c in session.cookies)
    channel = websocket.create_connection(
        f"{base.replace('https', 'wss', 1)}api/kernels/{kernel}/channels",
        timeout=120,
        header={"Authorization": f"Basic {basic}"},
        cookie=cookies,
        origin=platform.door,
        sslopt={"ca_certs": platform.ca},
    )
    request = uuid.uuid4().hex
    header = {"msg_id": request, "session": uuid.uuid4().hex, "username": "", "version": "5.3"}
    content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
    printed: list[str] = []
    try:
        channel.send(
            json.dumps(
                {
                    "header": {**header, "msg_type": "execute_request"},
                    "parent_header": {},
                    "metadata": {},
                    "channel": "shell",
                    "content": content,
                }
            )
        )
        while True:
            answer = json.loads(channel.recv())
            if answer["parent_header"].get("msg_id") != request:
                continue
            kind, said = answer["header"]["msg_type"], answer["content"]
            if kind == "stream" and said["name"] == "stdout":
                printed.append(said["text"])
            elif kind == "error":
                pytest.fail("\n".join(said["traceback"]))
            elif kind == "status" and said["execution_state"] == "idle":
                return "".join(printed)
    finally:
        channel.close()
        session.delete(f"{base}api/kernels/{kernel}", timeout=60)


CELL = """
import json, socket
import boto3, mlflow
from distributed import Client
with Client() as client:
    hosts = sorted(set(client.run(socket.gethostname).values()))
    answer = client.submit(lambda x: x + 1, 41).result(60)
mlflow.set_experiment("platform-test")
with mlflow.start_run() as run:
    mlflow.log_metric("answer", answer)
boto3.client("s3").put_object(Bucket="jupyterlab", Key="platform-test", Body=b"cell")
boto3.client("s3").delete_object(Bucket="jupyterlab", Key="platform-test")
print(json.dumps({"hosts": hosts, "answer": answer, "user": run.data.tags["mlflow.user"]}))
mlflow.delete_run(run.info.run_id)
"""


def test_notebook_finds_everything_without_an_argument(platform: Platform) -> None:
    """`Client()`, `mlflow.start_run()` and `boto3.client("s3")` work in a new notebook."""
    found = json.loads(run_cell(platform, CELL).splitlines()[-1])
    groups = yaml.safe_load((platform.path / "inventories/local/hosts.yml").read_text())
    assert found["answer"] == 42
    assert found["hosts"] == sorted(groups["dask_worker"]["hosts"])


@pytest.mark.parametrize("unit", READY)
def test_proof_names_the_unit_that_is_down(platform: Platform, unit: str) -> None:
    """Whatever stops, `make verify` fails and names it with its host."""
    host, service = platform.host_of(unit), f"odsp-{unit}.service"
    platform.on(host, "systemctl", "stop", service)
    try:
        status, output = platform.run("make", "verify")
    finally:
        platform.on(host, "systemctl", "start", service)
        platform.wait(host, READY[unit])
    verdict = platform.verdict
    assert status != 0
    assert verdict["ok"] is False
    assert (verdict["failure"]["unit"], verdict["failure"]["host"]) == (service, host)
    assert service in output
    assert host in output


def test_proof_holds_again(platform: Platform) -> None:
    """Once all units are back, so is the platform, without any repair."""
    platform.succeed("make", "verify")
    assert platform.verdict["ok"] is True


def test_third_worker_host_joins(platform: Platform) -> None:
    """One line in the inventory and `site.yml --limit`: the proof counts on it."""
    inventory = platform.path / "inventories/local/hosts.yml"
    line = "    compute-3: {dask_worker_processes: 1, dask_worker_memory_limit: 1GiB}\n"
    text = re.sub(r"(?m)^(    compute-2: .*\n)", rf"\1{line}", inventory.read_text())
    assert text.count("compute-3") == 1
    inventory.write_text(text)
    platform.succeed("make", "hosts")
    platform.playbook("site.yml", "--limit", "compute-3")
    platform.succeed("make", "verify")
    found = json.loads(run_cell(platform, CELL).splitlines()[-1])
    assert "compute-3" in found["hosts"]


def test_make_down_leaves_nothing(platform: Platform) -> None:
    """No container and no network of this checkout remains."""
    name = platform.machine["platform"]
    platform.succeed("make", "down")
    platform.is_up = False
    assert name not in platform.podman("ps", "--all", "--format", "{{.Names}}")
    assert name not in platform.podman("network", "ls", "--format", "{{.Name}}")
