"""Measure the model server beside its peers: `python3 bench/serving/run.py`, about 20 minutes.

Builds its own environments with uv, trains into an MLflow server of its own, and writes
serving.md, serving.svg and serving.json. A system that cannot be measured does not end the run;
the report says why.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from bench.serving import behaviour, environments, load, report  # noqa: E402
from bench.serving.environments import CACHE, NotAvailableError  # noqa: E402
from bench.serving.load import CASES, Figures  # noqa: E402
from bench.serving.processes import Server, free_ports, running  # noqa: E402
from bench.serving.registry import Registry, registry  # noqa: E402
from bench.serving.report import Benchmark, Result  # noqa: E402
from bench.serving.systems import LIMIT, SYSTEMS, THREADS, Place, System  # noqa: E402
from bench.serving.wakeups import round_trip_us  # noqa: E402

MODELS = ("lr", "rf")
#: Load before a case is measured, and on the limit beside each system (seconds).
SHORT_S = 1
FAILURES = (
    *(NotAvailableError, OSError, HTTPException, ValueError, LookupError),
    subprocess.SubprocessError,
)


class Runner:
    """Starts one system after another, each with one model, and writes down what it sees."""

    def __init__(self, models: Registry, work: Path, programs: dict[str, Path]) -> None:
        self._models = models
        self._work = work
        self._programs = programs

    @contextmanager
    def start(self, system: System, model: str) -> Iterator[tuple[Server, Place]]:
        """A system that serves a model, until the end of the block."""
        place = Place(
            programs=self._programs[system.environment],
            folder=self._work / f"{system.name}-{model}",
            model=model,
            registry=self._models.url,
            models=self._models.models,
            ports=free_ports(3),
        )
        with running(system.run(place)) as server:
            system.wait(server, place, self._models.rows[:1])
            yield server, place

    def visit(
        self,
        system: System,
        model: str,
        seconds: float,
        result: Result,
        measure_limit: Callable[[str], dict[int, Figures]],
    ) -> None:
        """One round of a system with a model: its answers, every case, its memory."""
        limit = measure_limit(model)
        with self.start(system, model) as (server, place):
            self._check(system, place)
            for case in (case for case in CASES if case.model == model):
                self.measure(system, server, place, case, SHORT_S)
                figures = self.measure(system, server, place, case, seconds)
                result.figures.setdefault(case.name, []).append(figures)
                ratio = figures.rate / limit[case.connections].rate
                result.to_limit.setdefault(case.name, []).append(round(ratio, 4))
            if model == "lr":
                result.pss_mb.append(round(server.pss_bytes() / 1e6, 1))

    def measure(
        self, system: System, server: Server, place: Place, case: load.Case, seconds: float
    ) -> Figures:
        """One case."""
        body = place.folder / f"{case.name}.body"
        body.write_bytes(system.body(self._models.rows[: case.rows]))
        return load.measure(server, system.url(place), body, case.connections, seconds)

    def behave(self, system: System) -> dict[str, Any]:
        """What ODSP's server does beside being fast."""
        answers = self._models.answers
        seen: dict[str, Any] = {}
        with self.start(system, "lr") as (_, place):
            tests: dict[str, Callable[[], Any]] = {
                "one_truth": lambda: behaviour.one_truth(place, self._models.rows, answers["lr"]),
                "one_bad_caller": lambda: behaviour.one_bad_caller(
                    place, "rf", self._models.rows, answers["rf"]
                ),
                "alias_moves": lambda: behaviour.alias_moves(place, system, self._models),
            }
            for name, test in tests.items():
                try:
                    seen[name] = test()
                except FAILURES as error:
                    seen[name] = {"failure": _sentence(error)}
                say(f"{name}: {seen[name]}")
        return seen

    def profile(self, systems: Sequence[System], seconds: float) -> dict[str, Any]:
        """Where the time of a request goes: what a lone caller gets, also of one CPU, and why."""
        case, first, last = CASES[0], min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
        seen: dict[str, Any] = {
            "round_trip_us": {
                "two CPUs": round_trip_us(first, last),
                "one CPU": round_trip_us(last, last),
            },
            "rates": {},
        }
        for system in systems:
            with self.start(system, case.model) as (server, place):
                self.measure(system, server, place, case, SHORT_S)
                free = self.measure(system, server, place, case, seconds)
                server.run_on(last)
                self.measure(system, server, place, case, SHORT_S)
                kept = self.measure(system, server, place, case, seconds)
                seen["rates"][system.name] = {"free": free.rate, "on one CPU": kept.rate}
                if system.name == "odsp":
                    seen["parts_us"] = self._parts(place)
        return seen

    def _parts(self, place: Place) -> dict[str, dict[str, float]]:
        """Microseconds of the work in the model's process; by rows of a request, by part."""
        (python,) = (place.folder / "state/environments").glob("*/bin/python")
        rows = place.folder / "rows.json"
        rows.write_text(json.dumps(self._models.rows[:100]))
        model = place.models / f"{place.model}.joblib"
        told = subprocess.run(
            [python, "-W", "error", Path(__file__).with_name("parts.py"), model, rows],
            env={**os.environ, **THREADS},
            check=True,
            capture_output=True,
        )
        parts: dict[str, dict[str, float]] = json.loads(told.stdout)
        return parts

    def _check(self, system: System, place: Place) -> None:
        """Raise unless it predicts what scikit-learn predicts, row by row and all at once."""
        rows, answers = self._models.rows, self._models.answers[place.model]
        for start, stop in ((0, 1), (1, 2), (2, 3), (0, len(rows))):
            seen = system.predict(place, rows[start:stop])
            # Triton and MLServer may say 1.0.
            if [int(label) for label in seen] != answers[start:stop]:
                raise NotAvailableError(f"It predicts {seen[:9]}, not {answers[start:stop][:9]}.")


