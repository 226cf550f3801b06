"""Packages without a wheel: built by the real builder behind a socket, or by one that lies."""

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import SecretStr

from hosts import eventually
from model_server.builds import build_wheels
from model_server.environments import Environments
from model_server.errors import (
    BuilderUnavailableError,
    IndexUnavailableError,
    ModelNotLoadableError,
    ModelServerError,
    status_of,
)
from model_server.settings import Settings
from packages import put_sources, put_wheel, wheel, wheel_name

PROGRAM = Path(__file__).parents[2] / "roles/model_server/files/model_builder.py"
BESIDE = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
UV = shutil.which("uv", path=BESIDE) or "no uv"
EVIL = wheel_name("evil")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """The folder that stands for the index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    return folder


@pytest.fixture
def allowed(settings: Settings, wheels: Path) -> Settings:
    """Settings of a platform that allows builds, with the real uv."""
    return settings.model_copy(
        update={"uv": UV, "wheels_dir": wheels, "runner_units": True, "allow_source_builds": True}
    )


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "b.sock"


@contextmanager
def answering(address: Path, answer: Callable[[socket.socket], object]) -> Iterator[None]:
    """Listen as systemd does, and have one connection answered."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(address))
        listener.listen()
        asked = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                asked.append(listener.accept()[0])
            for connection in asked:
                with connection:
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            # Whoever has not asked yet does not ask any more.
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(60)
        assert asked
        assert not thread.is_alive()


def builder(scratch: Path) -> Callable[[socket.socket], object]:
    """The program of the unit, as the unit starts it."""
    scratch.mkdir()
    return lambda connection: subprocess.run(
        [sys.executable, "-I", str(PROGRAM), UV, str(scratch)],
        stdin=connection.fileno(),
        stdout=connection.fileno(),
        env={"PATH": os.defpath, "HOME": str(scratch), "TMPDIR": str(scratch)},
        check=False,
    )


def saying(*said: object, then: bytes = b"") -> Callable[[socket.socket], object]:
    """One that has its answer ready, whatever it is asked."""

    def answer(connection: socket.socket) -> None:
        connection.recv(2**16)
        # Who refuses it has not read all of it.
        with contextlib.suppress(OSError):
            for line in said:
                text = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
                connection.sendall(text)
            connection.sendall(then)

    return answer


def dripping(connection: socket.socket) -> None:
    """One that is never silent for long, and never comes to an end."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b" ")
            time.sleep(0.05)


class Pages(SimpleHTTPRequestHandler):
    """A folder's pages, without a log."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def index(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serve a folder with a folder for each package; its address, and what closes it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Pages, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def close() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    try:
        yield f"http://127.0.0.1:{server.server_port}", close
    finally:
        close()


def model(tmp_path: Path, *requirements: str) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "requirements.txt").write_text("\n".join(requirements))
    return folder


def install(settings: Settings, address: Path, files: Path) -> Path:
    environments = Environments(settings, builder=address)
    return environments.python_for(files, time.monotonic() + 60)


