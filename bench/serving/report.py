"""The report: a table of goals, a table of figures, a plot, and the raw data."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from bench.serving.load import CASES, FOREIGN_CORES, Case, Figures

LIMIT = "limit"
OURS = "ODSP"
#: The peers that issue goals for together; Triton has goals of its own.
PEERS = ("mlflow", "mlserver", "mlserver-batch", "bentoml", "litserve")
ENOUGH_REQUESTS = 15_000


@dataclass
class Result:
    """What was seen of one system."""

    title: str
    setting: str
    version: str = ""
    failure: str = ""
    """Why it could not be measured, or not to the end."""
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    """By case, one for each round."""
    to_limit: dict[str, list[float]] = field(default_factory=dict)
    """Its rate to the limit's that was measured just before; by case, one for each round."""
    pss_mb: list[float] = field(default_factory=list)
    """With LR loaded, after its load; one for each round."""

    def middle(self, case: Case, figure: str) -> float | None:
        """The median over the rounds."""
        seen = [getattr(figures, figure) for figures in self.figures.get(case.name, [])]
        return median(seen) if seen else None


@dataclass
class Benchmark:
    """A run of it all."""

    date: str
    seconds: float
    rounds: int
    machine: dict[str, str]
    results: dict[str, Result]
    behaviour: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    """Of ODSP's server: where the time of a request goes."""

    def middle(self, system: str, case: Case, figure: str = "rate") -> float | None:
        """The median of a figure, None when it was not measured."""
        result = self.results.get(system)
        return result.middle(case, figure) if result else None

    def caption(self) -> str:
        """When and where."""
        machine = ", ".join(self.machine.values())
        return f"{self.date}; {machine}; medians of {self.rounds} x {self.seconds:g} s"

    def others(self) -> str:
        """What other jobs took of the machine meanwhile."""
        cores = [
            figures.foreign_cores
            for result in self.results.values()
            for seen in result.figures.values()
            for figures in seen
        ]
        if not cores:
            return "Nothing was measured."
        busy = sum(core > FOREIGN_CORES for core in cores)
        return (
            f"Other jobs took {median(cores):.2f} cores (median), and more than {FOREIGN_CORES:g} "
            f"in {busy} of {len(cores)} measurements, each of these the quieter of two."
        )


@dataclass(frozen=True)
class Goal:
    """A figure of ODSP's server, and whether it is what was asked for."""

    text: str
    wanted: str
    seen: str
    met: bool | None
    """None when it was not measured."""


def describe_machine() -> dict[str, str]:
    """CPU, cores, memory, Debian and kernel."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = len(re.findall(r"^processor", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": f"{cores} cores shared with the load",
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "",
        "debian": f"Debian {Path('/etc/debian_version').read_text().strip()}",
        "kernel": "Linux " + ".".join(platform.release().split(".")[:2]),
    }


def goals(benchmark: Benchmark) -> list[Goal]:
    """Every goal of the server's speed and behaviour."""
    lr = {connections: Case("lr", 1, connections) for connections in (1, 8, 64)}
    rf = {connections: Case("rf", 1, connections) for connections in (1, 8, 64)}
    many = Case("lr", 100, 8)

    def times(case: Case, others: Sequence[str], least: float, text: str) -> Goal:
        ours = benchmark.middle("odsp", case)
        rates = {
            name: rate for name in others if (rate := benchmark.middle(name, case)) is not None
        }
        if ours is None or not rates:
            return Goal(text, f"≥ {least:g} times", "not measured", None)
        best = max(rates, key=lambda name: rates[name])
        seen = f"{ours / rates[best]:.1f} times ({ours:.0f} to {rates[best]:.0f}/s"
        seen += f", {best})" if len(others) > 1 else ")"
        return Goal(text, f"≥ {least:g} times", seen, ours / rates[best] >= least)

    def at_most(text: str, value: float | None, limit: float, unit: str) -> Goal:
        if value is None:
            return Goal(text, f"≤ {limit:g} {unit}", "not measured", None)
        return Goal(text, f"≤ {limit:g} {unit}", f"{value:.1f} {unit}", value <= limit)

    naive_p99 = benchmark.middle("naive", rf[64], "p99_ms")
    ours_p99 = benchmark.middle("odsp", rf[64], "p99_ms")
    tail = (
        Goal("RF p99 at 64, to naive's", "≤ 1/20", "not measured", None)
        if naive_p99 is None or ours_p99 is None
        else Goal(
            "RF p99 at 64, to naive's",
            "≤ 1/20",
            f"1/{naive_p99 / ours_p99:.0f} ({ours_p99:.0f} to {naive_p99:.0f} ms)",
            ours_p99 <= naive_p99 / 20,
        )
    )
    ours = benchmark.results.get("odsp")
    pss = median(ours.pss_mb) if ours and ours.pss_mb else None
    return [
        times(lr[1], ["naive"], 1.5, "LR at 1 connection, to naive"),
        times(lr[8], ["naive"], 3, "LR at 8, to naive"),
        times(lr[64], ["naive"], 8, "LR at 64, to naive"),
        times(lr[64], PEERS, 4, "LR at 64, to the best peer but Triton"),
        times(lr[64], ["triton"], 3, "LR at 64, to Triton"),
        at_most("LR p99 at 64", benchmark.middle("odsp", lr[64], "p99_ms"), 25, "ms"),
        times(rf[8], ["naive"], 6, "RF at 8, to naive"),
        times(rf[64], ["naive"], 25, "RF at 64, to naive"),
        times(rf[64], PEERS, 3, "RF at 64, to the best peer but Triton"),
        times(rf[64], ["triton"], 1.5, "RF at 64, to Triton"),
        tail,
        times(many, ["naive"], 4, "LR, 100 rows, at 8, to naive"),
        at_most("PSS with LR loaded", pss, 250, "MB"),
        *_behaviour_goals(benchmark.behaviour),
    ]


