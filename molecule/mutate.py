"""Breaks a role on purpose and asks whether its scenario notices: `make mutate ROLE=postgres`.

Works on a copy of the checkout and on hosts of its own. Each entry of molecule/<role>/mutations.yml
is applied to the copy and converged; one of the tests it names must turn red. Then it is taken
back. At the end the tests that turned red must all be green again: it was the mutations, nothing
else. The results are kept in docs/mutations.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import run
import yaml

RESULTS = run.ROOT / "docs/mutations.json"
#: Words of `caught_by` that are steps of the sequence, not tests.
STEPS = ("converge", "idempotence", "check")
_ending = threading.Event()


@dataclass
class Result:
    """What became of one mutation."""

    role: str
    name: str
    caught_by: str
    seconds: int
    release: str
    date: str
    verdict: str


class Bench:
    """A copy of the checkout, and the converged hosts of one scenario."""

    def __init__(self, folder: Path, role: str, release: str) -> None:
        """Copy what a clone would hold."""
        self.root, self.role, self.release = folder / "checkout", role, release
        self.report, self.log = folder / "report.xml", run.WORK / "log" / f"mutate-{role}.log"
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=run.ROOT, check=True, stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip
        for name in (name for name in listed.split("\0") if (run.ROOT / name).is_file()):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(run.ROOT / name, self.root / name, follow_symlinks=False)
        for venv in (".venv", ".venv-test"):
            (self.root / venv).symlink_to(run.ROOT / venv)
        # Molecule looks for its base configuration from the root of a repository.
        subprocess.run(["git", "init", "--quiet"], cwd=self.root, check=True)

    def molecule(self, step: str, tests: list[str] | None = None) -> bool:
        """Run a step of the scenario; return whether it succeeded."""
        self.report.unlink(missing_ok=True)
        chosen = f" -k '{' or '.join(tests)}'" if tests else ""
        options = f"--junit-xml={self.report}{chosen}"
        own = run.settings(self.root, self.root / ".ansible/state", self.release, options)
        own["ODSP_LONG_TESTS"] = "1"
        command = ["molecule", step, "--scenario-name", self.role]
        status, output = run.run(command, cwd=self.root, extra=own)
        with self.log.open("a") as file:
            file.write(f"\n### {step} {tests or ''}: {status}\n{output}")
        return status == 0

    def red(self, tests: list[str]) -> list[str]:
        """Run tests; return those that are red, or what else went wrong."""
        if self.molecule("verify", tests):
            return []
        if not self.report.exists():
            raise RuntimeError("the tests did not run")
        return sorted(
            {
                str(case.get("name")).split("[")[0]
                for case in ET.parse(self.report).iter("testcase")
                if case.find("failure") is not None or case.find("error") is not None
            }
        )

    def caught_by(self, expected: list[str]) -> list[str]:
        """Return which of the steps and tests turn red on the mutated role."""
        if not self.molecule("converge"):
            return ["converge"] if "converge" in expected else []
        red = [s for s in STEPS[1:] if s in expected and not self.molecule(s)]
        tests = [name for name in expected if name not in STEPS]
        return red or (self.red(tests) if tests else [])

    def attempt(self, mutation: dict[str, Any]) -> list[str]:
        """Apply a mutation, look who notices, take it back; return who it was."""
        file, expected = self.root / mutation["file"], list(mutation["caught_by"])
        sound = file.read_text()
        assert sound.count(mutation["find"]) == 1, f"{mutation['file']}: {mutation['find']}"
        file.write_text(sound.replace(mutation["find"], mutation["replace"]))
        try:
            return [name for name in self.caught_by(expected) if name in expected]
        finally:
            file.write_text(sound)
            if not (_ending.is_set() or self.molecule("converge")):
                raise RuntimeError("the role as it is no longer converges")

    def still_red(self, results: list[Result]) -> list[str]:
        """Return the tests that noticed a mutation and are red without it, too."""
        named = {name for one in results for name in one.caught_by.split(", ")}
        tests = sorted(named.difference(STEPS, [""]))
        try:
            return self.red(tests) if tests else []
        except RuntimeError:
            return tests


def keep(results: list[Result]) -> None:
    """Replace what was known of these mutations; forget those that no file names any more."""
    named = {(r, m["name"]) for r, all_ in mutations().items() for m in all_}
    with run.alone(run.WORK / "log/mutations.lock"):
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        merged = {(one["role"], one["name"], one["release"]): one for one in known}
        merged |= {(one.role, one.name, one.release): asdict(one) for one in results}
        rows = [merged[key] for key in sorted(merged) if key[:2] in named]
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def mutations() -> dict[str, list[dict[str, Any]]]:
    """Return every role's mutations."""
    files = sorted(run.ROOT.glob("molecule/*/mutations.yml"))
    return {file.parent.name: yaml.safe_load(file.read_text()) for file in files}


def mutate(role: str, release: str, named: str) -> run.Score:
    """Try a role's mutations whose names match; one that nobody noticed counts as failed."""
    score, results, started = run.Score(), [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"odsp-mutate-{role}-") as folder:
        bench = Bench(Path(folder), role, release)
        bench.log.write_text("")
        try:
            good = bench.molecule("converge")
            run.say_result(good, started, f"{role}: hosts, and the role as it is")
            score.count(good, f"mutate {role}: the role as it is does not converge")
            chosen = [m for m in mutations()[role] if re.search(named, m["name"])]
            for mutation in chosen if good else []:
                began = time.monotonic()
                try:
                    who = ", ".join(bench.attempt(mutation))
                    verdict = "caught" if who else "not caught"
                except (AssertionError, RuntimeError) as failure:
                    verdict, who = f"could not be tried: {failure}", ""
                seconds = round(time.monotonic() - began)
                today = time.strftime("%Y-%m-%d")
                one = Result(role, mutation["name"], who, seconds, release, today, verdict)
                if _ending.is_set():
                    return score
                results.append(one)
                by = f"; red: {who}" if who else ""
                run.say_result(verdict == "caught", began, f"{role}: {one.name}: {verdict}{by}")
            red = bench.still_red(results)
            if _ending.is_set():
                return score
            for one in results:
                if set(red) & set(one.caught_by.split(", ")):
                    one.verdict = "caught, but not green again"
                score.count(one.verdict == "caught", f"mutate {role}: {one.name}: {one.verdict}")
            keep(results)
        finally:
            bench.molecule("destroy")
    return score


def end(number: int, _: object) -> None:
    """Stop what is being tried; every thread still removes its hosts."""
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, signal.SIG_IGN)
    _ending.set()
    for process in list(run.running):
        run.stop(process)
    raise SystemExit(128 + number)


def main() -> int:
    """Try the mutations of the named roles; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    roles = list(mutations())
    parser.add_argument("--role", action="append", choices=roles, help="default: all")
    parser.add_argument("--name", default="", help="only those whose names match")
    parser.add_argument("--release", choices=run.RELEASES, default="trixie")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    started, total = time.monotonic(), run.Score()
    run.install()
    with run.timed("mutate"):
        total.add(run.make_ready((given.release,)))
        if not total.failed:
            with ThreadPoolExecutor(run.jobs_by_memory()) as pool:
                chosen = given.role or roles
                for score in pool.map(lambda r: mutate(r, given.release, given.name), chosen):
                    total.add(score)
    run.say(f"\nall: {time.monotonic() - started:.0f} s")
    for failure in total.failures:
        run.say(f"FAILED {failure}")
    run.say(f"{total.passed} passed, {total.failed} failed")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
