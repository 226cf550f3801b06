"""Packages of one module, as a wheel or as sources that build themselves and need nothing else."""

import io
import tarfile
import zipfile
from pathlib import Path

_PYPROJECT = """
[build-system]
requires = [{needs}]
build-backend = "backend"
backend-path = ["."]
"""

_BACKEND = """
import os, sys, time, zipfile
{code}
def build_wheel(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(os.path.join(folder, {wheel!r}), "w") as wheel:
        for name, text in {files!r}.items():
            wheel.writestr(name, text.replace("<built in>", os.getcwd()))
    return {wheel!r}
"""

_WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel_name(name: str, version: str = "1.0") -> str:
    return f"{name}-{version}-py3-none-any.whl"


def wheel(name: str, module: str = "", more: dict[str, str] | None = None) -> bytes:
    """The bytes of a wheel with a module of the package's name, and whatever files more."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path, text in (_files(name, "1.0", module, "") | (more or {})).items():
            archive.writestr(path, text)
    return content.getvalue()


def put_wheel(folder: Path, name: str, module: str = "") -> None:
    (folder / wheel_name(name)).write_bytes(wheel(name, module))


def put_sources(
    folder: Path,
    name: str,
    module: str = "",
    *,
    version: str = "1.0",
    requires: str = "",
    needs: str = "",
    code: str = "",
) -> None:
    """Put an sdist into a folder; it `needs` a package, and `code` runs, when it is built."""
    built = wheel_name(name, version)
    parts = _files(name, version, module, requires)
    files = {
        "PKG-INFO": _metadata(name, version, requires),
        "pyproject.toml": _PYPROJECT.format(needs=repr(needs) if needs else ""),
        "backend.py": _BACKEND.format(code=code, wheel=built, files=parts),
    }
    with tarfile.open(folder / f"{name}-{version}.tar.gz", "w:gz") as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(f"{name}-{version}/{path}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))


def _files(name: str, version: str, module: str, requires: str) -> dict[str, str]:
    info = f"{name}-{version}.dist-info"
    return {
        f"{name}.py": module,
        f"{info}/METADATA": _metadata(name, version, requires),
        f"{info}/WHEEL": _WHEEL,
        f"{info}/RECORD": "",
    }


def _metadata(name: str, version: str, requires: str) -> str:
    line = f"Requires-Dist: {requires}\n" if requires else ""
    return f"Metadata-Version: 2.2\nName: {name}\nVersion: {version}\n{line}"