def says(python: Path, code: str) -> str:
    """What a program in the environment prints."""
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def left(settings: Settings) -> list[str]:
    """What lies beside environments, other than locks."""
    folder = settings.state_dir / "environments"
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_what_has_no_wheel_is_built_elsewhere_and_nothing_else(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    put_wheel(wheels, "light", "WEIGHT = 1")
    put_sources(wheels, "light", code="raise SystemExit('has a wheel')")
    put_sources(wheels, "sourced", "BUILT_IN = '<built in>'", requires="light")
    with answering(address, builder(tmp_path / "scratch")):
        python = install(allowed, address, model(tmp_path, "sourced"))
    built_in = says(python, "import light, sourced; print(sourced.BUILT_IN)")
    assert Path(built_in).is_relative_to(tmp_path / "scratch")
    assert left(allowed) == [python.parents[1].name]


def test_only_what_is_required_is_sent(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    put_sources(wheels, "tool")
    put_sources(wheels, "sourced", needs="tool")
    folder = tmp_path / "sent"
    folder.mkdir()
    with answering(address, builder(tmp_path / "scratch")):
        build_wheels(allowed, ["sourced"], [], folder, time.monotonic() + 60, builder=address)
    assert [path.name for path in folder.iterdir()] == [wheel_name("sourced")]


def test_what_was_built_is_kept_in_its_environment_only(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    """Each build has a folder of its own; a cache would keep all of them."""
    put_sources(wheels, "sourced")
    with answering(address, builder(tmp_path / "scratch")):
        python = install(allowed, address, model(tmp_path, "sourced"))
    kept = list(allowed.state_dir.rglob("sourced.py"))
    assert [path.is_relative_to(python.parents[1]) for path in kept] == [True]


def test_constraints_are_kept(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    put_sources(wheels, "sourced", "VERSION = 1")
    put_sources(wheels, "sourced", "VERSION = 2", version="2.0")
    files = model(tmp_path, "sourced")
    (files / "constraints.txt").write_text("sourced<2")
    with answering(address, builder(tmp_path / "scratch")):
        python = install(allowed, address, files)
    assert says(python, "import sourced; print(sourced.VERSION)") == "1"


def test_who_needs_no_build_asks_for_none(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    put_wheel(wheels, "light", "WEIGHT = 1")
    python = install(allowed, address, model(tmp_path, "light"))
    assert says(python, "import light; print(light.WEIGHT)") == "1"


@pytest.mark.parametrize(
    ("units", "variable"),
    [(True, "model_server_allow_source_builds"), (False, "MODEL_SERVER_ALLOW_SOURCE_BUILDS")],
)
def test_a_build_that_is_not_allowed_is_refused_with_what_would_allow_it(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path, units: bool, variable: str
) -> None:
    put_sources(wheels, "sourced", code=f"open({str(tmp_path / 'ran')!r}, 'w')")
    refusing = allowed.model_copy(update={"allow_source_builds": False, "runner_units": units})
    with pytest.raises(ModelNotLoadableError) as raised:
        install(refusing, address, model(tmp_path, "sourced"))
    assert "requirements (sourced) cannot be installed" in str(raised.value)
    assert f"without building what has no wheel, which {variable} would allow." in str(raised.value)
    assert not (tmp_path / "ran").exists()
    assert left(refusing) == []


def test_alone_builds_are_done_by_the_server_itself(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    put_sources(wheels, "sourced", "BUILT_IN = '<built in>'")
    alone = allowed.model_copy(update={"runner_units": False})
    python = install(alone, address, model(tmp_path, "sourced"))
    assert says(python, "import sourced; print(sourced.BUILT_IN)")


@pytest.mark.parametrize(
    ("requirements", "words"),
    [
        (["no-such-package"], r"\(no-such-package\) cannot be installed"),
        (["sourced==2"], r"\(sourced\) cannot be installed"),
        ([f"sourced==1.0 --hash=sha256:{'0' * 64}"], "what has hashes is never built"),
    ],
    ids=["no package", "no version", "hash"],
)
def test_what_no_build_can_mend_asks_for_none(
    allowed: Settings,
    wheels: Path,
    address: Path,
    tmp_path: Path,
    requirements: list[str],
    words: str,
) -> None:
    put_sources(wheels, "sourced")
    with pytest.raises(ModelNotLoadableError, match=words) as raised:
        install(allowed, address, model(tmp_path, *requirements))
    assert "allow" not in str(raised.value)


def test_a_build_that_fails_says_why(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    put_sources(wheels, "sourced", code=r"sys.exit('\x1b[2Jno compiler here')")
    with (
        answering(address, builder(tmp_path / "scratch")),
        pytest.raises(ModelNotLoadableError) as raised,
    ):
        install(allowed, address, model(tmp_path, "sourced"))
    assert "requirements (sourced) cannot be built" in str(raised.value)
    assert "no compiler here" in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert left(allowed) == []


@pytest.mark.parametrize("units", [True, False], ids=["unit", "alone"])
@pytest.mark.parametrize(
    "printed",
    [
        "error: Failed to fetch: `sourced`",
        "error: No space left on device (os error 28)",
        "hint: because building from source is disabled",
    ],
)
def test_what_a_package_prints_is_no_fault_of_the_host(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path, printed: str, units: bool
) -> None:
    """Neither of the index nor of the disk: else, whoever publishes it chose the answer."""
    put_sources(wheels, "sourced", code=f"sys.exit({printed!r})")
    settings = allowed.model_copy(update={"runner_units": units})
    answer = answering(address, builder(tmp_path / "scratch"))
    with answer if units else contextlib.nullcontext(), pytest.raises(ModelServerError) as raised:
        install(settings, address, model(tmp_path, "sourced"))
    assert status_of(raised.value) == 422
    assert "requirements (sourced) cannot be built" in str(raised.value)
    assert printed in str(raised.value)


def test_an_index_that_leaves_during_a_build_is_no_fault_of_the_model(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    (wheels / "sourced").mkdir()
    put_sources(wheels / "sourced", "sourced")
    with index(wheels) as (url, close):
        settings = allowed.model_copy(update={"wheels_dir": None, "index_url": SecretStr(url)})

        def leaves(connection: socket.socket) -> None:
            close()
            saying({"error": "whatever a build says"})(connection)

        with (
            answering(address, leaves),
            pytest.raises(IndexUnavailableError, match="package index does not answer"),
        ):
            install(settings, address, model(tmp_path, "sourced"))


def test_a_build_ends_with_its_caller(wheels: Path, tmp_path: Path) -> None:
    put_sources(wheels, "sourced", code=f"open({str(tmp_path / 'runs')!r}, 'w'); time.sleep(600)")
    request = {
        "requirements": ["sourced"],
        "constraints": [],
        "index_url": None,
        "wheels_dir": str(wheels),
    }
    ours, theirs = socket.socketpair()
    (tmp_path / "scratch").mkdir()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM), UV, str(tmp_path / "scratch")],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            env={"PATH": os.defpath, "HOME": str(tmp_path)},
            start_new_session=True,
        )
    try:
        with ours:
            ours.sendall(json.dumps(request).encode() + b"\n")
            eventually((tmp_path / "runs").exists)
        assert process.wait(60) == 0
    finally:
        # What it leaves behind, the unit ends.
        os.killpg(process.pid, 9)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/etc/cron.d/evil", "'/etc/cron.d/evil'"),
        ("../evil-1.0-py3-none-any.whl", "'../evil-1.0-py3-none-any.whl'"),
        ("a/evil-1.0-py3-none-any.whl", "which is no wheel"),
        ("..", "which is no wheel"),
        ("evil.pth", "which is no wheel"),
        ("evil-1.0-py3-none-any.whl\n", "which is no wheel"),
        (".evil-1.0-py3-none-any.whl", "which is no wheel"),
        (f"{'e' * 300}-1.0-py3-none-any.whl", "which is no wheel"),
        ("evil-1.0-py3-none-any.whl\0", "which is no wheel"),
    ],
)
def test_a_file_that_is_no_wheel_is_refused(
    allowed: Settings, address: Path, tmp_path: Path, name: str, told: str
) -> None:
    folder = tmp_path / "built"
    folder.mkdir()
    before = sorted(tmp_path.rglob("*"))
    said = saying({"wheels": [{"name": name, "size": 1}]}, then=b"x")
    with answering(address, said), pytest.raises(ModelNotLoadableError) as raised:
        build_wheels(allowed, [], [], folder, time.monotonic() + 30, builder=address)
    assert "odsp-model_builder sent the file" in str(raised.value)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted({*tmp_path.rglob("*")} - {address}) == before


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"wheels": [{"name": EVIL, "size": -1}]}, "with -1 bytes"),
        ({"wheels": [{"name": EVIL, "size": 2**40}]}, f"wheels of {2**40} bytes"),
        (
            {"wheels": [{"name": f"e{n}-1-py3-a-b.whl", "size": 1} for n in range(999)]},
            "999 wheels",
        ),
        ({"wheels": [{"name": EVIL, "size": 1}, {"name": EVIL, "size": 1}]}, "a wheel twice"),
        ({"wheels": [{"name": EVIL}]}, "what is no answer"),
        ({"wheels": [{"name": EVIL, "size": "1"}]}, "what is no answer"),
        ([1], "what is no answer"),
        (b"\xff\n", "what is no answer"),
        (b"[" * 10_000 + b"\n", "what is no answer"),
        (b" " * 2**19, "a line without an end"),
    ],
    ids=str,
)
def test_an_answer_beyond_all_bounds_is_refused(
    allowed: Settings, address: Path, tmp_path: Path, said: object, told: str
) -> None:
    with answering(address, saying(said)), pytest.raises(ModelNotLoadableError, match=told):
        build_wheels(allowed, [], [], tmp_path / "x", time.monotonic() + 30, builder=address)


