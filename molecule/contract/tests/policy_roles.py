"""Roles are strangers, say what they take, stay small, and never look away from an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from house import WIRING, House, flat, mappings, policy, program, some

#: What a task name begins with when it says a state instead of an outcome to reach.
NO_VERBS = re.compile(
    r"^(the|a|an|this|all|every|set_fact|debug|task|is|are|has|be|mlflow|postgres\w*|nginx)\b|^\w+(ing|ed|s)\b",
    re.IGNORECASE,
)
VERBS_IN_S = {"Process", "Pass", "Address", "Compress", "Express", "Access"}
SECRET = re.compile(r"password|secret|token|private_key|access_key$")
HANDED = re.compile(r"\{\{[^}]*(password|secret_key|private_key)\b[^}]*\}\}")
#: They print no argument, or only call tasks that hide their own.
QUIET = ("assert", "import_role", "import_tasks", "include_role", "include_tasks")
SECTIONS = ["Needs", "Inputs", "Example", "Upgrade", "Test"]


@policy
def reads_only_its_own_variables(house: House) -> Iterator[str]:
    """A role knows neither groups nor other hosts, so it can be tested alone."""
    contract = house.below(WIRING, ".yml")
    names = some(n for file in contract for n in house.load(file) if n.startswith("odsp_"))
    wired = re.compile(
        rf"\bhostvars\b|\bgroups\s*[\[.]|\bgroup_names\b|\bvault_[a-z]|\b({'|'.join(names)})\b"
    )
    for file in some(house.below("roles", ".yml", ".j2")):
        for line in house.text(file).splitlines():
            if wired.search(line):
                yield f"{house.name(file)}: {line.strip()}"


@policy
def specification_equals_defaults(house: House) -> Iterator[str]:
    """The options' names and defaults are those of defaults/main.yml; a required one has none."""
    for role in house.roles:
        options, defaults = house.specification(role), house.defaults(role)
        listed = house.text(f"roles/{role}/defaults/main.yml")
        for name in sorted(defaults.keys() - options.keys()):
            yield f"{role}: {name} has a default and no specification"
        for name, facts in options.items():
            if facts.get("required"):
                if "default" in facts or name in defaults:
                    yield f"{role}: {name} is required and has a default"
                # An operator who reads the defaults sees what must be given.
                if not re.search(rf"^# {name}:", listed, re.MULTILINE):
                    yield f"{role}: {name} is required and not listed beside the defaults"
            elif "default" not in facts or name not in defaults:
                yield f"{role}: {name} is not required and has no default"
            elif facts["default"] != defaults[name]:
                yield f"{role}: {name} is {defaults[name]!r}, not {facts['default']!r}"
            if not facts.get("type"):
                yield f"{role}: {name} has no type"
            if not str(facts.get("description", "")).strip().endswith("."):
                yield f"{role}: {name} is not described in a sentence"


@policy
def no_secret_has_a_default(house: House) -> Iterator[str]:
    """A secret is generated or given, never shipped."""
    for role in house.roles:
        for name, value in house.defaults(role).items():
            # An expression derives it; an account's key may be the account's name.
            free = not isinstance(value, str) or "{{" in value or value in {"", *house.public}
            if SECRET.search(name) and not free:
                yield f"{role}: {name} has a default"


@policy
def files_stay_within_their_budget(house: House) -> Iterator[str]:
    """A file over its budget is two roles or a missing template."""
    for role in house.roles:
        budgets = dict.fromkeys(house.below(f"roles/{role}/tasks", ".yml"), 80)
        budgets[house.root / f"roles/{role}/tasks/main.yml"] = 25
        budgets[house.root / f"roles/{role}/defaults/main.yml"] = 60
        for file, budget in budgets.items():
            lines = len(house.text(file).removeprefix("---\n").splitlines())
            if lines > budget:
                yield f"{house.name(file)} has {lines} lines, {budget} at most"


@policy
def contents_page_is_static_and_tagged(house: House) -> Iterator[str]:
    """tasks/main.yml imports the phases, each under its own tag."""
    for role in house.public:
        for entry in some(house.load(f"roles/{role}/tasks/main.yml")):
            phase = str(entry.get("ansible.builtin.import_tasks")).removesuffix(".yml")
            if entry.get("tags") != [f"{role}_{phase}"]:
                yield f"roles/{role}/tasks/main.yml: {entry.get('name')}"


