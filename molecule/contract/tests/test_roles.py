"""Roles are strangers, say what they take, stay small, and never look away from an error."""

from __future__ import annotations

import re

import pytest
from house import (
    PUBLIC,
    ROLES,
    ROOT,
    below,
    defaults,
    load,
    name_of,
    some,
    specification,
    tasks,
)

#: What a task name begins with when it says a state instead of an outcome to reach.
NO_VERBS = re.compile(
    r"^(the|a|an|this|all|every|set_fact|debug|task|is|are|has|be|mlflow|postgres\w*|nginx)\b|^\w+(ing|ed|s)\b",
    re.IGNORECASE,
)
VERBS_IN_S = {"Process", "Pass", "Address", "Compress", "Express", "Access"}
SECRET = re.compile(r"password|secret|token|private_key|access_key$")


@pytest.mark.parametrize("role", ROLES)
def test_reads_only_its_own_variables(role: str) -> None:
    """A role knows neither groups nor other hosts, so it can be tested alone."""
    contract = below("inventories/common/group_vars/all", suffix=".yml")
    names = some(name for file in contract for name in load(file) if name.startswith("odsp_"))
    wired = re.compile(
        rf"\bhostvars\b|\bgroups\s*[\[.]|\bgroup_names\b|\bvault_[a-z]|\b({'|'.join(names)})\b"
    )
    for file in below("roles", role):
        if file.suffix in {".yml", ".j2"}:
            found = [line for line in file.read_text().splitlines() if wired.search(line)]
            assert found == [], name_of(file)


@pytest.mark.parametrize("role", ROLES)
def test_specification_equals_defaults(role: str) -> None:
    """The options' names and defaults are those of defaults/main.yml; a required one has none."""
    options = specification(role)
    expected = {name: facts["default"] for name, facts in options.items() if "default" in facts}
    assert expected == defaults(role)
    for name, facts in options.items():
        assert bool(facts.get("required")) != ("default" in facts), name
        assert facts.get("type"), name
        assert str(facts.get("description", "")).strip().endswith("."), name


@pytest.mark.parametrize("role", ROLES)
def test_required_inputs_are_listed_beside_the_defaults(role: str) -> None:
    """An operator who reads the defaults sees what must be given."""
    text = (ROOT / "roles" / role / "defaults/main.yml").read_text()
    for name, facts in specification(role).items():
        if facts.get("required"):
            assert re.search(rf"^# {name}:", text, re.MULTILINE), name


@pytest.mark.parametrize("role", ROLES)
def test_no_secret_has_a_default(role: str) -> None:
    """A secret is generated or given, never shipped."""
    for name, value in defaults(role).items():
        if SECRET.search(name) and isinstance(value, str):
            assert value == "" or "{{" in value or value in PUBLIC, name


@pytest.mark.parametrize("role", ROLES)
def test_stays_within_its_budget(role: str) -> None:
    """A file over its budget is two roles or a missing template."""

    def lines(path: str) -> int:
        text = (ROOT / "roles" / role / path).read_text()
        return len(text.removeprefix("---\n").splitlines())

    assert lines("tasks/main.yml") <= 25
    assert lines("defaults/main.yml") <= 60
    for file in below("roles", role, "tasks", suffix=".yml"):
        assert lines(str(file.relative_to(ROOT / "roles" / role))) <= 80, name_of(file)


@pytest.mark.parametrize("role", PUBLIC)
def test_contents_page_is_static_and_tagged(role: str) -> None:
    """tasks/main.yml imports the phases, each under its own tag."""
    for entry in some(load(ROOT / "roles" / role / "tasks/main.yml")):
        phase = str(entry["ansible.builtin.import_tasks"]).removesuffix(".yml")
        assert entry["tags"] == [f"{role}_{phase}"]