@pytest.mark.parametrize("size", [0, 500])
def test_a_builder_that_dies_is_perhaps_the_models_fault(
    allowed: Settings, address: Path, tmp_path: Path, size: int
) -> None:
    said = [{"wheels": [{"name": EVIL, "size": 1000}]}] if size else []
    with (
        answering(address, saying(*said, then=b"x" * size)),
        pytest.raises(ModelNotLoadableError, match="ended, perhaps for want of memory, before"),
    ):
        build_wheels(allowed, [], [], tmp_path, time.monotonic() + 30, builder=address)


def test_a_builder_that_is_away_is_not_the_models_fault(
    allowed: Settings, address: Path, tmp_path: Path
) -> None:
    with pytest.raises(BuilderUnavailableError, match=r"No such file .*: see journalctl --unit"):
        build_wheels(allowed, [], [], tmp_path, time.monotonic() + 30, builder=address)


def test_a_builder_that_never_read_the_request_is_not_the_models_fault(
    allowed: Settings, address: Path, tmp_path: Path
) -> None:
    """As of a unit that cannot start: systemd closes the connection, with the request in it."""

    def close(connection: socket.socket) -> None:
        connection.recv(1)

    with (
        answering(address, close),
        pytest.raises(BuilderUnavailableError, match=r"reset by peer\): see journalctl --unit"),
    ):
        build_wheels(allowed, [], [], tmp_path, time.monotonic() + 30, builder=address)