@policy
def tasks_are_named_by_their_outcome(house: House) -> Iterator[str]:
    """A task's name is a sentence in the imperative."""
    for role in house.roles:
        for file, task in house.tasks(role):
            name = str(task.get("name", ""))
            verb = name.split(maxsplit=1)[0] if name else ""
            if not re.match(r"[A-Z][a-z]+ \S", name) or (
                verb not in VERBS_IN_S and NO_VERBS.match(name)
            ):
                yield f"{house.name(file)}: {name or task}"


@policy
def errors_are_never_ignored(house: House) -> Iterator[str]:
    """Neither a role nor a playbook goes on as if nothing had happened."""
    for file in [*house.below("roles", ".yml"), *house.below("playbooks", ".yml")]:
        # A playbook may go on without a host, to say which one is away.
        lax = {"ignore_errors"} | ({"ignore_unreachable"} if "roles" in file.parts else set())
        for task in mappings(house.load(file)):
            if lax & task.keys() or task.get("failed_when", True) is False:
                yield f"{house.name(file)}: {task.get('name')}"


@policy
def secrets_stay_out_of_the_output(house: House) -> Iterator[str]:
    """A task of Ansible's own modules that is handed a secret hides what it does."""
    for role in house.roles:
        for file, task in house.tasks(role):
            for module, arguments in task.items():
                loud = "." in module and module.rsplit(".")[-1] not in QUIET
                if loud and HANDED.search(str(arguments)) and "no_log" not in task:
                    yield f"{house.name(file)}: {task.get('name')}"


@policy
def own_modules_hide_the_secrets_they_are_given(house: House) -> Iterator[str]:
    """An option of our own module that holds a secret is declared as one."""
    for file in (f for f in house.below("roles", ".py") if f.parent.name == "library"):
        text = house.text(file)
        for option in re.findall(r'"(\w*(?:password|secret_key)\w*)": \{', text):
            if not re.search(rf'"{option}": \{{[^}}]*"no_log": True', text):
                yield f"{house.name(file)}: {option}"


@policy
def inputs_that_are_secrets_say_so(house: House) -> Iterator[str]:
    """Ansible shows no input in an error that its specification calls a secret."""
    named = re.compile(r"\w*(?:password|secret_key|private_key)")
    for role in house.roles:
        for found in mappings(house.load(f"roles/{role}/meta/argument_specs.yml")):
            for option, facts in found.items():
                hidden = not isinstance(facts, dict) or facts.get("no_log") is True
                if named.fullmatch(str(option)) and not hidden:
                    yield f"{role}: {option}"


@policy
def rendered_files_say_who_manages_them(house: House) -> Iterator[str]:
    """A template that becomes a file of a host begins with the warning not to edit it."""
    commentless = (".json.j2", ".html.j2", ".sh.j2")
    for role in house.roles:
        for file, task in house.tasks(role):
            source = str((task.get("ansible.builtin.template") or {}).get("src", ""))
            if not source or source.endswith(commentless) or "{{" in source:
                continue
            template = house.text(f"roles/{role}/templates/{source}")
            if not template.startswith("{{ ansible_managed | comment"):
                yield f"{house.name(file)}: {source}"


def without_comments(house: House, files: Iterable[Path]) -> str:
    """Return what files say, one after the other."""
    return re.sub(r"(?m)(?:^|\s)#.*$", "", "\n".join(house.text(file) for file in files))


@policy
def every_template_is_used(house: House) -> Iterator[str]:
    """A template that nothing names is dead; those of a subfolder may be named by an expression."""
    for folder in ("roles", "playbooks", "molecule"):
        for template in house.below(folder, ".j2"):
            home = template.parents[[p.name for p in template.parents].index("templates") + 1]
            readers = house.below(house.name(home), ".yml", ".j2")
            text = without_comments(house, (file for file in readers if file != template))
            name, chosen = template.name.split(".", maxsplit=1)[0], f"'{template.parent.name}/' ~"
            if template.name not in text and not (
                chosen in text and re.search(rf"\b{name}\b", text)
            ):
                yield f"{house.name(template)} is used by nothing"