@pytest.mark.parametrize("role", ROLES)
def test_tasks_are_named_by_their_outcome(role: str) -> None:
    """A task's name is a sentence in the imperative."""
    for file, task in tasks(role):
        name = str(task.get("name", ""))
        where = f"{name_of(file)}: {name or task}"
        assert re.match(r"[A-Z][a-z]+ \S", name), where
        assert name.split(maxsplit=1)[0] in VERBS_IN_S or not NO_VERBS.match(name), where


@pytest.mark.parametrize("role", ROLES)
def test_errors_are_never_ignored(role: str) -> None:
    """No task goes on as if nothing had happened."""
    for file, task in tasks(role):
        where = f"{name_of(file)}: {task.get('name')}"
        assert not {"ignore_errors", "ignore_unreachable"} & task.keys(), where
        assert task.get("failed_when", True) is not False, where


def test_errors_are_never_ignored_in_playbooks() -> None:
    """Nor does a playbook."""
    for file in below("playbooks", suffix=".yml"):
        lax = re.search(r"ignore_errors|failed_when: (false|no)\b", file.read_text())
        assert lax is None, name_of(file)


#: They print no argument, or only call tasks that hide their own.
QUIET = ("assert", "import_role", "import_tasks", "include_role", "include_tasks")


@pytest.mark.parametrize("role", ROLES)
def test_secrets_stay_out_of_the_output(role: str) -> None:
    """A task of Ansible's own modules that is handed a secret hides what it does."""
    for file, task in tasks(role):
        for module, arguments in task.items():
            handed = re.search(
                r"\{\{[^}]*(password|secret_key|private_key)\b[^}]*\}\}", str(arguments)
            )
            if "." in module and module.rsplit(".")[-1] not in QUIET and handed:
                assert "no_log" in task, f"{name_of(file)}: {task.get('name')}"


@pytest.mark.parametrize("role", ROLES)
def test_own_modules_hide_the_secrets_they_are_given(role: str) -> None:
    """An option of our own module that holds a secret is declared as one."""
    for file in (f for f in below("roles", role) if f.parent.name == "library"):
        for option in re.findall(r'"(\w*(?:password|secret_key)\w*)": \{', file.read_text()):
            declared = re.search(rf'"{option}": \{{[^}}]*"no_log": True', file.read_text())
            assert declared is not None, f"{name_of(file)}: {option}"


@pytest.mark.parametrize("role", ROLES)
def test_inputs_that_are_secrets_say_so(role: str) -> None:
    """Ansible shows no input in an error that its specification calls a secret."""
    text = (ROOT / "roles" / role / "meta/argument_specs.yml").read_text()
    named = re.compile(r"(?m)^( +)(\w*(?:password|secret_key|private_key)):\n((?:\1  .*\n)+)")
    for found in named.finditer(text):
        assert "no_log: true" in found[3], f"{role}: {found[2]}"


@pytest.mark.parametrize("role", ROLES)
def test_rendered_files_say_who_manages_them(role: str) -> None:
    """A template that becomes a file of a host begins with the warning not to edit it."""
    commentless = (".json.j2", ".html.j2", ".sh.j2")
    for file, task in tasks(role):
        arguments = task.get("ansible.builtin.template")
        if not arguments or str(arguments["src"]).endswith(commentless) or "{{" in arguments["src"]:
            continue
        template = ROOT / "roles" / role / "templates" / arguments["src"]
        first = template.read_text().splitlines()[0]
        assert first.startswith("{{ ansible_managed | comment"), f"{name_of(file)}: {template.name}"


@pytest.mark.parametrize("role", ROLES)
def test_every_template_is_used(role: str) -> None:
    """A template that nothing names is dead."""
    folder = ROOT / "roles" / role / "templates"
    if not folder.exists():
        pytest.skip("no templates")
    readers = below("roles", role, suffix=".yml") + below("roles", role, suffix=".j2")
    texts = {file: file.read_text() for file in readers}
    for template in below("roles", role, "templates"):
        names = {template.name, f"{template.parent.name}/"}
        used = any(n in text for f, text in texts.items() if f != template for n in names)
        assert used, name_of(template)
