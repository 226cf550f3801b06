"""What an operator asks of the door: is it shut, to whom does it open, what does it hand on?"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from typing import Any

import pytest
import scenario

UNIT = "odsp-nginx.service"
#: What stands behind the door.
BEHIND = "odsp-door-test.service"
PATHS = {
    "jupyterlab": "/jupyter/",
    "mlflow": "/mlflow/",
    "dask_scheduler": "/dask/",
    "minio": "/minio/",
    "model_server": "/inference/",
}
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
#: The largest body on its way to the model server: 32M.
LIMIT = 32 * 2**20
FOREIGN = {"Origin": "https://evil.example"}
WEBSOCKET = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}

#: Whatever a stranger may try: routes, their ends, closed and unknown places, tricks of spelling.
EVERYWHERE = [
    "/",
    "/index.html",
    "/ca.crt",
    "/nothing/here",
    "/.never",
    "/@add_slash",
    "//mlflow",
    "/jupyter/../ca.crt",
    "/mlflow/%2e%2e/ca.crt",
    *PATHS.values(),
    *(path.rstrip("/") for path in PATHS.values()),
    "/dask/status",
    "/jupyter/api/kernels",
    "/minio/ws/objectManager",
    "/inference/loaded_models",
    "/mlflow/api/3.0/mlflow/server-info",
    "/mlflow/ajax-api/3.0/mlflow/assistant/config",
    "/mlflow/api/2.0/mlflow-artifacts/presigned/x",
]


def test_unit_runs_without_root(host: Any) -> None:
    """The door runs after every boot as www-data, confined, and Debian's own unit cannot start."""
    scenario.assert_confined(
        host, UNIT, "www-data", exposure=1.8, capabilities="cap_net_bind_service"
    )
    ambient = host.service(UNIT).systemd_properties["AmbientCapabilities"]
    assert ambient == "cap_net_bind_service"
    owners = host.check_output("ps -C nginx -o user:20=").split()
    assert set(owners) == {"www-data"} and len(owners) > 1
    assert host.service("nginx.service").is_masked


def test_listens_on_its_port_only(host: Any, inputs: dict[str, Any]) -> None:
    """Debian's default site on port 80 has never been there."""
    lines = host.check_output("ss -ltnpH").splitlines()
    ports = {line.split()[3].rsplit(":", 1)[1] for line in lines if '"nginx"' in line}
    assert ports == {str(inputs["nginx_listen_port"])}


def test_speaks_modern_tls_only(host: Any, inputs: dict[str, Any]) -> None:
    """TLS 1.2 and 1.3 with HTTP/2; no older one; nobody else vouches for the certificate."""
    port = inputs["nginx_listen_port"]
    connect = f"openssl s_client -connect localhost:{port} -verify_hostname localhost"
    end = "</dev/null 2>&1 | tr -cd '[:print:]\\n'"
    for version in ("tls1_2", "tls1_3"):
        options = f"-CAfile /etc/odsp/tls/ca.crt -alpn h2 -{version}"
        told = host.check_output(f"{connect} {options} {end}")
        assert "Verify return code: 0 (ok)" in told, told
        assert "ALPN protocol: h2" in told
    for version in ("tls1", "tls1_1"):
        told = host.check_output(f"{connect} -{version} -cipher 'ALL:@SECLEVEL=0' {end}")
        assert "alert protocol version" in told, told
    assert "Verify return code: 0 (ok)" not in host.check_output(f"{connect} {end}")


def test_strangers_get_401_everywhere(ask: Any, users: list[list[str]]) -> None:
    """Without a password, with a wrong one or an unknown name nothing else is ever said."""
    name, password = users[0]
    strangers: list[list[str] | None] = [
        None,
        [name, "wrong"],
        [name, ""],
        [name, password + "x"],
        ["nobody", password],
        ["", password],
    ]
    requests = [{"path": path, "auth": auth} for path in EVERYWHERE for auth in strangers]
    for request, answer in zip(requests, ask(*requests), strict=True):
        assert answer["status"] == 401, (request["path"], answer)
        assert answer["headers"]["www-authenticate"].startswith("Basic ")