def _behaviour_goals(behaviour: dict[str, Any]) -> list[Goal]:
    def goal(name: str, text: str, wanted: str, see: Callable[[Any], tuple[str, bool]]) -> Goal:
        if name not in behaviour:
            return Goal(text, wanted, "not measured", None)
        if "failure" in behaviour[name]:
            return Goal(text, wanted, behaviour[name]["failure"], met=False)
        return Goal(text, wanted, *see(behaviour[name]))

    def see_truth(truth: Any) -> tuple[str, bool]:
        names = ("wrong_after_load", "wrong_after_delete", "wrong_answers_after_delete")
        wrong = [truth[name] for name in names]
        return " / ".join(map(str, wrong)), not any(wrong)

    def see_bad(bad: Any) -> tuple[str, bool]:
        return f"{bad['failed']} of {bad['good_callers']}", not bad["failed"]

    def see_moves(moves: Any) -> tuple[str, bool]:
        times = ", ".join(
            "never" if seconds is None else f"{seconds} s"
            for seconds in moves["seconds_until_noticed"]
        )
        seen = f"{moves['failed']} of {moves['requests']:,}; noticed after {times}"
        met = not moves["failed"] and None not in moves["seconds_until_noticed"]
        return seen, met and moves["requests"] >= ENOUGH_REQUESTS

    return [
        goal(
            "one_truth",
            "wrong of 40: lists after a load / lists after a DELETE / answers after it",
            "0 / 0 / 0",
            see_truth,
        ),
        goal(
            "one_bad_caller",
            "good callers failed by a bad one in their batch, of 140",
            "0",
            see_bad,
        ),
        goal(
            "alias_moves",
            f"requests failed over 3 alias moves, of at least {ENOUGH_REQUESTS:,}",
            "0",
            see_moves,
        ),
    ]


