"""OpenSSL's settings for the platform's Python: the system's own, and one option more."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from house import ROOT

PROGRAM = ROOT / "roles/base/files/openssl_settings.sh"
ASK = """
import ssl
context = ssl.create_default_context()
print(bool(context.options & ssl.OP_IGNORE_UNEXPECTED_EOF),
      bool(context.options & ssl.OP_NO_TICKET), len(context.get_ciphers()))
"""
STRICT = """[{ssl}]
system_default = {tls}
[{tls}]
CipherString = ECDHE-RSA-AES256-GCM-SHA384  # one of TLS 1.2
Ciphersuites = TLS_AES_256_GCM_SHA384
Options = -SessionTicket
"""
SHAPES = {
    "nothing": "",
    "debian": "openssl_conf = openssl_init\n[openssl_init]\nproviders = p\n[p]\ndefault = d\n[d]\n",
    "strict": "openssl_conf = openssl_init\n[openssl_init]\nssl_conf = module\n"
    + STRICT.format(ssl="module", tls="system_default_sect"),
    "strict, named apart": "openssl_conf=other\n[ other ]\nssl_conf = ssl_sect\n"
    + STRICT.format(ssl="ssl_sect", tls="tls"),
}


def answer(configuration: Path) -> list[str]:
    """Return what Python's default context is under a configuration."""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", ASK],  # Debian's own, as on the hosts
        env={**os.environ, "OPENSSL_CONF": str(configuration)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_site_keeps_its_policy(tmp_path: Path, shape: str) -> None:
    """A closed connection is an end; ciphers and options stay what the site chose."""
    system, ours = tmp_path / "openssl.cnf", tmp_path / "ours.cnf"
    system.write_text(shape)
    ours.write_text(
        subprocess.run(
            ["sh", str(PROGRAM), str(system)], capture_output=True, text=True, check=True
        ).stdout
    )
    before, after = answer(system), answer(ours)
    assert after[0] == "True"
    assert after[1:] == before[1:]
    assert ("SessionTicket" in shape) == (before[1] == "True")