def test_a_request_of_any_length_is_read(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    """Else, a model with many requirements would be told as a builder that does not answer."""
    put_sources(wheels, "sourced")
    folder = tmp_path / "sent"
    folder.mkdir()
    long = ["sourced" + " " * 2**21]
    with answering(address, builder(tmp_path / "scratch")):
        build_wheels(allowed, long, [], folder, time.monotonic() + 60, builder=address)
    assert [path.name for path in folder.iterdir()] == [wheel_name("sourced")]


def test_the_deadline_holds_for_one_that_drips(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    put_sources(wheels, "sourced")
    files = model(tmp_path, "sourced")
    began = time.monotonic()
    with answering(address, dripping), pytest.raises(ModelServerError, match="could not be inst"):
        Environments(allowed, builder=address).python_for(files, began + 6)
    # Without the deadline it would be for ever.
    assert time.monotonic() - began < 60
    assert left(allowed) == []


def test_no_more_is_read_than_was_announced(
    allowed: Settings, address: Path, tmp_path: Path
) -> None:
    said = saying({"wheels": [{"name": EVIL, "size": 3}]}, then=b"abcdef")
    with answering(address, said):
        build_wheels(allowed, [], [], tmp_path, time.monotonic() + 30, builder=address)
    assert (tmp_path / EVIL).read_bytes() == b"abc"


def test_a_wheel_reaches_no_file_outside_its_environment(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    """It is uv that unpacks it, as it does all others."""
    put_sources(wheels, "evil")
    target = tmp_path / "target"
    ways = [f"{'../' * 30}{target}", str(target), f"evil-1.0.data/data/{'../' * 30}{target}"]
    for requirement, way in zip(("evil", "evil==1.0", "evil>=1.0"), ways, strict=True):
        content = wheel("evil", more={way: "evil"})
        folder = tmp_path / requirement
        folder.mkdir()
        said = saying({"wheels": [{"name": EVIL, "size": len(content)}]}, then=content)
        with answering(folder / "b.sock", said), contextlib.suppress(ModelNotLoadableError):
            install(allowed, folder / "b.sock", model(folder, requirement))
        assert not target.exists(), way


def test_a_wheel_that_unpacks_to_more_than_it_says_is_refused(
    allowed: Settings, wheels: Path, address: Path, tmp_path: Path
) -> None:
    """Again by uv, which leaves none of it."""
    put_sources(wheels, "evil")
    size = 54_321
    content, sizes = wheel("evil", "#" * size), struct.pack("<2I", size, size)
    assert content.count(sizes) == 2
    content = content.replace(sizes, struct.pack("<2I", size, 1))
    said = saying({"wheels": [{"name": EVIL, "size": len(content)}]}, then=content)
    with (
        answering(address, said),
        pytest.raises(ModelNotLoadableError, match=r"\(evil\) cannot be installed"),
    ):
        install(allowed, address, model(tmp_path, "evil"))
    assert left(allowed) == []
