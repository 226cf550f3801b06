"""Ansible filters: the proof's links in order, what stands behind a broken one, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# A component comes after those it depends on, so that the first broken link is the cause.
ORDER = (
    "postgres",
    "minio",
    "mlflow",
    "dask_scheduler",
    "dask_worker",
    "jupyterlab",
    "model_server",
    "nginx",
)
SILENT = "the host cannot be reached"

Link = dict[str, Any]


def named(link: Mapping[str, Any], groups: Mapping[str, list[str]]) -> Link:
    """Return a link with the host and the unit it ends at."""
    host = link.get("host") or next(iter(groups.get(link["role"], [])), "")
    return {**link, "host": host, "unit": f"odsp-{link['role']}.service"}


def answers(hostvars: Mapping[str, Any], groups: Mapping[str, list[str]]) -> list[Link]:
    """Return what every component answered, in order of dependency."""
    links: list[Link] = []
    for role in ORDER:
        for host in groups.get(role, []):
            result = hostvars[host].get("__verify_answers") or {}
            found = [link for link in result.get("links", []) if link.get("role") == role]
            if not found:  # the host, or Python on it, did not say a word
                words = [link["detail"] for link in result.get("links", [])] or [SILENT]
                name = f"{role} answers"
                found = [{"name": name, "role": role, "ok": False, "ms": 0, "detail": words[0]}]
            links += [{"behind": [role], **link, "host": host} for link in found]
    return [named(link, groups) for link in links]


def proof_links(
    hostvars: Mapping[str, Any], groups: Mapping[str, list[str]], steps: list[Mapping[str, str]]
) -> list[Link]:
    """Return all links so far: the answers, then those of each step that has been taken."""
    links = answers(hostvars, groups)
    for step in steps:
        role, name = step["role"], step["name"]
        host = step.get("host") or next(iter(groups.get(role, [])), "")
        result = (hostvars[host].get(step["register"]) or {}) if host else {}
        found = list(result.get("links", []))
        if result.get("unreachable") or result.get("failed"):
            words = SILENT if result.get("unreachable") else str(result.get("msg"))
            found.append({"name": name, "ok": False, "ms": 0, "detail": words})
        links += [named({"role": role, "behind": [role]} | link, groups) for link in found]
    return links


def proof_suspects(
    link: Mapping[str, Any], groups: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """Return the units a link leads through, by host."""
    suspects: dict[str, list[str]] = {}
    for role in sorted({*link["behind"], link["role"]}, key=ORDER.index):
        for host in groups.get(role, []):
            suspects.setdefault(host, []).append(f"odsp-{role}.service")
    return suspects


def culprit(
    hostvars: Mapping[str, Any], groups: Mapping[str, list[str]], link: Mapping[str, Any]
) -> dict[str, str]:
    """Return the first unit behind a link that is not active, the link's own otherwise."""
    own: dict[str, str] = {"unit": link["unit"], "host": link["host"], "state": "", "journal": ""}
    for host_role in sorted({*link["behind"], link["role"]}, key=ORDER.index):
        unit = f"odsp-{host_role}.service"
        for host in groups.get(host_role, []):
            seen = (hostvars[host].get("__verify_behind") or {}).get("facts", {}).get("units", {})
            found = seen.get(unit, {"state": "out of reach", "journal": ""})
            here = {"unit": unit, "host": host, **found}
            if here["state"] != "active":
                return here
            if (unit, host) == (own["unit"], own["host"]):
                own = here
    return own


def proof_failure(
    hostvars: Mapping[str, Any], groups: Mapping[str, list[str]], links: list[Link]
) -> dict[str, str]:
    """Return what is broken, the unit behind it, its last words and what to try."""
    link = next((link for link in links if not link["ok"]), None)
    if link is None:
        return {}
    guilty = culprit(hostvars, groups, link)
    unit, host, state = guilty["unit"], guilty["host"], guilty["state"] or "in an unknown state"
    again = f"`ansible-playbook site.yml --limit {host}` with your -i options"
    if state == "out of reach":
        remedy = f"start the host {host}, or correct its address in the inventory"
    elif state == "active":
        remedy = (
            f"read `journalctl --unit {unit}` on {host}; {again} puts its configuration in order"
        )
    else:
        remedy = f"`sudo systemctl start {unit}` on {host}, or {again}"
    return {
        "link": link["name"],
        "unit": unit,
        "host": host,
        "state": state,
        "journal": guilty["journal"],
        "message": f"Broken: {link['name']} ({link['host']}): {link['detail']}. Behind it: {unit}"
        f" on {host}, which is {state}. Try: {remedy}.",
    }


def proof_verdict(
    hostvars: Mapping[str, Any], groups: Mapping[str, list[str]], links: list[Link], site: str
) -> dict[str, Any]:
    """Return the verdict for programs."""
    hosts = [host for role in ORDER for host in groups.get(role, [])]
    begun = [(hostvars[host].get("__verify_answers") or {}).get("started") for host in hosts]
    columns = ("name", "host", "unit", "ms", "ok", "detail")
    return {
        "site": site,
        "started": min(filter(None, begun), default=None),
        "ok": all(link["ok"] for link in links),
        "failure": proof_failure(hostvars, groups, links) or None,
        "links": [{column: link[column] for column in columns} for link in links],
    }


def proof_table(verdict: Mapping[str, Any]) -> str:
    """Return the verdict for people: one line per link, then the last words behind a broken one."""
    links, failure = verdict["links"], verdict["failure"]
    wide = max((len(link["name"]) for link in links), default=0)
    where = max((len(f"{link['unit']} {link['host']}") for link in links), default=0)
    lines = [
        f"{'ok    ' if link['ok'] else 'BROKEN'} {link['name']:{wide}}  {link['ms']:>6} ms"
        f"  {link['unit'] + ' ' + link['host']:{where}}  {link['detail']}".rstrip()
        for link in links
    ]
    if failure:
        lines += ["", f"Last lines of {failure['unit']} on {failure['host']}:"]
        lines += [f"  {line}".rstrip() for line in failure["journal"].splitlines()] or ["  (none)"]
    return "\n".join(lines)


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Return the filters of this file by name."""
        return {
            "proof_links": proof_links,
            "proof_suspects": proof_suspects,
            "proof_table": proof_table,
            "proof_verdict": proof_verdict,
        }
