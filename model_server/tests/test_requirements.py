from pathlib import Path

import pytest

from model_server.errors import ModelNotLoadableError
from model_server.requirements import named_in, read_requirements

HASH = "--hash=sha256:" + 64 * "a"


def _read(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "requirements.txt"
    file.write_text(text)
    return read_requirements(file)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("numpy\n", ["numpy"]),
        ("numpy ==2.4.6  # the newest\n\n# more\nscipy<2\r\n", ["numpy==2.4.6", "scipy<2"]),
        ("mlflow[extras, gateway]>=3,<4", ["mlflow[extras,gateway]<4,>=3"]),
        ("tomli; python_version < '3.11'", ['tomli; python_version < "3.11"']),
        (f"numpy==2.4.6 {HASH}", [f"numpy==2.4.6 {HASH}"]),
        (f"numpy==2.4.6 \\\n    {HASH} \\\n    {HASH}", [f"numpy==2.4.6 {HASH} {HASH}"]),
        ("-c constraints.txt\nnumpy", ["numpy"]),
        ("", []),
    ],
)
def test_names_versions_extras_markers_and_hashes_are_read(
    tmp_path: Path, text: str, read: list[str]
) -> None:
    assert _read(tmp_path, text) == read


@pytest.mark.parametrize(
    "line",
    [
        "-r /etc/odsp/model_server.env",
        "--index-url https://evil.test/simple",
        "--extra-index-url=https://evil.test/simple",
        "--find-links /tmp",
        "--no-binary :all:",
        "--trusted-host evil.test",
        "-e .",
        "./wheel.whl",
        "wheel.whl",
        "evil-1.tar.gz",
        "/etc/passwd",
        "https://evil.test/x.whl",
        "git+https://evil.test/x",
        "evil @ https://evil.test/evil.whl",
        "evil @ file:///tmp/evil",
        "-c ../constraints.txt",
        "-c constraints.txt -r more.txt",
        "numpy --global-option=x",
        "numpy --hash=md5:" + 32 * "a",
        f"--hash=sha256:{64 * 'a'} numpy",
        "${EVIL}",
        "numpy==1 -r more.txt",
    ],
)
def test_every_other_line_is_refused_by_name(tmp_path: Path, line: str) -> None:
    with pytest.raises(ModelNotLoadableError) as raised:
        _read(tmp_path, f"numpy\n{line}\n")
    assert f"has the line {line!r}" in str(raised.value)


def test_an_option_cannot_hide_behind_a_continued_line(tmp_path: Path) -> None:
    with pytest.raises(ModelNotLoadableError, match="-r /etc/passwd"):
        _read(tmp_path, "numpy \\\n-r /etc/passwd")


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    with pytest.raises(ModelNotLoadableError, match=r"without a requirements\.txt"):
        read_requirements(file)
    assert read_requirements(file, optional=True) == []
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelNotLoadableError, match="is not text"):
        read_requirements(file)


def test_the_packages_that_a_message_speaks_of_are_found() -> None:
    wanted = ["numpy==1", "Scikit-Learn", f"py==2 {HASH}", "num"]
    message = "Because scikit-learn was not found and numpy==1 needs pyx, it fails."
    assert named_in(message, wanted) == ["numpy", "Scikit-Learn"]
