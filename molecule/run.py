"""Runs the project's tests, tier by tier: lint, unit, contract, platform, molecule.

Installs what they need into .venv-test from a lock with hashes, prints each tier's name, where it
is and its seconds, and closes with `N passed, N failed`. Exits with 0 only if nothing failed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "molecule/_shared"))
import playbook  # noqa: E402

VENV = ROOT / ".venv-test"
LOCK = ROOT / ".config/requirements/test.txt"
#: The whole wiring elsewhere than in inventories/local; by default with `make test-all` alone.
TOPOLOGIES = ("platform_spread", "platform_partial", "platform_single")
#: Where scenarios keep their hosts' state, and the logs of everything; not part of the repository.
WORK = ROOT / ".ansible/molecule"
#: What the tests of faults measured, kept for docs/reliability.md.
MEASURED = ROOT / "docs/reliability.json"
RELEASES = ("bookworm", "trixie")
#: Every role alone, longest first, so that none is left alone at the end.
SCENARIOS = (
    "model_server",
    "mlflow",
    "nginx",
    "jupyterlab",
    "dask_worker",
    "dask_scheduler",
    "minio",
    "postgres",
    "python_service",
    "certificates",
    "base",
)
#: Tiers that make hosts.
HOSTS_NEEDED = ("platform", "molecule", "random")
#: Memory that a scenario's hosts take while it runs (MiB).
SCENARIO_MIB = 4096
#: With more at a time, limits of time in tests would ask for the machine's speed.
MOST_SCENARIOS = 3
#: A scenario that takes longer hangs (seconds).
SCENARIO_LIMIT_S = 1800
#: Silence after which a long step says that it still works (seconds).
HEARTBEAT_S = 30
#: What is shown of the components' journal where a test failed, and how journalctl is asked for it:
#: their own mistakes may have been told long before the end.
SHOWN = {
    "errors": ["--lines=20", r'--grep="level": "(error|critical)"|Traceback|CRITICAL'],
    "last words": ["--lines=60"],
}
STEP = re.compile(r"> (\w+)\] (Executing$|Executed: (\w+))")
ANSI = re.compile(r"\x1b(\[[0-9;]*m|\][^\x1b]*\x1b\\)")

running: set[subprocess.Popen[str]] = set()

_print_lock = threading.Lock()


@dataclass
class Score:
    """What a tier found."""

    passed: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Score) -> None:
        """Count another score in."""
        self.passed += other.passed
        self.failed += other.failed
        self.failures += other.failures

    def count(self, good: bool, name: str) -> None:
        """Count one test."""
        if good:
            self.passed += 1
        else:
            self.failed += 1
            self.failures.append(name)


def say(text: str) -> None:
    """Print one line at once, whole."""
    with _print_lock:
        print(text, flush=True)


def say_result(good: bool, started: float, name: str) -> None:
    """Say what a step came to, and its seconds."""
    say(f"   {'ok  ' if good else 'FAIL'} {time.monotonic() - started:4.0f} s  {name}")


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Announce a tier and say afterwards what it took."""
    started = time.monotonic()
    say(f"\n== {name}")
    try:
        yield
    finally:
        say(f"== {name}: {time.monotonic() - started:.0f} s")


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of every tool: .venv-test first, this checkout's configuration."""
    return {
        **os.environ,
        "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "YAMLLINT_CONFIG_FILE": str(ROOT / ".config/yamllint.yml"),
        **extra,
    }