def test_no_header_or_method_opens_the_door(ask: Any, users: list[list[str]]) -> None:
    """Neither a forged user nor a method, a WebSocket, a foreign origin or a large body does."""
    forged = {
        "X-Forwarded-User": users[0][0],
        "Remote-User": users[0][0],
        "X-Forwarded-For": "127.0.0.1",
    }
    requests: list[dict[str, Any]] = [
        {"path": path} | extra
        for path in PATHS.values()
        for extra in (
            {"headers": forged},
            {"headers": WEBSOCKET},
            {"headers": WEBSOCKET | FOREIGN},
            {"method": "PUT", "size": 5_000_000},
            {"method": "DELETE"},
            {"method": "OPTIONS"},
        )
    ]
    assert {answer["status"] for answer in ask(*requests)} == {401}


@pytest.mark.usefixtures("upstream")
def test_each_route_leads_to_its_component(ask: Any, users: list[list[str]]) -> None:
    """Notebooks and dashboard keep their path, the others find themselves at the root."""
    ways = {
        "/jupyter/lab?a=1": "/jupyter/lab?a=1",
        "/dask/status": "/dask/status",
        "/mlflow/": "/",
        "/mlflow/api/2.0/mlflow/runs/search?x=%20y": "/api/2.0/mlflow/runs/search?x=%20y",
        f"/mlflow{ARTIFACTS}/a%20b%23c": f"{ARTIFACTS}/a%20b%23c",
        "/minio/api/v1/session": "/api/v1/session",
        "/inference/loaded_models": "/loaded_models",
    }
    answers = ask(*({"path": path, "auth": users[0]} for path in ways))
    assert [answer["status"] for answer in answers] == [200] * len(ways)
    assert [json.loads(answer["text"])["path"] for answer in answers] == list(ways.values())


@pytest.mark.usefixtures("upstream")
def test_components_learn_the_user_and_not_the_password(ask: Any, users: list[list[str]]) -> None:
    """The door says who came from where; what the client claims about that is dropped."""
    forged = {
        "X-Forwarded-User": "root",
        "X_Forwarded_User": "root",
        "X-Forwarded-For": "203.0.113.5",
        "X-Forwarded-Host": "evil.example",
        "Forwarded": "for=203.0.113.5",
        "X-Real-IP": "203.0.113.5",
        "Host": "door.example:8443",
    }
    paths = [*PATHS.values(), "/dask/status", "/mlflow/api/3.0/mlflow/server-info"]
    paths.remove("/dask/")
    for answer in ask(*({"path": path, "auth": users[0], "headers": forged} for path in paths)):
        seen = json.loads(answer["text"])["headers"]
        assert seen["x-forwarded-user"] == users[0][0]
        assert seen["host"] == seen["x-forwarded-host"] == "door.example:8443"
        assert seen["x-forwarded-for"] == seen["x-real-ip"] != "203.0.113.5"
        assert seen["x-forwarded-proto"] == "https"
        assert not {"authorization", "forwarded", "x_forwarded_user"} & seen.keys()


@pytest.mark.usefixtures("upstream")
def test_notebooks_admit_their_owner_only(ask: Any, users: list[list[str]]) -> None:
    """They run as one Unix account: for every other user that route is as shut as for strangers."""
    paths = ["/jupyter", "/jupyter/", "/jupyter/lab", "/jupyter/api/kernels"]
    owner, other = (ask(*({"path": p, "auth": user} for p in paths)) for user in users[:2])
    assert [answer["status"] for answer in owner] == [302, 200, 200, 200]
    assert [answer["status"] for answer in other] == [401] * len(paths)
    (answer,) = ask({"path": "/mlflow/", "auth": users[1]})
    assert answer["status"] == 200


