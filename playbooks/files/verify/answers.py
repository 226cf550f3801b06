"""Ask each component of this host whether it answers, in its own protocol and over TLS."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import struct
import subprocess
from typing import Any

from link import INPUTS, BrokenLinkError, prove, tell_facts

SECONDS = 10


def active(unit: str) -> None:
    """Raise BrokenLinkError unless systemd runs the unit."""
    show = ["systemctl", "show", "--property=ActiveState,SubState", "--value", unit]
    state = subprocess.run(show, capture_output=True, text=True, check=True).stdout.split()
    if state[0] != "active":
        raise BrokenLinkError(f"{unit} is {state[0]} ({state[1]})")


def context(role: str) -> ssl.SSLContext:
    """Return a TLS context that trusts the platform and shows the component's own certificate."""
    tls = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
    tls.load_cert_chain(f"/etc/odsp/tls/{role}.crt", f"/etc/odsp/tls/{role}.key")
    return tls


def ask_https(question: dict[str, Any]) -> str:
    """Ask for a path and expect a status."""
    tls = context(question["role"])
    if not question.get("verify", True):  # a certificate of the site's own, proved from outside
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    address, port = question["address"], int(question["port"])
    connection = http.client.HTTPSConnection(address, port, timeout=SECONDS, context=tls)
    connection.request("GET", question["path"])
    answer, wanted = connection.getresponse(), question.get("status", 200)
    if answer.status != wanted:
        raise BrokenLinkError(f"GET {question['path']} gave {answer.status}, not {wanted}")
    return f"GET {question['path']} gives {wanted}"


def ask_tls(question: dict[str, Any]) -> str:
    """Shake hands with certificates on both sides."""
    address = (question["address"], int(question["port"]))
    with (
        socket.create_connection(address, SECONDS) as plain,
        context(question["role"]).wrap_socket(plain, server_hostname=address[0]) as secure,
    ):
        return f"{secure.version()} with certificates on both sides"


def ask_postgres(question: dict[str, Any]) -> str:
    """Ask for TLS as PostgreSQL's protocol wants it, then shake hands."""
    address = (question["address"], int(question["port"]))
    with socket.create_connection(address, SECONDS) as plain:
        plain.sendall(struct.pack("!ii", 8, 80877103))
        if plain.recv(1) != b"S":
            raise BrokenLinkError("the server offers no TLS")
        tls = ssl.create_default_context(cafile="/etc/odsp/tls/ca.crt")
        with tls.wrap_socket(plain, server_hostname=address[0]) as secure:
            return f"{secure.version()}, certificate of the platform"


def count_workers(question: dict[str, Any]) -> str:
    """Read from the unit how many processes it shall have; the notebook looks for each of them."""
    show = ["systemctl", "show", "--property=ExecStart", f"odsp-{question['role']}.service"]
    text = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    match = re.search(r"--nworkers[ =](\d+)", text)
    if match is None:
        raise BrokenLinkError("its unit does not say --nworkers")
    tell_facts(processes=int(match[1]))
    return f"processes: {match[1]}"


PROTOCOLS = {
    "https": ask_https,
    "tls": ask_tls,
    "postgres": ask_postgres,
    "workers": count_workers,
}

for question in INPUTS["questions"]:
    with prove(f"{question['role']} answers", question["role"], stop=False) as proof:
        active(f"odsp-{question['role']}.service")
        proof.detail = PROTOCOLS[question["protocol"]](question)
