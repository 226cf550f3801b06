"""What a model asks to be installed: names, versions, extras, markers and hashes, nothing else."""

import re
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from model_server.errors import ModelNotLoadableError

CONSTRAINTS = "constraints.txt"

_CONTINUED = re.compile(r"\\\r?\n")
_COMMENT = re.compile(r"(^|\s)#.*$")
_HASHES = re.compile(r"(\s+--hash=sha(?:256|384|512):[0-9a-f]+)+$")


def read_requirements(file: Path, *, optional: bool = False) -> list[str]:
    """The requirements in a file, refusing every line that is more than a package's name.

    Versions, extras, markers and hashes may follow the name. MLflow's own line for the constraints
    beside the file is passed over; whoever installs adds them.
    """
    try:
        text = file.read_text()
    except FileNotFoundError:
        if optional:
            return []
        raise ModelNotLoadableError(
            "The model was stored without a requirements.txt; log it with MLflow's log_model."
        ) from None
    except UnicodeDecodeError:
        raise ModelNotLoadableError(f"The model's {file.name} is not text.") from None
    requirements = []
    for raw in _CONTINUED.sub(" ", text).splitlines():
        line = _COMMENT.sub("", raw).strip()
        if not line or line.split() == ["-c", CONSTRAINTS]:
            continue
        requirements.append(_checked(line, file.name))
    return requirements


def named_in(text: str, requirements: list[str]) -> list[str]:
    """The names of the requirements that a message speaks of."""
    names = [Requirement(_HASHES.sub("", line)).name for line in requirements]
    return [
        name
        for name in names
        if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text, re.IGNORECASE)
    ]


def _checked(line: str, file: str) -> str:
    hashes = _HASHES.search(line)
    try:
        requirement = Requirement(line[: hashes.start()] if hashes else line)
    except InvalidRequirement:
        requirement = None
    if requirement is None or requirement.url:
        raise ModelNotLoadableError(
            f"The model's {file} has the line {line!r}; only package names with versions "
            "are allowed, no files, addresses or options."
        )
    return " ".join([str(requirement), *(hashes.group().split() if hashes else [])])
