"""Models of one short file, in environments that are there in no time.

Their runners are real ones; only the MLflow in their environment is a few lines of `light/`.
"""

import sys
import sysconfig
import textwrap
from pathlib import Path

from registry_server import RegistryServer

_UV = """#!/bin/sh
echo "$@" >> "{log}"
case "$2" in
  venv)
    mkdir -p bin "{site}"
    ln -s "{python}" bin/python
    echo "home = {home}" > pyvenv.cfg
    cp -r "{light}/mlflow" "{site}"
    # The flavor sklearn makes arrays of rows.
    ln -s "{packages}"/numpy "{packages}"/numpy.libs "{site}" ;;
  pip)
    if grep -q far-away requirements.txt; then
      echo "error: Failed to fetch: far-away" >&2
      exit 2
    fi ;;
esac
"""

_MODEL = """
import os, signal, threading
{load}
def predict(rows, params=None):
    if "kill" in rows:
        os.kill(os.getpid(), signal.SIGKILL)
    {predict}
    return [{answer!r} for _ in rows]
"""


def write_uv(folder: Path) -> Path:
    """A program that builds environments of the light kind, and logs what it was asked."""
    base = Path(getattr(sys, "_base_executable", sys.executable))
    site = Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    uv = folder / "light-uv"
    uv.write_text(
        _UV.format(
            log=folder / "uv.log",
            site=site,
            packages=sysconfig.get_path("platlib"),
            python=base,
            home=base.parent,
            light=Path(__file__).parent / "light",
        )
    )
    uv.chmod(0o755)
    return uv


class Shelf:
    """The models of a registry, each version a folder."""

    def __init__(self, registry: RegistryServer, folder: Path) -> None:
        self.registry = registry
        self._folder = folder

    def put(
        self,
        name: str,
        version: int,
        answer: str,
        *,
        load: str = "",
        predict: str = "",
        requirements: str = "light",
    ) -> None:
        """Register a version that answers each row with `answer`."""
        files = self._folder / f"{name}-{version}-{answer}"
        files.mkdir(parents=True)
        files.joinpath("model.py").write_text(
            _MODEL.format(
                load=textwrap.dedent(load),
                predict=textwrap.indent(textwrap.dedent(predict), "    ").strip() or "pass",
                answer=answer,
            )
        )
        files.joinpath("requirements.txt").write_text(requirements)
        self.registry.versions[name, version] = files

    def example(self, name: str, version: int) -> None:
        """Give a version an input example, which its runner asks it before anybody else does."""
        files = self.registry.versions[name, version]
        files.joinpath("serving_input_example.json").write_text('{"inputs": [["example"]]}')

    def point(self, name: str, alias: str, version: int | None) -> None:
        """Move an alias, or delete it."""
        if version is None:
            del self.registry.aliases[name, alias]
        else:
            self.registry.aliases[name, alias] = version