def markdown(benchmark: Benchmark) -> str:
    """The page: goals, plot, figures."""
    words = {True: "yes", False: "**no**", None: "-"}
    lines = [
        "# The model server's speed, beside its peers'",
        "",
        f"{benchmark.caption()}.",
        "",
        benchmark.others(),
        "Made by `python3 bench/serving/run.py`; do not edit. Read ratios rather than absolutes;",
        "one below 1.3 may be noise.",
        "",
        "| goal | wanted | seen | met |",
        "| --- | --- | --- | --- |",
        *(
            f"| {goal.text} | {goal.wanted} | {_cell(goal.seen)} | {words[goal.met]} |"
            for goal in goals(benchmark)
        ),
        "",
        "![Requests per second and memory of every system](serving.svg)",
        "",
        "LR is a logistic regression, RF a forest of 100 trees, both on four numbers. Requests per",
        "second at so many kept connections, one row per request unless said otherwise; to limit",
        "is the ratio to a bare FastAPI route that answers a constant, measured just before; CPU",
        "is the server's own, in ms per request; PSS its memory in MB with LR loaded.",
        "",
        *_figures_table(benchmark),
        "",
        "## Where the time of a request goes",
        "",
        *_profile(benchmark.profile),
        "",
        "## Where peers are better",
        "",
        *_better_peers(benchmark),
        "",
        "Beside these figures: Triton and MLServer also speak gRPC, Triton runs models on GPUs and",
        "without Python, and BentoML and LitServe serve programs written around models.",
        "",
        "## What was run",
        "",
        "| system | version | how | not measured because |",
        "| --- | --- | --- | --- |",
        *(
            f"| {result.title} | {result.version} | {result.setting} | {_cell(result.failure)} |"
            for result in benchmark.results.values()
        ),
    ]
    return "\n".join(lines) + "\n"


def _figures_table(benchmark: Benchmark) -> Iterable[str]:
    for case in CASES:
        yield f"**{_title(case)}**"
        yield ""
        yield "| system | req/s | p50 ms | p99 ms | errors | CPU | to limit | to naive | PSS |"
        yield "| --- | --: | --: | --: | --: | --: | --: | --: | --: |"
        naive = benchmark.middle("naive", case)
        for name, result in benchmark.results.items():
            rate = result.middle(case, "rate")
            if rate is None:
                yield f"| {result.title} | - | | | | | | | |"
                continue
            to_limit = result.to_limit.get(case.name)
            cells = [
                f"{rate:.0f}",
                f"{result.middle(case, 'p50_ms'):.1f}",
                f"{result.middle(case, 'p99_ms'):.1f}",
                str(sum(figures.errors for figures in result.figures[case.name])),
                f"{result.middle(case, 'cpu_ms'):.2f}",
                f"{median(to_limit):.2f}" if to_limit else "",
                f"{rate / naive:.1f}" if naive and name != LIMIT else "",
                f"{median(result.pss_mb):.0f}" if result.pss_mb and case.model == "lr" else "",
            ]
            yield f"| {result.title} | {' | '.join(cells)} |"
        yield ""


def _profile(profile: dict[str, Any]) -> Iterable[str]:
    """Why a lone caller gets no more, and what 100 rows cost."""
    if not profile:
        yield "Not measured."
        return
    trip = profile["round_trip_us"]
    yield "A lone caller finds every process asleep: the request wakes the HTTP worker and the"
    yield "model's process, the answer the worker and the caller. Here a byte to another process"
    yield f"and back takes {trip['two CPUs']:.0f} µs between two CPUs, which fall asleep, and"
    yield f"{trip['one CPU']:.0f} µs on one. Requests per second of LR at 1 connection:"
    yield ""
    yield "| system | as it is | all its processes on one CPU |"
    yield "| --- | --: | --: |"
    for name, rates in profile["rates"].items():
        yield f"| {name} | {rates['free']:.0f} | {rates['on one CPU']:.0f} |"
    yield ""
    yield "A process of its own for each model costs that; keeping it on one CPU with the workers"
    yield "would take the second one from many callers. The work on one request in the model's"
    yield "process, each part in a loop of its own, in µs:"
    yield ""
    parts = profile["parts_us"]
    yield f"| part | {' | '.join(f'{rows} rows' if rows != '1' else '1 row' for rows in parts)} |"
    yield f"| --- |{' --: |' * len(parts)}"
    for part in next(iter(parts.values())):
        yield f"| {part} | {' | '.join(f'{by_rows[part]:.0f}' for by_rows in parts.values())} |"