class Limit:
    """The bare server, running all the time; measured beside every system."""

    def __init__(self, runner: Runner, server: Server, place: Place, result: Result) -> None:
        self._runner = runner
        self._server = server
        self._place = place
        self._result = result

    def measure(self, model: str) -> dict[int, Figures]:
        """By number of connections."""
        seen = {}
        for case in CASES:
            if case.model == model and case.rows == 1:
                figures = self._runner.measure(LIMIT, self._server, self._place, case, SHORT_S)
                self._result.figures.setdefault(case.name, []).append(figures)
                seen[case.connections] = figures
        return seen


def main() -> int:
    """Run it all; 0 unless the benchmark itself cannot run."""
    options = parse_options()
    # Servers end with this program, however it ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    chosen = [system for system in SYSTEMS if not options.only or system.name in options.only]
    benchmark = Benchmark(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        seconds=options.seconds,
        rounds=options.rounds,
        machine=report.describe_machine(),
        results={system.name: Result(system.title, system.setting) for system in (*chosen, LIMIT)},
    )
    work = CACHE / "work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        load.find_wrk()
        programs = build(chosen, benchmark)
        with registry(programs["mlflow"]) as models:
            runner = Runner(models, work, programs)
            measure(runner, chosen, benchmark)
            odsp = next((system for system in chosen if system.name == "odsp"), None)
            if odsp and not benchmark.results["odsp"].failure:
                benchmark.behaviour = runner.behave(odsp)
                compared = [system for system in chosen if system.name in {"odsp", "naive"}]
                try:
                    benchmark.profile = runner.profile(compared, benchmark.seconds)
                except FAILURES as error:
                    say(f"profile: {_sentence(error)}")
    except NotAvailableError as error:
        say(str(error))
        return 1
    report.write(benchmark, options.output)
    if options.docs:
        for name in ("serving.md", "serving.svg"):
            shutil.copy(options.output / name, ROOT / "docs" / name)
    print((options.output / "serving.md").read_text())
    say(f"{options.output}, after {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def build(chosen: list[System], benchmark: Benchmark) -> dict[str, Path]:
    """Every environment by name; a peer whose environment cannot be built has failed."""
    programs: dict[str, Path] = {}
    for system in (LIMIT, *chosen):
        result = benchmark.results[system.name]
        try:
            if system.environment not in programs:
                programs[system.environment] = environments.build(system.environment)
            result.version = system.version(programs[system.environment])
        except NotAvailableError as error:
            result.failure = str(error)
            say(f"{system.name}: {error}")
    if benchmark.results["limit"].failure:
        raise NotAvailableError("Without the limit there is nothing to compare with.")
    programs.setdefault("mlflow", environments.build("mlflow"))
    return programs


def measure(runner: Runner, chosen: list[System], benchmark: Benchmark) -> None:
    """All rounds; every other one in the opposite order."""
    with runner.start(LIMIT, "lr") as (server, place):
        limit = Limit(runner, server, place, benchmark.results["limit"])
        for number in range(benchmark.rounds):
            for system in chosen if number % 2 == 0 else reversed(chosen):
                result = benchmark.results[system.name]
                for model in MODELS:
                    if result.failure:
                        break
                    say(f"round {number + 1}: {system.name} {model}")
                    try:
                        runner.visit(system, model, benchmark.seconds, result, limit.measure)
                    except FAILURES as error:
                        result.failure = _sentence(error)
                        say(f"{system.name}: {result.failure}")
        benchmark.results["limit"].pss_mb.append(round(server.pss_bytes() / 1e6, 1))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="visits of every system")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=[system.name for system in SYSTEMS],
        help=", ".join(system.name for system in SYSTEMS),
    )
    parser.add_argument("--output", type=Path, default=CACHE / "report", metavar="DIR")
    parser.add_argument("--docs", action="store_true", help="copy page and plot into docs/")
    return parser.parse_args()


def say(text: str) -> None:
    """To stderr, with the time of day."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, NotAvailableError) else repr(error)


if __name__ == "__main__":
    sys.exit(main())