def spawn(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    """Start a program in a process group of its own, so that nothing of it outlives us."""
    process = subprocess.Popen(
        command, cwd=cwd, env=env, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    running.add(process)
    return process


def stop(process: subprocess.Popen[str], sign: int = signal.SIGTERM) -> None:
    """End a program with everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, sign)


def run(
    command: list[str],
    *,
    cwd: Path = ROOT,
    show: str = "",
    extra: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Run a program; return its status and output, each line printed after the word `show`."""
    process = spawn(command, cwd, environment(**(extra or {})))
    assert process.stdout is not None
    name = "pytest" if "pytest" in command else Path(command[0]).name
    started, lines = time.monotonic(), []
    spoke, done = started, threading.Event()

    def heartbeat() -> None:
        while not done.wait(1):
            nonlocal spoke
            if time.monotonic() - spoke > HEARTBEAT_S:
                spoke = time.monotonic()
                say(f"{show:<8} {spoke - started:4.0f} s  {name} is at work")

    threading.Thread(target=heartbeat, daemon=True).start()
    try:
        for line in process.stdout:
            lines.append(line)
            if show:
                spoke = time.monotonic()
                say(f"{show:<8} {line.rstrip()}")
        return process.wait(), "".join(lines)
    finally:
        done.set()
        running.discard(process)


def install() -> None:
    """Make .venv-test as its lock says, unless it is."""
    digest, marker = hashlib.sha256(LOCK.read_bytes()).hexdigest(), VENV / "odsp-lock"
    if marker.exists() and marker.read_text() == digest and (VENV / "bin/pytest").exists():
        return
    say("installing the tests' tools into .venv-test")
    uv = ROOT / ".venv/bin/uv"
    if not uv.exists():
        subprocess.run([ROOT / "playbooks/local/bootstrap.sh", "--python-only"], check=True)
    shutil.rmtree(VENV, ignore_errors=True)
    env = {
        "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
        "UV_DEFAULT_INDEX": os.environ.get("PIP_INDEX_URL", ""),
        **os.environ,
    }
    commands: tuple[list[str | Path], ...] = (
        [uv, "venv", "--quiet", "--python", sys.executable, VENV],
        [uv, "pip", "sync", "--quiet", "--require-hashes", "--python", VENV / "bin/python", LOCK],
    )
    for command in commands:
        subprocess.run(command, check=True, env=env, cwd=ROOT, stdin=subprocess.DEVNULL)
    marker.write_text(digest)


def tracked(*suffixes: str) -> list[str]:
    """Return the repository's files with these endings, each once even if links lead to it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    names = sorted(name for name in listed.split("\0") if name.endswith(suffixes))
    files = [name for name in names if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]
    if not files:
        raise SystemExit(f"no file ends in {' or '.join(suffixes)}: wrong folder?")
    return files


def rendered_scripts(folder: Path) -> list[str]:
    """Write the shell templates with every expression replaced by 1; return the files."""
    files = []
    for name in tracked(".sh.j2"):
        text = re.sub(r"\{%.*?%\}", "", (ROOT / name).read_text(), flags=re.DOTALL)
        text = re.sub(r"\{\{.*?\}\}", "1", text, flags=re.DOTALL)
        target = folder / name.replace("/", "__").removesuffix(".j2")
        target.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}")
        files.append(str(target))
    return files


def lint() -> Score:
    """Every linter over everything it understands; each counts as one test."""
    score = Score()
    own = [name for name in tracked(".py") if not name.startswith("model_server/")]
    scripts = [*tracked(".sh"), ".ci/run"]
    package = ROOT / "model_server"
    with tempfile.TemporaryDirectory() as folder:
        templates = rendered_scripts(Path(folder))
        checks: list[tuple[str, list[str], Path]] = [
            ("yamllint", ["yamllint", "--strict", "."], ROOT),
            ("ruff", ["ruff", "check", "--config", ".config/ruff.toml", *own], ROOT),
            ("ruff: model_server", ["ruff", "check", "."], package),
            ("mypy", ["mypy", "--config-file", ".config/mypy.ini", *own], ROOT),
            ("mypy: model_server", ["mypy"], package),
            ("shellcheck", ["shellcheck", *scripts], ROOT),
            # 1 in place of a template's expression looks like a constant (SC2043, SC2050).
            ("shellcheck: templates", ["shellcheck", "--exclude=SC2043,SC2050", *templates], ROOT),
            ("ansible-lint", ["ansible-lint", "-c", ".config/ansible-lint.yml"], ROOT),
        ]
        for name, command, cwd in checks:
            started = time.monotonic()
            status, output = run(command, cwd=cwd, extra={"NO_COLOR": "1"})
            say_result(status == 0, started, name)
            if status:
                say(output.rstrip())
            score.count(status == 0, f"lint: {name}")
    return score


def pytest(tier: str, *arguments: str, cwd: Path = ROOT) -> Score:
    """Run pytest, shown as it goes; return its counts."""
    report = WORK / "log" / f"{tier}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    status, _ = run(
        [str(VENV / "bin/python"), "-m", "pytest", f"--junit-xml={report}", *arguments],
        cwd=cwd, show=tier,
    )  # fmt: skip
    score = read_report(report)
    if status and not score.failed:
        score.count(False, f"{tier}: pytest ended with status {status}")
    return score


def read_report(report: Path) -> Score:
    """Return what a JUnit report counts, if there is one; a skipped test proved nothing."""
    score = Score()
    if report.exists():
        for case in ET.parse(report).iter("testcase"):
            bad = any(case.find(word) is not None for word in ("failure", "error", "skipped"))
            score.count(not bad, f"{case.get('classname')}::{case.get('name')}")
    return score


def unit() -> Score:
    """The model server's own tests, in a process for each core, and what part of it they reach."""
    processes = ["-n", str(os.cpu_count() or 1), "--dist", "loadfile"]
    return pytest("unit", "-q", *processes, "--cov", cwd=ROOT / "model_server")


def contract() -> Score:
    """The repository's promises to itself."""
    return pytest("contract", "-q", "molecule/contract/tests")


def platform() -> Score:
    """The whole platform on fresh hosts, as a newcomer makes it."""
    return pytest("platform", "-q", "-s", "molecule/platform/tests")


def available_mib() -> int:
    """Return the memory that new hosts may take."""
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) // 1024  # type: ignore[index]


def journal(machine: Path) -> str:
    """Return the components' errors on a scenario's hosts, and their last words."""
    known, text = json.loads(machine.read_text()), ""
    sudo = [] if os.getuid() == 0 else ["sudo", "--preserve-env=CONTAINERS_CONF"]
    for host in known["hosts"]:
        inside = ["podman", "exec", f"{known['platform']}-{host}", "journalctl", "--no-pager"]
        for what, chosen in SHOWN.items():
            _, said = run(
                [*sudo, *inside, "--quiet", "--output=cat", "--unit=odsp-*", *chosen],
                extra={"CONTAINERS_CONF": str(machine.parent / "containers.conf")},
            )
            text += f"--- {host}: {what} of its components\n{said}"
    return text


def settings(root: Path, state: Path, release: str, pytest_options: str) -> dict[str, str]:
    """Return what molecule is told by its environment: which checkout, state, release and tests."""
    return {
        "ODSP_DEBIAN_RELEASE": release,
        # Short, for it is part of the paths of sockets.
        "ODSP_RUN": hashlib.sha256(str(state).encode()).hexdigest()[:8],
        "ANSIBLE_CONFIG": str(root / "ansible.cfg"),
        "MOLECULE_EPHEMERAL_DIRECTORY": str(state),
        "MOLECULE_PROJECT_DIRECTORY": str(root),
        "MOLECULE_COMMAND_BORDERS": "0",
        "PYTEST_ADDOPTS": pytest_options,
        "PYTHONUNBUFFERED": "1",
        "ANSIBLE_FORCE_COLOR": "0",
        "NO_COLOR": "1",
    }


def record(reports: dict[tuple[str, str], Path]) -> None:
    """Keep what the tests of faults measured, for docs/reliability.py; older figures stay."""
    key = ("scenario", "test", "release")
    kept = {tuple(m[k] for k in key): m for m in json.loads(MEASURED.read_text())}
    for (name, release), report in reports.items():
        if not report.exists():
            continue
        kept = {k: m for k, m in kept.items() if (m["scenario"], m["release"]) != (name, release)}
        for case in ET.parse(report).iter("testcase"):
            told = [(p.get("name"), p.get("value") or "") for p in case.iter("property")]
            kind = dict(told).get("fault")
            if kind and case.find("failure") is None and case.find("error") is None:
                # Less the host, which testinfra makes a parameter.
                test = re.sub(r"ansible://\w+-\d+-?", "", str(case.get("name"))).replace("[]", "")
                one = {
                    "scenario": name, "test": test, "kind": kind, "release": release,
                    "measured": "; ".join(dict.fromkeys(v for n, v in told if n == "measured")),
                    "date": time.strftime("%Y-%m-%d"),
                }  # fmt: skip
                kept[name, test, release] = one
    MEASURED.write_text(json.dumps([kept[k] for k in sorted(kept)], indent=1) + "\n")


@dataclass
class Steps:
    """Follows what molecule says of a scenario's steps, and counts them."""

    label: str
    score: Score = field(default_factory=Score)
    lines: list[str] = field(default_factory=list)
    #: The step at work, and those that ended.
    step: str = ""
    done: set[str] = field(default_factory=set)
    started: float = 0
    first_line: int = 0

    def hear(self, line: str) -> None:
        """Take one line of molecule's output."""
        self.lines.append(line)
        if not (found := STEP.search(line)):
            return
        if found[2] == "Executing":
            self.step, self.started = found[1], time.monotonic()
            self.first_line = len(self.lines)
        elif found[1] == self.step:
            self.end(found[3] != "Failed")

    def end(self, good: bool) -> None:
        """Count the step that ended; `verify` is counted test by test, elsewhere."""
        step, self.step = self.step, ""
        if step == "check" and "converge" in self.done:
            # Molecule itself asks only whether a dry run succeeds.
            good &= " changed=0" in (said := "".join(self.lines[self.first_line :]))
            good &= not re.search(r" changed=[1-9]", said)
        self.done.add(step)
        if step != "destroy":
            seconds = time.monotonic() - self.started
            say(f"   {self.label:<24} {step:<12} {seconds:4.0f} s{'' if good else '  FAILED'}")
        if step in ("converge", "idempotence", "check") or not (good or step == "verify"):
            self.score.count(good, f"{self.label}: {step}")


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Wait until no other run holds the file's lock, and hold it."""
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"   waiting for another run that holds {file}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def scenario(name: str, release: str) -> tuple[str, float, Score]:
    """Run one scenario on one release, once at a time; return its label, seconds and counts."""
    with alone(WORK / "log" / f"{name}-{release}.lock"):
        return run_scenario(name, release)


def run_scenario(name: str, release: str) -> tuple[str, float, Score]:
    """Take a scenario from no hosts to none; return its label, seconds and counts."""
    label, started = f"{name} {release}", time.monotonic()
    log, report = (WORK / "log" / f"{name}-{release}{suffix}" for suffix in (".log", ".xml"))
    report.unlink(missing_ok=True)
    state = WORK / f"{name}-{release}"
    own = settings(ROOT, state, release, f"--junit-xml={report}")
    remove = ["molecule", "destroy", "--scenario-name", name]
    if state.exists():  # an earlier run was cut off
        run(remove, extra=own)
    test = ["molecule", "test", "--destroy=never", "--scenario-name", name]
    process = spawn(test, ROOT, environment(**own))
    watch = threading.Timer(SCENARIO_LIMIT_S, stop, (process,))
    watch.start()
    steps = Steps(label)
    assert process.stdout is not None
    with log.open("w") as file:
        for raw in process.stdout:
            line = ANSI.sub("", raw)
            file.write(line)
            file.flush()
            steps.hear(line)
    status = process.wait()
    watch.cancel()
    running.discard(process)
    score, tests = steps.score, read_report(report)
    score.add(tests)
    if "prepare" in steps.done:
        secrets = playbook.told("".join(steps.lines), playbook.secrets(state / release))
        score.count(not secrets, f"{label}: the steps' output tells {secrets}")
    if status and not score.failed:
        score.count(False, f"{label}: {steps.step or 'molecule'} ended with status {status}")
    if not status and not tests.passed:
        score.count(False, f"{label}: no test ran")
    if score.failed:
        journals = "".join(journal(machine) for machine in state.glob("*/machine.json"))
        say(f"--- {label}: the last lines of {log}\n{''.join(steps.lines[-80:])}{journals}")
    status, output = run(remove, extra=own)
    if status:
        score.count(False, f"{label}: destroy")
        say(output)
    shutil.rmtree(state, ignore_errors=True)
    return label, time.monotonic() - started, score


def make_ready(releases: tuple[str, ...]) -> Score:
    """Make what every scenario shares, step by step: images and MinIO; count only a failure."""
    (WORK / "log").mkdir(parents=True, exist_ok=True)
    bootstrap, python = ROOT / "playbooks/local/bootstrap.sh", ROOT / ".venv/bin/python"
    as_root, image = "playbooks/local/as_root.sh", "playbooks/local/image.py"
    steps = [("what hosts in containers need", [str(bootstrap)])]
    steps += [(f"image of {r}", [as_root, str(python), image, r]) for r in releases]
    steps += [("MinIO's binary", [str(python), "roles/minio/files/build/build.py"])]
    score = Score()
    for name, command in steps:
        started = time.monotonic()
        status, output = run(command)
        say_result(status == 0, started, name)
        if status:
            say(output)
            score.count(False, f"molecule: {name}")
            break
    return score


def jobs_by_memory() -> int:
    """Return how many scenarios this machine carries at a time.

    One more than cores, as each waits for something half of its time.
    """
    return max(1, min(MOST_SCENARIOS, (os.cpu_count() or 1) + 1, available_mib() // SCENARIO_MIB))


def molecule(
    roles: tuple[str, ...], releases: tuple[str, ...], jobs: int, keep_figures: bool = False
) -> Score:
    """Every scenario on both releases; several at a time where memory allows."""
    score = make_ready(releases)
    if score.failed:
        return score
    jobs = jobs or jobs_by_memory()
    pairs = [(role, release) for role in roles for release in releases]
    say(f"   {len(pairs)} scenarios, {jobs} at a time")
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda pair: scenario(*pair), pairs))
    say("\n   seconds  passed  failed  scenario")
    for label, seconds, one in sorted(results, key=lambda result: -result[1]):
        say(f"   {seconds:7.0f}  {one.passed:6}  {one.failed:6}  {label}")
        score.add(one)
    if keep_figures:
        record({(n, r): WORK / "log" / f"{n}-{r}.xml" for n, r in pairs})
    return score


def random_topology(seed: int | None, releases: tuple[str, ...]) -> Score:
    """Draw a topology and prove the platform's wiring on it; the printed seed draws it again."""
    given = [] if seed is None else [str(seed)]
    command = [sys.executable, "molecule/platform/random_topology.py", *given]
    status, output = run(command)
    say(output.rstrip())
    score = Score()
    if status:
        score.count(False, "random: no topology could be drawn")
        return score
    drawn = int(re.findall(r"\d+", output)[0])
    return molecule(("platform_random",), (releases[drawn % len(releases)],), 1)


def end(number: int, _: object) -> None:
    """Stop everything we started; containers go with their scenarios' next `destroy`."""
    for process in list(running):
        stop(process)
    raise SystemExit(128 + number)


def main() -> int:
    """Run the named tiers, those with hosts beside others; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    tiers = ("lint", "unit", "contract", "platform", "molecule", "random")
    parser.add_argument("tiers", nargs="+", choices=tiers)
    parser.add_argument(
        "--role",
        action="append",
        choices=(*TOPOLOGIES, *SCENARIOS),
        help="of molecule; default: all, topologies with long tests only",
    )
    parser.add_argument("--release", action="append", choices=RELEASES, help="default: both")
    parser.add_argument(
        "--jobs", type=int, default=0, help="scenarios at a time; default: by memory"
    )
    parser.add_argument(
        "--record", action="store_true", help="keep what faults measured in docs/reliability.json"
    )
    parser.add_argument("--seed", type=int, help="of random; default: another each time")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    usual = (*TOPOLOGIES, *SCENARIOS) if "ODSP_LONG_TESTS" in os.environ else SCENARIOS
    roles, releases = tuple(given.role or usual), tuple(given.release or RELEASES)
    actions: dict[str, Callable[[], Score]] = {
        "lint": lint,
        "unit": unit,
        "contract": contract,
        "platform": platform,
        "molecule": lambda: molecule(roles, releases, given.jobs, given.record),
        "random": lambda: random_topology(given.seed, releases),
    }
    started, total = time.monotonic(), Score()
    install()

    def run_tiers(tiers: list[str]) -> list[Score]:
        """Run tiers one after the other, each counted by itself."""
        scores = []
        for tier in tiers:
            with timed(tier):
                scores.append(actions[tier]())
            say(f"== {tier}: {scores[-1].passed} passed, {scores[-1].failed} failed")
        return scores

    # The model server's tests have the machine to themselves; then the platform that comes up
    # leaves a core to what needs no hosts.
    first = [tier for tier in given.tiers if tier == "unit"]
    with_hosts = [tier for tier in given.tiers if tier in HOSTS_NEEDED]
    others = [tier for tier in given.tiers if tier not in (*first, *with_hosts)]
    results = run_tiers(first)
    with ThreadPoolExecutor() as pool:
        for scores in pool.map(run_tiers, (others, with_hosts)):
            results += scores
    for score in results:
        total.add(score)
    say(f"\nall: {time.monotonic() - started:.0f} s")
    for failure in total.failures:
        say(f"FAILED {failure}")
    say(f"{total.passed} passed, {total.failed} failed")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