def _better_peers(benchmark: Benchmark) -> list[str]:
    """A line for each figure in which some system is better than ours."""
    ours = benchmark.results.get("odsp")
    others = [
        result
        for name, result in benchmark.results.items()
        if name not in {"odsp", LIMIT} and result.figures
    ]
    if not ours or not ours.figures:
        return ["Not measured."]
    seen: list[tuple[str, str, Callable[[Result], float | None], bool]] = [
        ("memory with LR loaded", "MB", lambda of: median(of.pss_mb) if of.pss_mb else None, False)
    ]
    for case in CASES:
        seen += [
            (
                f"{_title(case)}, requests",
                "/s",
                partial(Result.middle, case=case, figure="rate"),
                True,
            ),
            (
                f"{_title(case)}, p99",
                "ms",
                partial(Result.middle, case=case, figure="p99_ms"),
                False,
            ),
        ]
    lines = []
    for what, unit, figure, is_more_better in seen:
        own = figure(ours)
        if own is None:
            continue
        better = [
            f"{other.title} {value:.{1 if unit == 'ms' else 0}f}"
            for other in others
            if (value := figure(other)) is not None
            and value != own
            and (value > own) == is_more_better
        ]
        if better:
            lines.append(
                f"- {what}: {', '.join(better)}, {OURS} {own:.{1 if unit == 'ms' else 0}f} {unit}"
            )
    return lines or ["In none of these figures."]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1f2328; }
  .head { font-weight: 600; }
  .small { font-size: 11px; fill: #59636e; }
  .page { fill: #ffffff; }
  .bar { fill: #b6bec8; }
  .ours { fill: #1a7f5a; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .small { fill: #9198a1; }
    .page { fill: #0d1117; }
    .bar { fill: #4a525d; }
    .ours { fill: #2ea87a; }
  }
"""
WIDTH, MARGIN, LABELS, VALUES, ROW, COLUMNS = 960, 24, 132, 56, 20, 2


def svg(benchmark: Benchmark) -> str:
    """Bars: a panel for each case and one for memory, each with a scale of its own."""
    # The limit is no competitor: beside a forest its bar would dwarf all others.
    systems = {
        name: result
        for name, result in benchmark.results.items()
        if result.figures and name != LIMIT
    }
    panels: dict[str, dict[str, float | None]] = {
        f"{_title(case)}: requests/s": {
            name: result.middle(case, "rate") for name, result in systems.items()
        }
        for case in CASES
    }
    panels["LR: memory (PSS), MB"] = {
        name: median(result.pss_mb) if result.pss_mb else None for name, result in systems.items()
    }
    height = 44 + ROW * len(systems)
    width = (WIDTH - MARGIN * (COLUMNS + 1)) / COLUMNS
    total = 56 + height * -(-len(panels) // COLUMNS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" role="img">',
        "<title>The model server beside its peers</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{total}"/>',
        f'<text class="small" x="{MARGIN}" y="28">{escape(benchmark.caption())}</text>',
    ]
    for index, (title, values) in enumerate(panels.items()):
        left = MARGIN + index % COLUMNS * (width + MARGIN)
        top = 62 + index // COLUMNS * height
        bars = {systems[name].title.strip("*"): value for name, value in values.items()}
        parts += _panel(title, bars, left, top, width)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _title(case: Case) -> str:
    rows = f", {case.rows} rows" if case.rows > 1 else ""
    plural = "s" if case.connections > 1 else ""
    return f"{case.model.upper()}{rows}, {case.connections} connection{plural}"


def _panel(
    title: str, bars: Mapping[str, float | None], left: float, top: float, width: float
) -> Iterable[str]:
    yield f'<text class="head" x="{left:.0f}" y="{top}">{title}</text>'
    longest = max((value or 0 for value in bars.values()), default=0) or 1
    x = left + LABELS
    for row, (label, value) in enumerate(bars.items()):
        y = top + 10 + row * ROW
        yield f'<text class="small" x="{left:.0f}" y="{y + 12}">{escape(label)}</text>'
        if value is None:
            continue
        length = value / longest * (width - LABELS - VALUES)
        kind = "ours" if label == OURS else "bar"
        yield (
            f'<rect class="{kind}" x="{x:.0f}" y="{y}" width="{length:.1f}" '
            f'height="{ROW - 5}" rx="2"/>'
        )
        yield f'<text class="small" x="{x + length + 5:.1f}" y="{y + 12}">{value:,.0f}</text>'


def write(benchmark: Benchmark, folder: Path) -> None:
    """`serving.md`, `serving.svg` and `serving.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serving.json").write_text(json.dumps(asdict(benchmark), indent=1) + "\n")
    (folder / "serving.svg").write_text(svg(benchmark))
    (folder / "serving.md").write_text(markdown(benchmark))
