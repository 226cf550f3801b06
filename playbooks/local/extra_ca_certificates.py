"""Print, as a JSON list of PEM texts, the authorities this machine trusts beyond Debian's own.

Hosts that shall reach what this machine reaches, perhaps through a proxy that signs with an
authority of its own, need exactly these.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def certificates(path: Path) -> dict[str, str]:
    """Return the certificates of a bundle, keyed by their base64 body."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    return {"".join(pem.split("-----")[2].split()): pem for pem in PEM.findall(text)}


own = certificates(Path(os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt"))
for file in Path("/usr/share/ca-certificates").rglob("*.crt"):
    for body in certificates(file):
        own.pop(body, None)
print(json.dumps(sorted(own.values())))
