"""Scenarios: short, able to fail, and honest about what they promise."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

from house import House, policy, program, some

STEPS = {"check", "converge", "idempotence"}
NEVER_LEFT_OUT = {"create", "prepare", "converge", "idempotence", "verify", "destroy"}
MUTATION = {"name", "file", "find", "replace", "caught_by"}
#: Fewer would not show that the tests look at the role from more than one side.
MUTATIONS_PER_ROLE = 3

proofs = program("reliability")


@policy
def scenarios_say_only_what_is_special(house: House) -> Iterator[str]:
    """What scenarios share is said once, in .config/molecule/config.yml."""
    for name in some(house.scenarios()):
        text = house.text(f"molecule/{name}/molecule.yml")
        if len(text.splitlines()) > 30:
            yield f"molecule/{name}/molecule.yml has more than 30 lines"
        said = house.load(f"molecule/{name}/molecule.yml").get("scenario", {}).get("test_sequence")
        # A topology may leave dry runs to the roles' own scenarios.
        short = said and name.startswith("platform_") and {*said} >= NEVER_LEFT_OUT
        if said is not None and not short:
            yield f"molecule/{name}/molecule.yml has a sequence of its own"


def called(node: ast.AST) -> set[str]:
    """Return the names of what is called within a piece of a program."""
    calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
    return {ast.unparse(function).rsplit(".", maxsplit=1)[-1] for function in calls}


@policy
def every_test_can_fail(house: House) -> Iterator[str]:
    """A test asserts, or calls what does; none is skipped for good."""
    shared = house.below("molecule/_shared", ".py")
    for folder in some({file.parent for file in proofs.test_files(house.root)}):
        files = [*shared, *house.below(house.name(folder), ".py")]
        known = [
            (file, node)
            for file in files
            for node in ast.walk(ast.parse(house.text(file)))
            if isinstance(node, ast.FunctionDef)
        ]
        # testinfra's check_output fails with its command.
        demanding = {"check_output", "raises", "fail"}
        demanding |= {
            function.name
            for _, function in known
            if any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(function))
        }
        calls = {function.name: called(function) for _, function in known}
        # What calls one of them demands as well, and so on.
        while more := {name for name in calls.keys() - demanding if calls[name] & demanding}:
            demanding |= more
        for file, function in known:
            if function.name.startswith("test_") and function.name not in demanding:
                yield f"{house.name(file)}: {function.name} cannot fail"
        for file in files:
            for word in re.findall(
                r"\b(?:mark\.skip|mark\.xfail|importorskip|pytest\.skip)", house.text(file)
            ):
                yield f"{house.name(file)}: {word}"


@policy
def mutations_can_be_made(house: House) -> Iterator[str]:
    """Each role has mutations, each of them one defect that is expected to be noticed."""
    known = proofs.mutations(house.root)
    counted = Counter(role for role, _ in known)
    for role in house.roles:
        if counted[role] < MUTATIONS_PER_ROLE:
            has = f"{counted[role]} of {MUTATIONS_PER_ROLE} mutations"
            yield f"molecule/{role}/mutations.yml has {has}"
    for (role, name), times in Counter((r, m.get("name")) for r, m in known).items():
        if times > 1:
            yield f"molecule/{role}/mutations.yml: {name} stands there {times} times"
    for role, mutation in known:
        where = f"molecule/{role}/mutations.yml: {mutation.get('name')}"
        if mutation.keys() != MUTATION:
            yield f"{where}: {', '.join(sorted(mutation.keys() ^ MUTATION))} too much or missing"
            continue
        file = house.root / mutation["file"]
        if file not in house.files or not file.is_relative_to(house.root / "roles"):
            yield f"{where}: {mutation['file']} is no file of a role"
        elif (times := house.text(file).count(mutation["find"])) != 1:
            yield f"{where}: {mutation['find']!r} stands {times} times in {mutation['file']}"
        if mutation["find"] == mutation["replace"]:
            yield f"{where}: it changes nothing"
        files = [f for f in proofs.test_files(house.root) if f.parents[1].name == role]
        tests = {function.name for f in files for function in proofs.functions(f)}
        missed = set(mutation["caught_by"]) - tests - STEPS
        if missed or not mutation["caught_by"]:
            yield f"{where}: there is no test {', '.join(sorted(missed)) or 'named'}"


@policy
def no_mutation_went_unnoticed(house: House) -> Iterator[str]:
    """Every mutation has been tried, and the tests have caught it."""
    done: dict[tuple[str, str], set[str]] = {}
    for run in proofs.runs(house.root, "mutations.json"):
        done.setdefault((run["role"], run["name"]), set()).add(run["verdict"])
    for role, mutation in proofs.mutations(house.root):
        for verdict in done.get((role, mutation.get("name")), {"never tried"}) - {"caught"}:
            yield f"docs/mutations.json: {role}: {mutation.get('name')}: {verdict}"


@policy
def promises_are_sentences(house: House) -> Iterator[str]:
    """A test of a fault says which, what is promised then, and notes what it has measured."""
    try:
        faults = proofs.faults(house.root)
    except ValueError as unreadable:
        yield str(unreadable)
        return
    marked = sum(house.text(f).count("mark.fault(") for f in proofs.test_files(house.root))
    if marked != len(faults):
        yield f"of {marked} marks {len(faults)} belong to tests"
    for fault in faults:
        where = f"molecule/{fault.component}: {fault.test}"
        if fault.kind not in proofs.KINDS:
            yield f"{where}: {fault.kind!r} is none of {', '.join(proofs.KINDS)}"
        inner = re.sub(r"\b(?:e\.g|i\.e)\.", "", fault.promise)
        if not re.fullmatch(r"[A-Z0-9`][^\n]*\.", inner) or re.search(r"[.!?] ", inner):
            yield f"{where}: not one sentence: {fault.promise!r}"
        if not fault.measures:
            yield f"{where}: it measures nothing"


@policy
def every_fault_is_tested(house: House) -> Iterator[str]:
    """Every kind of fault is brought upon every role, or docs/reliability.py says why not."""
    tested = {(fault.component, fault.kind) for fault in proofs.faults(house.root)}
    for role in house.roles:
        reasons = proofs.NO_TEST.get(role, {})
        for kind in proofs.KINDS:
            needless = kind in proofs.OF_SOME or {kind, ""} & reasons.keys()
            if (role, kind) not in tested and not needless:
                yield f"molecule/{role}: no test of: {kind}"
            if (role, kind) in tested and kind in reasons:
                yield f"docs/reliability.py: {role} is tested, it needs no reason for: {kind}"


@policy
def pages_say_what_tests_do(house: House) -> Iterator[str]:
    """docs/reliability.md and docs/mutations.md promise neither more nor less than the tests."""
    for page in proofs.stale(house.root):
        yield f"{page} is out of date: run `make docs`"