@pytest.mark.usefixtures("upstream")
def test_websockets_pass_for_pages_of_the_door(ask: Any, users: list[list[str]]) -> None:
    """A page from elsewhere gets 403, password or not; other upgrades are not handed on."""
    paths = ["/jupyter/ws", "/dask/status/ws", "/minio/ws/objectManager"]

    def open_them(headers: dict[str, str]) -> list[int]:
        requests = ({"path": p, "auth": users[0], "headers": WEBSOCKET | headers} for p in paths)
        return [answer["status"] for answer in ask(*requests)]

    assert open_them({}) == [101] * 3
    assert open_them({"Host": "door:8443", "Origin": "https://door:8443"}) == [101] * 3
    for origin in ("https://evil.example", "http://door:8443", "https://door:8444", "null", "x|y"):
        assert open_them({"Host": "door:8443", "Origin": origin}) == [403] * 3, origin
    h2c = {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AAMAAABk"}
    for answer in ask(
        *({"path": p, "auth": users[0], "headers": h2c} for p in PATHS.values() if p != "/dask/")
    ):
        assert "upgrade" not in json.loads(answer["text"])["headers"]


@pytest.mark.usefixtures("upstream")
def test_foreign_pages_cannot_write(ask: Any, users: list[list[str]]) -> None:
    """A form on another site is refused on every route."""
    requests = [
        {"path": p, "auth": users[0], "method": "POST", "size": 1, "headers": FOREIGN}
        for p in PATHS.values()
    ]
    assert [answer["status"] for answer in ask(*requests)] == [403] * len(PATHS)


@pytest.mark.usefixtures("upstream")
def test_mlflow_sends_nobody_past_the_door(ask: Any, users: list[list[str]]) -> None:
    """It offers no transfer with the store itself, and what only its own host may use is shut."""
    closed = [
        "/mlflow/ajax-api/3.0/mlflow/assistant/config",
        "/mlflow/ajax-api/3.0/mlflow/assist%61nt/config",
        "/mlflow/x/..//ajax-api/3.0/mlflow/assistant",
        "/mlflow/api/2.0/mlflow-artifacts/presigned/x",
        "/mlflow/ajax-api/2.0/mlflow-artifacts/mpu/create/x",
        "/mlflow/api/2.0/mlflow/artifacts/presigned-upload-url",
    ]
    assert [a["status"] for a in ask(*({"path": p, "auth": users[0]} for p in closed))] == [
        403
    ] * len(closed)
    infos = [f"/mlflow/{api}/3.0/mlflow/server-info" for api in ("api", "ajax-api")]
    for answer in ask(*({"path": path, "auth": users[0]} for path in infos)):
        told = json.loads(answer["text"])
        assert told["multipart_uploads_enabled"] is told["multipart_downloads_enabled"] is False


@pytest.mark.usefixtures("upstream")
def test_redirects_stay_behind_the_door(ask: Any, users: list[list[str]]) -> None:
    """A path without its slash, the dashboard's root, a component that says /docs."""
    ways = {
        "/mlflow?a=1": "/mlflow/?a=1",
        "/minio": "/minio/",
        "/inference": "/inference/",
        "/jupyter": "/jupyter/",
        "/dask": "/dask/status",
        "/dask/": "/dask/status",
        "/inference/moved": "/inference/docs",
    }
    answers = ask(*({"path": path, "auth": users[0]} for path in ways))
    assert [answer["headers"].get("location") for answer in answers] == list(ways.values())


def written(host: Any) -> int:
    """Return the bytes that nginx has written to disks so far."""
    files = "$(pgrep nginx | sed 's,.*,/proc/&/io,')"
    return sum(int(n) for n in host.check_output(f"sed -n 's/^write_bytes: //p' {files}").split())


@pytest.mark.usefixtures("upstream")
def test_large_bodies_pass_without_a_stop_on_disk(
    host: Any, ask: Any, users: list[list[str]]
) -> None:
    """200 MB arrive whole, and nginx never put them into a file."""
    before = written(host)
    path = f"/mlflow{ARTIFACTS}/big"
    (answer,) = ask({"path": path, "auth": users[0], "method": "PUT", "size": 200_000_000})
    assert json.loads(answer["text"])["received"] == 200_000_000
    (answer,) = ask({"path": "/inference/large", "auth": users[0]})
    assert answer["size"] == 50_000_000
    assert written(host) - before < 1_000_000


@pytest.mark.usefixtures("upstream")
@pytest.mark.parametrize("streamed", [False, True], ids=["announced", "streamed"])
def test_a_body_that_the_model_server_would_refuse_stops_at_the_door(
    host: Any, ask: Any, users: list[list[str]], streamed: bool
) -> None:
    """Users get a sentence as JSON, strangers 401; nothing of it goes behind the door."""
    since = float(host.check_output("date +%s.%N"))
    large = {"path": "/inference/too-large", "method": "POST", "size": LIMIT + 1}
    large["streamed"] = streamed
    refused, stranger = ask(large | {"auth": users[0]}, large)
    assert (refused["status"], stranger["status"]) == (413, 401)
    assert refused["headers"]["content-type"] == "application/json"
    sentence = f"The body is larger than {LIMIT} bytes; send fewer rows."
    assert json.loads(refused["text"]) == {"detail": sentence}
    assert "/too-large" not in scenario.journal(host, BEHIND, since)
    (passed,) = ask(large | {"path": "/inference/x", "auth": users[0], "size": LIMIT})
    assert json.loads(passed["text"])["received"] == LIMIT


def test_an_impostor_gets_nothing(host: Any, ask: Any, behind: Any, users: list[list[str]]) -> None:
    """An upstream without a certificate of the platform sees no request."""
    requests = [{"path": p + "odsp-impostor", "auth": users[0]} for p in PATHS.values()]
    for verb, status, asked in (("serve", 200, len(PATHS)), ("lie", 502, 0)):
        since = float(host.check_output("date +%s.%N"))
        with behind(verb):
            assert [answer["status"] for answer in ask(*requests)] == [status] * len(PATHS), verb

        def heard(since: float = since, asked: int = asked) -> bool:
            """Tell whether the journal has every request that came through."""
            return scenario.journal(host, BEHIND, since).count("/odsp-impostor") >= asked

        scenario.wait_until(heard)
        assert scenario.journal(host, BEHIND, since).count("/odsp-impostor") == asked, verb


def test_start_page_links_what_exists(ask: Any, users: list[list[str]]) -> None:
    """It greets the user, links every route, and notebooks only to their owner."""
    owner, other, authority = ask(
        {"path": "/", "auth": users[0]},
        {"path": "/", "auth": users[1]},
        {"path": "/ca.crt", "auth": users[1]},
    )
    assert f"<b>{users[0][0]}</b>" in owner["text"] and "<!--#" not in owner["text"]
    for path in PATHS.values():
        assert f'href="{path}"' in owner["text"]
        assert (f'href="{path}"' in other["text"]) == (path != "/jupyter/")
    assert "BEGIN CERTIFICATE" in authority["text"] and "PRIVATE" not in authority["text"]


def test_secrets_are_private(host: Any, ask: Any, users: list[list[str]]) -> None:
    """Hashes and key are for the door only; the journal has no password, query string or header."""
    for path in (
        "/etc/odsp/nginx/htpasswd",
        "/etc/odsp/nginx/htpasswd-jupyterlab",
        "/etc/odsp/tls/nginx.key",
    ):
        file = host.file(path)
        assert (file.user, file.group, file.mode) == ("root", "www-data", 0o640)
    lines = host.file("/etc/odsp/nginx/htpasswd").content_string.splitlines()
    assert [line.split(":")[0] for line in lines] == sorted(name for name, _ in users)
    assert all(line.split(":")[1].startswith("$2y$") for line in lines)
    passwords = [password for _, password in users]
    assert scenario.places_of(host, *passwords) == []


def test_the_log_tells_nothing_private(host: Any, ask: Any, users: list[list[str]]) -> None:
    """Of a request it tells the path, and the name of whom the password was right; no more."""
    private = {"Cookie": "in-a-header", "Referer": "https://in-a-header", "User-Agent": "odsp-test"}
    known, mistyped = users[0], ["mistyped-as-name", "wrong"]
    tried: list[tuple[str, list[str], dict[str, Any], int, str]] = [
        ("/odsp-known", known, {}, 404, known[0]),
        ("/mlflow/odsp-away", known, {}, 502, known[0]),
        ("/mlflow/ajax-api/3.0/mlflow/assistant", known, {}, 403, known[0]),
        ("/odsp-mistyped", mistyped, {}, 401, ""),
        ("/odsp-foreign", mistyped, {"headers": private | FOREIGN}, 403, ""),
        ("/odsp-broken", mistyped, {"headers": private | {"Host": "a b"}}, 400, ""),
        ("/odsp-plain", mistyped, {"plain": True}, 308, ""),
    ]
    since = float(host.check_output("date +%s.%N"))
    ask(
        *(
            {"path": f"{path}?in-the-query", "auth": auth, "headers": private} | special
            for path, auth, special, _, _ in tried
        )
    )

    def lines() -> list[str]:
        """Return the log since then."""
        shown = f"journalctl -u {UNIT} -o cat --since @{since:.6f}"
        return list(host.check_output(shown).splitlines())

    def ours() -> list[dict[str, Any]]:
        """Return what the log tells of these requests.

        Not a line is nginx's own: of what goes wrong they would quote the request. One of a request
        before may come late, as a worker writes it after its answer.
        """
        entries = [json.loads(line) for line in lines()]
        return [entry for entry in entries if entry["agent"] == "odsp-test"]

    def logged() -> bool:
        """Tell whether the journal has a line for each request."""
        return len(ours()) >= len(tried)

    scenario.wait_until(logged)
    # Sorted: a worker writes its line after its answer, so two connections may change places.
    told = sorted((entry["path"], entry["status"], entry["user"]) for entry in ours())
    assert told == sorted((path, status, user) for path, _, _, status, user in tried)
    for words in ("in-the-query", "in-a-header", "mistyped", "Basic "):
        assert words not in "\n".join(lines()).replace("/odsp-mistyped", "")


@pytest.mark.usefixtures("upstream")
def test_reload_keeps_open_websockets(
    run: Any, inputs: dict[str, Any], users: list[list[str]]
) -> None:
    """What is open when the configuration changes goes on."""
    request = {"path": "/jupyter/ws", "auth": users[0], "headers": WEBSOCKET}
    heard = run("reload", [inputs["nginx_listen_port"], request])
    assert heard == ["101", "before", "after", "later"]


def test_answers_users_on_the_network(inputs: dict[str, Any], users: list[list[str]]) -> None:
    """From another host it is the same door; whoever types http:// is led to https://."""
    context = ssl.create_default_context(cadata=scenario.secrets()["vault_ca_certificate"])
    netloc = f"{inputs['odsp_address']}:{inputs['nginx_listen_port']}"

    def knock(url: str, password: str) -> int:
        manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        manager.add_password(None, url, users[0][0], password)
        basic = urllib.request.HTTPBasicAuthHandler(manager)
        secure = urllib.request.HTTPSHandler(context=context)
        direct = urllib.request.ProxyHandler({})
        opener = urllib.request.build_opener(direct, secure, basic)
        try:
            with opener.open(url, timeout=60) as answer:
                assert answer.geturl().startswith("https://")
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert knock(f"https://{netloc}/", users[0][1]) == 200
    assert knock(f"https://{netloc}/", "wrong") == 401
    assert knock(f"http://{netloc}/", "wrong") == 401


FILES = "sha256sum /etc/odsp/tls/nginx.crt /etc/odsp/nginx/htpasswd"


@pytest.mark.parametrize("blow", ["restart", "kill", "reboot"])
def test_survives(host: Any, opens: Any, blow: str) -> None:
    """The unit starts by itself, with the same certificate and users, as shut as before."""
    before = host.check_output(FILES)
    scenario.strike(host, UNIT, blow)
    scenario.wait_until(opens)
    assert host.check_output(FILES) == before


def test_a_killed_worker_is_replaced(host: Any, opens: Any) -> None:
    """Nginx sees to that itself; the unit does not restart."""
    before = scenario.units(host)
    host.check_output("pkill --signal KILL --full '^nginx: worker process'")
    scenario.wait_until(opens)
    assert scenario.restarted(before, scenario.units(host)) == set()
