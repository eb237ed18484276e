"""Who may call what: every route without a key, however the call is spelled, and what one key's callers see of
another's."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from support.serving import ADMIN_KEY, Server
from support.wire import error_of, head, told

from mm_core.errors import AuthenticationError, InvalidParamsError, MMError, NotFoundError, PermissionDeniedError
from mm_core.server.app import ROUTES
from mm_core.server.config import ServerConfig
from mm_core.server.context import ANYBODY
from mm_core.server.middleware import Keys
from mm_core.server.routing import Route
from mm_core.server.salts import caller_of, combine

ADMIN = [route for route in ROUTES if route.access == "admin"]
KEYED = [route for route in ROUTES if route.access == "key"]
OPEN = {"/health", "/health/ready", "/"}
PAGE = re.compile(r"/playground/[a-z]+\.(js|css|svg)")


def path_of(route: Route) -> str:
    return re.sub(r"\{[^}]*\}", "x", route.path)


def status(server: Server, route: Route, key: str | None, *lines: str) -> int:
    given = [] if key is None else [f"Authorization: Bearer {key}"]
    reply = told(server, head(route.method, path_of(route), "Content-Length: 0", *given, *lines))
    return error_of(reply)[0]


def test_only_these_routes_are_open():
    paths = {route.path for route in ROUTES if route.access == "open"}
    assert {path for path in paths if not PAGE.fullmatch(path)} <= OPEN
    assert len(KEYED) >= 5
    assert len(ADMIN) >= 8


@pytest.mark.parametrize("route", [*KEYED, *ADMIN], ids=lambda route: route.path)
def test_without_a_key_no_route_answers(server, route):
    assert status(server, route, None) == 401
    assert status(server, route, "wrong") == 401
    assert status(server, route, "") == 401
    assert status(server, route, "key-of-on") == 401
    assert status(server, route, "key-of-one2") == 401


@pytest.mark.parametrize("route", ADMIN, ids=lambda route: route.path)
def test_admin_routes_want_the_admin_key(server, route):
    assert status(server, route, "key-of-one") == 403


SPELLINGS = [
    "/v1/models", "//v1/models", "/v1//models", "/v1/models/", "/v1/models?x=/health", "/v1/models#/health",
    "/health/../v1/models", "/health/..%2fv1/models", "/health%2f..%2fv1%2fmodels", "/v1%2fmodels", "/V1/MODELS",
    "/health;/v1/models", "/health/v1/models", "/health/", "/HEALTH", "/playground/../v1/models", "/playground", "/.",
    "/playground/..%2f..%2fetc%2fpasswd", "/playground/app.js/../info",
    "/playground/info", "/%2e%2e/v1/models", "/v1/models%00", "/nowhere", "http://a/v1/models", "*",
    "/docs", "/redoc", "/metrics", "/openapi.json", "/admin/stats", "/invocations", "/pause", "/server_info",
]  # fmt: skip


@pytest.mark.parametrize("path", SPELLINGS)
def test_no_spelling_of_an_address_needs_no_key(server, path):
    status, headers, body = told(server, head("GET", path))
    assert status in (400, 401), body  # even a path that no route has
    assert "qwen2vl" not in str(body)
    if status == 401:
        assert headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("host", ["a/?x=", "a/health?x=", "127.0.0.1/health#", "\\health", "x" * 1000, "/health"])
def test_the_host_header_opens_nothing(server, host):
    for path in ("/v1/models", "/admin/stats"):
        reply = told(server, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert error_of(reply)[0] in (400, 401)


@pytest.mark.parametrize(
    "lines",
    [
        ["Authorization: key-of-one"],
        ["Authorization: Basic key-of-one"],
        ["Authorization: Bearer"],
        ["Authorization: Bearer key-of-one key-of-one"],
        ["Authorization: Bearer wrong", "Authorization: Bearer key-of-one"],
        ["Authorization: Bearer key-of-one", "Authorization: Bearer key-of-one"],
        ["X-Api-Key: key-of-one"],
        ["Cookie: Authorization=Bearer key-of-one"],
    ],
)
def test_other_ways_to_give_a_key(server, lines):
    assert error_of(told(server, head("GET", "/v1/models", *lines)))[0] == 401


def test_a_key_works(server):
    for key in (*server.keys, "key-of-a-file", "key-of-env", "another-of-env", ADMIN_KEY):
        with server.http(key) as client:
            assert client.get("/v1/models").status_code == 200
    reply = told(server, head("GET", "/v1/models", "Authorization: bEARER  key-of-one "))
    assert reply[0] == 200


def test_the_log_names_callers_and_holds_no_key(server):
    with server.http("key-of-two") as client:
        client.get("/v1/models")
        client.get("/v1/models", headers={"Authorization": "Bearer some-secret-guess"})
        last = client.get("/nowhere").headers["x-request-id"]
    log = "\n".join(server.wait_for_lines(last))
    assert caller_of("key-of-two").name in log
    assert not re.search(r"key-of-(one|two)|some-secret-guess|" + ADMIN_KEY, log)


# --- without a server


def keys(*api: str, admin: str | None = None) -> Keys:
    own = None if admin is None else SecretStr(admin)
    return Keys(ServerConfig(api_keys=tuple(map(SecretStr, api)), admin_key=own))


def outcome(known: Keys, access: str, key: str | None) -> str:
    async def handler(_: Any) -> Any:
        return None

    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    route = Route("/x", "GET", handler, access=access)  # type: ignore[arg-type]
    caller = known.find(headers) or ANYBODY
    try:
        known.check(route, caller)
    except MMError as error:
        return {AuthenticationError: "401", PermissionDeniedError: "403", NotFoundError: "404"}[type(error)]
    return "admin" if caller.admin else "anybody" if caller is ANYBODY else "known"


@pytest.mark.parametrize(
    ("known", "access", "key", "wanted"),
    [
        (keys(), "key", None, "anybody"),
        (keys(), "key", "x", "anybody"),  # clients that always send one
        (keys(), "admin", None, "404"),
        (keys(), "admin", "x", "404"),
        (keys("a"), "open", None, "anybody"),
        (keys("a"), "key", None, "401"),
        (keys("a"), "key", "a", "known"),
        (keys("a"), "admin", None, "401"),
        (keys("a"), "admin", "a", "404"),
        (keys(admin="b"), "key", None, "anybody"),
        (keys(admin="b"), "key", "b", "admin"),
        (keys(admin="b"), "admin", None, "401"),
        (keys(admin="b"), "admin", "x", "401"),
        (keys(admin="b"), "admin", "b", "admin"),
        (keys("a", admin="b"), "key", None, "401"),
        (keys("a", admin="b"), "admin", None, "401"),
        (keys("a", admin="b"), "admin", "a", "403"),
        (keys("a", admin="b"), "admin", "b", "admin"),
        (keys("é"), "key", "é", "known"),
    ],
)
def test_who_may_do_what(known, access, key, wanted):
    assert outcome(known, access, key) == wanted


def test_all_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    known = keys("first", "second", "third")
    for key in ("first", "third", "none", "firs", "x" * 5000):
        compared.clear()
        known.find([(b"authorization", b"Bearer " + key.encode())])
        assert len(compared) == 3  # whichever fits, all are looked at
        assert {len(side) for pair in compared for side in pair} == {hashlib.sha256().digest_size}


def test_salts_keep_callers_apart():
    one, two = caller_of("key-of-one"), caller_of("key-of-two")
    salts = [combine(caller, salt) for caller in (ANYBODY, one, two) for salt in (None, "a", "b", one.salt, two.salt)]
    assert salts[0] is None
    assert len(set(salts)) == len(salts)
    assert all(re.fullmatch(r"[0-9a-f]{64}", salt) for salt in salts[1:])
    assert one.salt not in (one.name, hashlib.sha256(b"key-of-one").hexdigest())
    assert "key-of" not in one.name


@pytest.mark.parametrize("salt", ["", "x" * 129, "a b", "a/b", "é", "a\x00", "\ud800", 1])
def test_salts_that_are_none(salt):
    with pytest.raises(InvalidParamsError) as caught:
        combine(ANYBODY, salt)
    assert caught.value.param == "cache_salt"


# --- what one key's callers see of another's


def ask(server: Server, key: str, text: str, **more: Any) -> dict[str, Any]:
    body = {"model": "qwen2vl-nano", "messages": [{"role": "user", "content": text}], "max_tokens": 4, **more}
    with server.http(key) as client:
        reply = client.post("/v1/chat/completions", json={"temperature": 0, **body})
    assert reply.status_code == 200, reply.text
    usage: dict[str, Any] = reply.json()["usage"]["prompt_tokens_details"]
    return usage


def test_reuse_stays_with_its_key_and_salt(server):
    text = "A long enough prompt that fills some blocks of the cache, so that there is something to find again later."
    assert ask(server, "key-of-one", text)["cached_tokens"] == 0
    assert ask(server, "key-of-one", text)["cached_tokens"] > 0
    assert ask(server, "key-of-two", text)["cached_tokens"] == 0
    assert ask(server, "key-of-one", text, cache_salt="mine")["cached_tokens"] == 0
    assert ask(server, "key-of-one", text, cache_salt="mine")["cached_tokens"] > 0
    # Another's salt, named by its digest, is a salt of one's own.
    assert ask(server, "key-of-two", text, cache_salt=caller_of("key-of-one").salt)["cached_tokens"] == 0


def test_a_page_of_a_named_origin_may_call(server: Server, http: httpx.Client):
    reply = http.get("/v1/models", headers={"Origin": "https://page.example"})
    assert reply.headers["access-control-allow-origin"] == "https://page.example"
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with httpx.Client(base_url=server.url, trust_env=False) as nobody:
        allowed = nobody.options("/v1/chat/completions", headers=asked)  # a browser asks without the key
        assert allowed.status_code == 204
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        assert nobody.get("/v1/models", headers={"Origin": "https://page.example"}).status_code == 401


def test_the_log_has_one_object_a_line(server: Server):
    last = told(server, head("GET", "/v1/models"))[1]["x-request-id"]
    lines = [json.loads(line) for line in server.wait_for_lines(last)]
    (call,) = [line for line in lines if line.get("request_id") == last]
    assert (call["logger"], call["route"], call["status"]) == ("mm_core.server.access", "/v1/models", 401)
    assert (call["code"], call["caller"]) == ("invalid_api_key", "anybody")


def test_pages_of_other_origins_are_not_let_in(http: httpx.Client):
    reply = http.get("/v1/models", headers={"Origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in reply.headers
    asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    assert http.options("/v1/chat/completions", headers=asked).status_code == 405