@policy
def every_file_is_used(house: House) -> Iterator[str]:
    """A file that nothing names is dead; a folder may be named as a whole."""
    for file in [*house.below("roles"), *house.below("playbooks")]:
        # Locks are made from what lies beside them.
        if "files" not in house.name(file).split("/") or file.name == "requirements.in":
            continue
        home = file.parents[[p.name for p in file.parents].index("files") + 1]
        readers = house.below(house.name(home), ".yml", ".j2", ".py")
        # It says where every role's lock lies.
        readers += house.below("roles/python_service/defaults")
        text = without_comments(house, (reader for reader in readers if reader != file))
        names = [rf"(?<![\w.-]){re.escape(file.name)}\b", rf"\b(?:import|from) {file.stem}\b"]
        folders = map(re.escape, file.relative_to(home / "files").parts[:-1])
        names += [rf"[\s\"'/]{name}/(?=[\"'\s,}}])|/ \"{name}\"" for name in folders]
        if not re.search("|".join(names), text):
            yield f"{house.name(file)} is used by nothing"


@policy
def every_module_is_used(house: House) -> Iterator[str]:
    """A module or filter of our own that no task calls is dead."""
    ours = [f for f in house.below("roles", ".py") if f.parent.name == "library"]
    for file in [*ours, *house.below("playbooks/library", ".py")]:
        tasks = [
            t
            for f in house.below(house.name(file.parents[1]), ".yml")
            for t in mappings(house.load(f))
        ]
        if not any(file.stem in task for task in tasks):
            yield f"{house.name(file)}: no task calls {file.stem}"
    texts = "\n".join(house.text(file) for file in house.below("playbooks", ".yml", ".j2"))
    texts += "\n".join(house.text(file) for file in house.below("roles", ".yml", ".j2"))
    for file in [f for f in house.files if f.parent.name == "filter_plugins"]:
        (filters,) = re.findall(r"def filters\(.*", house.text(file), re.DOTALL)
        for name in some(re.findall(r'"(\w+)": \w+', filters)):
            if not re.search(rf"\|\s*{name}\b", texts):
                yield f"{house.name(file)}: nothing is filtered by {name}"


@policy
def every_handler_is_notified(house: House) -> Iterator[str]:
    """A handler has a task that calls it, and whatever is called exists.

    So far there are none: units restart by comparison (docs/decisions/0002).
    """
    known: dict[str, Path] = {}
    called: dict[str, Path] = {}
    for file in [*house.below("roles", ".yml"), *house.below("playbooks", ".yml")]:
        content = house.load(file)
        handlers = list(content or []) if file.parent.name == "handlers" else []
        for found in mappings(content):
            handlers += found.get("handlers") or []
            names = found.get("notify", [])
            called |= dict.fromkeys([names] if isinstance(names, str) else names, file)
        known |= {handler.get("listen") or handler["name"]: file for handler in flat(handlers)}
    for name in sorted(known.keys() - called.keys()):
        yield f"{house.name(known[name])}: nothing notifies {name}"
    for name in sorted(called.keys() - known.keys()):
        yield f"{house.name(called[name])}: no handler is called {name}"


@policy
def inputs_in_readmes_are_generated(house: House) -> Iterator[str]:
    """The tables between the marks are what `make docs` writes."""
    generator = program("role_readmes")
    for role in house.roles:
        readme = house.root / "roles" / role / "README.md"
        try:
            written = generator.rewritten(readme.parent)
        except ValueError as lack:
            yield str(lack)
        else:
            if written != house.text(readme):
                yield f"{house.name(readme)} is out of date: run `make docs`"


@policy
def readmes_are_complete(house: House) -> Iterator[str]:
    """One sentence, a box, the sections in their order, and how the role is tested."""
    for role in house.roles:
        text = house.text(f"roles/{role}/README.md")
        if not text.startswith(f"# {role}\n\n"):
            yield f"roles/{role}/README.md does not begin with the role's name"
        found = [s for s in re.findall(r"^## (.+)$", text, re.MULTILINE) if s in SECTIONS]
        if found != SECTIONS:
            yield f"roles/{role}/README.md has the sections {', '.join(found)}"
        wanted = [f"| `{option}` |" for option in house.specification(role)]
        wanted.append(f"molecule test -s {role}")
        if role in house.public:
            wanted.append(f"odsp-{role}.service")
        for words in wanted:
            if not re.search(rf"{re.escape(words)}(?!\w)", text):
                yield f"roles/{role}/README.md does not name {words}"
