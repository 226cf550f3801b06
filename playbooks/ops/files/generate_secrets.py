"""Add the missing secrets to an inventory's vault file, atomically, mode 0600.

Reads {"secrets": [names], "users": [names], "site": name} from standard input; prints the names of
what it made, never a value. A name ending in _password or _key becomes 32 random characters,
vault_ca_* one certificate authority, vault_user_passwords a mapping from every user.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import string
import sys
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ALPHABET = string.ascii_letters + string.digits
VALID = datetime.timedelta(days=3650)


def password(length: int = 32) -> str:
    """Return a random password of letters and digits, safe in URLs and environment files."""
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def certificate_authority(site: str) -> dict[str, str]:
    """Return the PEM texts of a new authority that may sign end certificates only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ODSP"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"ODSP authority of {site}"[:64]),
        ]
    )
    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    ) | {"key_cert_sign": True, "crl_sign": True}
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return {
        "vault_ca_certificate": certificate.public_bytes(serialization.Encoding.PEM).decode(),
        "vault_ca_private_key": key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode(),
    }


def missing(present: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the secrets that are wanted and not there yet."""
    made: dict[str, Any] = {}
    for name in wanted["secrets"]:
        if name == "vault_user_passwords":
            known = present.get(name) or {}
            new = {user: password() for user in wanted["users"] if not known.get(user)}
            if new:
                made[name] = {**known, **new}
        elif present.get(name) or name in made:
            continue
        elif name.startswith("vault_ca_"):
            made.update(certificate_authority(wanted["site"]))
        else:
            made[name] = password()
    return made


def main() -> None:
    """Write the file if something was missing."""
    path, wanted = Path(sys.argv[1]), json.load(sys.stdin)
    text = path.read_text() if path.exists() else ""
    if text.startswith("$ANSIBLE_VAULT"):
        sys.exit(
            f"{path} is encrypted: run `ansible-vault decrypt {path}`, generate again, "
            f"then `ansible-vault encrypt {path}`."
        )
    try:
        present = yaml.safe_load(text)
    except yaml.YAMLError:
        sys.exit(
            f"{path} holds single encrypted values or is no YAML: write its values in plain text, "
            f"generate again, then `ansible-vault encrypt {path}`."
        )
    made = missing(present or {}, wanted)
    if not made:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w", opener=lambda p, f: os.open(p, f, 0o600)) as file:
        file.write("---\n")
        yaml.safe_dump({**(present or {}), **made}, file, default_flow_style=False, sort_keys=True)
    temporary.replace(path)
    print("made " + ", ".join(sorted(made)))


if __name__ == "__main__":
    main()
