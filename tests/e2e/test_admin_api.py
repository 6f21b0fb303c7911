"""The admin API's promises: nobody's change is lost, a write happens once, lists are whole, an error names its field, every
write is an entry of a chain, what is erased is gone, and a configuration is applied whole or not at all."""

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import audit
import pytest
from edge import BareGate
from harness import call, wait_for
from people import Person, Service, admin, organisation, person

SECRET = "sk-proj-Ad3Mi9Nq5Wz7Kx1Vb8Jh4Gf6Ds2Pa0Yo"
OPENAI = {"provider": "openai"}
ROUTE = {"targets": [{"provider": "openai", "model": "gpt-4o"}]}
TOTAL = {"window": "total"}


@pytest.fixture(scope="module")
def service():
    with Service() as service:
        boss = admin(service)
        boss.do("POST", "/v1/credentials", {"name": "main", **OPENAI, "secret": SECRET})
        yield service


@pytest.fixture(scope="module")
def boss(service):
    return admin(service)


# --- ETag, If-Match, If-None-Match ------------------------------------------------------------------------------------------

# Kind: an object's path, a first body, another.
PUT_KINDS = {
    "team": ("/v1/teams/etag", {"label": "a"}, {"label": "b"}),
    "policy": ("/v1/policies/etag", {"label": "a"}, {"label": "b"}),
    "pool": ("/v1/pools/etag", {**OPENAI, "credentials": ["main"]}, {**OPENAI, "credentials": ["main"]}),
    "route": ("/v1/routes/etag/with:slash", ROUTE, {"targets": [{"provider": "openai", "model": "gpt-4o-mini"}]}),
    "provider": ("/v1/providers/anthropic", {"enabled": True},
                 {"enabled": False, "prices": {"claude-*": {"input": "1.000000001", "output": "2", "long_prompt": {"above": 9, "input": "3", "output": "4"}}}}),
}


@pytest.mark.parametrize("kind", PUT_KINDS)
def test_an_object_is_written_only_as_it_is_known(boss, kind):
    path, one, two = PUT_KINDS[kind]
    for match in ('"1"', "*", '"0"') if kind != "provider" else ('"1"', "*"):
        status, _, body = boss.ask("PUT", path, one, If_Match=match)
        assert (status, body["title"]) == (412, "precondition failed"), f"{match}: there is none"
    status, headers, body = boss.ask("PUT", path, one, If_None_Match="*")
    assert (status, headers["etag"]) == (200 if kind == "provider" else 201, f'"{body["version"]}"')
    first = headers["etag"]
    assert boss.ask("PUT", path, two, If_None_Match="*")[0] == 412
    assert boss.etag(path) == first, "reading and failing change nothing"
    status, headers, _ = boss.ask("PUT", path, two, If_Match=first)
    assert status == 200 and headers["etag"] != first
    for stale in (first, f"W/{headers['etag']}", headers["etag"].strip('"'), '"+' + headers["etag"][1:], '"', "", "é"):
        assert boss.ask("PUT", path, one, If_Match=stale.encode("latin-1"))[0] == 412, stale
        assert boss.ask("DELETE", path, If_Match=stale.encode("latin-1"))[0] == 412, stale
    assert boss.do("GET", path)["spec"] == boss.do("PUT", path, two, If_Match="*")["spec"]
    assert boss.ask("DELETE", path, If_None_Match="*")[0] == 412
    assert boss.ask("PUT", path, two, If_Match=boss.etag(path), If_None_Match="*")[0] == 412, "there and not there"
    assert boss.ask("PUT", path, two, If_None_Match=boss.etag(path))[0] == 400
    known = {first, headers["etag"], boss.etag(path)}
    assert boss.ask("DELETE", path, If_Match=boss.etag(path))[0] == 204
    assert boss.ask("DELETE", path, If_Match="*")[0] == 404
    boss.do("PUT", path, one)
    assert boss.etag(path) not in known, "made anew, it is not what somebody read before"
    boss.do("DELETE", path)


def test_settings_that_were_never_made_have_a_tag_as_well(boss):
    tag = boss.etag("/v1/providers/openai")
    assert boss.ask("PUT", "/v1/providers/openai", {}, If_Match=tag)[0] == 200
    assert boss.ask("PUT", "/v1/providers/openai", {}, If_Match=tag)[0] == 412
    boss.do("DELETE", "/v1/providers/openai")


@pytest.mark.parametrize("path", ["/v1/credentials/main", "/v1/keys/{key}"])
def test_a_patch_happens_only_to_what_was_read(boss, path):
    path = path.replace("{key}", boss.do("POST", "/v1/keys", {})["id"])
    tag = boss.etag(path)
    for body, headers in (({"label": "a"}, {"If_Match": '"999"'}), ({"label": "a"}, {"If_None_Match": "*"})):
        assert boss.ask("PATCH", path, body, **headers)[0] == 412, headers
    status, headers, body = boss.ask("PATCH", path, {"label": "one"}, If_Match=tag)
    assert (status, headers["etag"], body["label"]) == (200, f'"{body["version"]}"', "one")
    assert boss.ask("PATCH", path, {"label": "two"}, If_Match=tag)[0] == 412
    assert boss.ask("DELETE", path, If_Match=tag)[0] == 412
    assert boss.do("PATCH", path, {"label": "three"}, If_Match="*")["label"] == "three"


def test_a_key_is_rotated_and_revoked_only_as_it_is_known(boss):
    path = f"/v1/keys/{boss.do('POST', '/v1/keys', {})['id']}"
    tag = boss.etag(path)
    assert boss.ask("POST", f"{path}/rotate", {}, If_Match=tag)[0] == 200
    for method, where in (("POST", f"{path}/rotate"), ("DELETE", path)):
        assert boss.ask(method, where, {} if method == "POST" else None, If_Match=tag)[0] == 412
        assert boss.ask(method, where, {} if method == "POST" else None, If_None_Match="*")[0] == 412
    assert boss.ask("DELETE", path, If_Match=boss.etag(path))[0] == 204


def test_of_writers_that_read_the_same_one_wins(boss):
    boss.do("PUT", "/v1/teams/contended", {"label": ""})
    boss.do("PUT", "/v1/policies/contended", {"label": ""})
    key = boss.do("POST", "/v1/keys", {})["id"]
    for method, path in (("PUT", "/v1/teams/contended"), ("PUT", "/v1/policies/contended"), ("PATCH", "/v1/credentials/main"), ("PATCH", f"/v1/keys/{key}")):
        tag = boss.etag(path)
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(lambda n: boss.ask(method, path, {"label": f"writer {n}"}, If_Match=tag), range(10)))
        assert sorted(status for status, _, _ in answers) == [200] + [412] * 9, path
        won = next(body for status, _, body in answers if status == 200)
        now = boss.do("GET", path)
        assert now.get("label", now.get("spec", {}).get("label")) == won.get("label", won.get("spec", {}).get("label"))


def test_writers_that_expect_nothing_all_get_through(boss):
    key = boss.do("POST", "/v1/keys", {})["id"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: boss.ask("PATCH", f"/v1/keys/{key}", {"tags": {f"t{n}": "x"}})[0], range(4)))
    assert answers == [200] * 4 and set(boss.do("GET", f"/v1/keys/{key}")["tags"]) == {f"t{n}" for n in range(4)}


def test_a_patch_is_a_merge_patch(boss):
    """RFC 7396: what is absent stays, at every depth; null takes away."""
    key = boss.do("POST", "/v1/keys", {"label": "l", "allow": {"models": ["gpt-4o"], "endpoints": ["POST /v1/chat/completions"]},
                                       "tags": {"a": "1", "b": "2"}, "personal": {"name": "Ann"}, "budgets": [{"usd": "1", **TOTAL}]})
    path = f"/v1/keys/{key['id']}"
    assert boss.do("PATCH", path, {"allow": {"models": ["gpt-4o-mini"]}})["allow"] == {"models": ["gpt-4o-mini"], "endpoints": ["POST /v1/chat/completions"]}
    assert boss.do("PATCH", path, {"allow": {"endpoints": None}})["allow"] == {"models": ["gpt-4o-mini"]}
    assert boss.do("PATCH", path, {"tags": {"a": None, "c": "3"}})["tags"] == {"b": "2", "c": "3"}
    assert boss.do("PATCH", path, {"personal": {"mail": "a@example.com"}})["personal"] == {"name": "Ann", "mail": "a@example.com"}
    assert boss.do("PATCH", path, {"personal": {"name": None, "mail": None}})["personal"] is None
    after = boss.do("PATCH", path, {"label": None, "tags": None, "budgets": None, "allow": None})
    assert (after["label"], after["tags"], after["budget_usd"], after["allow"]) == ("", {}, None, {})


# --- Idempotency-Key --------------------------------------------------------------------------------------------------------

POSTS = {
    "/v1/keys": {"label": "once", "personal": {"name": "Ann"}}, "/v1/teams": {"name": "once", "spec": {}}, "/v1/policies": {"name": "once", "spec": {}},
    "/v1/pools": {"name": "once", "spec": {**OPENAI, "credentials": ["main"]}}, "/v1/routes": {"name": "once", "spec": ROUTE},
    "/v1/credentials": {"name": "once", **OPENAI, "secret": SECRET}, "/v1/admin-tokens": {"role": "auditor"}, "/v1/organisations": {"id": "org_once"},
}


def test_the_same_post_again_gets_the_same_answer_also_after_a_restart(service, boss):
    first = {path: boss.ask("POST", path, body, Idempotency_Key=f"once {path}") for path, body in POSTS.items()}
    assert {status for status, _, _ in first.values()} == {201}, first
    for _ in range(2):
        for path, body in POSTS.items():
            status, headers, answer = boss.ask("POST", path, body, Idempotency_Key=f"once {path}")
            assert (status, answer, headers.get("etag")) == (201, first[path][2], first[path][1].get("etag"))
            assert (headers["idempotent-replayed"], headers["cache-control"]) == ("true", "no-store")
            changed = {**body, **({"label": "other"} if "name" not in body else {"name": "other"})}
            status, _, problem = boss.ask("POST", path, changed, Idempotency_Key=f"once {path}")
            assert (status, problem["title"]) == (422, "idempotency key reused")
        service.restart()
    tokens = [answer["token"] for _, _, answer in first.values() if "token" in answer]
    assert len(tokens) == 3
    for name, data in service.files().items():
        for token in tokens:
            assert token.encode() not in data, name


def test_an_error_is_kept_as_well_and_keys_are_each_person_s_own(boss, service):
    other = person(service, "admin")
    bad = {"policy": "comes later"}
    assert boss.ask("POST", "/v1/keys", bad, Idempotency_Key="error")[0] == 422
    boss.do("PUT", "/v1/policies/comes.later", {})
    status, headers, _ = boss.ask("POST", "/v1/keys", bad, Idempotency_Key="error")
    assert (status, headers["idempotent-replayed"]) == (422, "true")
    assert other.ask("POST", "/v1/keys", {}, Idempotency_Key="error")[0] == 201
    for key in ("", "x" * 256, "\t"):
        assert boss.ask("POST", "/v1/keys", {}, Idempotency_Key=key)[0] == 400, key


def test_twenty_at_once_make_one_key(boss):
    def make(_):
        return boss.ask("POST", "/v1/keys", {"label": "twenty"}, Idempotency_Key="twenty")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(make, range(20)))
    assert {status for status, _, _ in answers} <= {201, 409}
    made = {body["token"] for status, _, body in answers if status == 201} | {make(0)[2]["token"]}
    assert len(made) == 1
    assert [key["label"] for key in boss.pages("/v1/keys", 1000)].count("twenty") == 1


def test_who_hangs_up_and_asks_again_gets_the_answer(service, boss):
    """A client that goes away in the middle: what began goes on to its end, and its answer waits."""
    body = json.dumps({"label": "hung up"}).encode()
    for n in range(30):
        with socket.create_connection(("127.0.0.1", service.admin_port)) as s:
            s.sendall((f"POST /v1/keys HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {boss.token}\r\ncontent-type: application/json\r\n"
                       f"idempotency-key: hung {n}\r\ncontent-length: {len(body)}\r\n\r\n").encode() + body)
            time.sleep(n * 0.0003)
    for n in range(30):
        wait_for("the answer", lambda n=n: boss.ask("POST", "/v1/keys", json.loads(body), Idempotency_Key=f"hung {n}")[0] == 201, 5)
    assert [key["label"] for key in boss.pages("/v1/keys", 1000)].count("hung up") == 30


def test_a_change_whose_client_hangs_up_is_in_force(service, boss):
    """Stored and not taken into memory, it would stay without effect until the next change."""
    body = b'{"label": "hung up"}'
    written = lambda: {e["target"] for e in entries(boss, "adm_org_default") if e["event"] == "ADMIN_CHANGED"}  # noqa: E731
    for n in range(30):
        with socket.create_connection(("127.0.0.1", service.admin_port)) as s:
            s.sendall((f"PUT /v1/teams/hung-{n} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {boss.token}\r\ncontent-type: application/json\r\n"
                       f"content-length: {len(body)}\r\n\r\n").encode() + body)
            time.sleep(n * 0.0003)
            if n == 29:
                # The others may hang up before anything is read of them.
                wait_for("the last", lambda: "teams/hung-29" in written())
    stored = {int(target.removeprefix("teams/hung-")) for target in written() if target.startswith("teams/hung-")}
    for n in stored:
        wait_for(f"hung-{n} in force", lambda n=n: boss.ask("GET", f"/v1/teams/hung-{n}")[0] == 200, 5)


# --- lists --------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def full():
    """A service of its own with seven of everything, and usage of five keys and two models."""
    with Service() as service:
        boss, gate = admin(service), BareGate(service)
        boss.do("POST", "/v1/credentials", {"name": "main", **OPENAI, "secret": SECRET})
        for n in range(7):
            for path, body in POSTS.items():
                name = {key: f"{value}_{n}" for key, value in body.items() if key in ("name", "id")}
                boss.do("POST", path, {**body, **name})
        for key in boss.do("GET", "/v1/keys?limit=5")["data"]:
            token = boss.do("POST", f"/v1/keys/{key['id']}/rotate", {})["token"]
            for model in ("gpt-4o", "gpt-4o-mini"):
                req, answer = gate.admit(token, model=model)
                assert "plan" in answer, answer
                gate.settle(gate.record(req, "complete", status=200, usage={"in": 10, "out": 10}))
        yield boss, gate


def make_more(boss, gate, path):
    """Adds to a list at a place that is not its end."""
    def more(n=iter(range(100))):
        number = next(n)
        if path.startswith("/v1/usage"):
            token = boss.do("POST", "/v1/keys", {})["token"]
            gate.settle(gate.record(gate.admit(token)[0], "complete", status=200, usage={"in": 1, "out": 1}))
        elif path != "/v1/providers":
            body = POSTS[path]
            boss.do("POST", path, {**body, **{key: f"{'org_' if key == 'id' else ''}{number}_new" for key in body if key in ("name", "id")}})
    return more


LISTS = [*POSTS, "/v1/providers", "/v1/usage?by=key", "/v1/usage?by=key,model", "/v1/usage?by=day,team,provider"]


@pytest.mark.parametrize("path", LISTS)
def test_a_list_is_whole_whatever_the_pages_and_whatever_comes_in_between(full, path):
    boss, gate = full

    def identity(item):
        return item.get("id") or item.get("name") or json.dumps(item["by"], sort_keys=True)

    whole = [identity(item) for item in boss.pages(path, 1000)]
    assert len(set(whole)) == len(whole) and whole
    for limit in (1, 2, len(whole), len(whole) + 1):
        assert [identity(item) for item in boss.pages(path, limit)] == whole
    page = boss.do("GET", f"{path}{'&' if '?' in path else '?'}limit={len(whole)}")
    assert "next_cursor" not in page, "a last page that is full is still the last"
    seen = [identity(item) for item in boss.pages(path, 2, make_more(boss, gate, path))]
    assert len(set(seen)) == len(seen) and set(whole) <= set(seen)


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("query, field", [("limit=0", "limit"), ("limit=1001", "limit"), ("limit=-1", "limit"), ("limit=x", "limit"), ("limit=", "limit"),
                                          ("cursor=%25", "cursor"), ("cursor=_w", "cursor"), ("nothing=1", "nothing"), ("limit=1&limit=2", "limit")])
def test_a_query_that_does_not_fit_names_its_parameter(boss, path, query, field):
    status, _, problem = boss.ask("GET", f"{path}{'&' if '?' in path else '?'}{query}")
    assert (status, problem.get("field")) == (400, field), problem


@pytest.mark.parametrize("query, field", [("from=yesterday", "from"), ("to=2026-02-30", "to"), ("by=colour", "by"), ("by=key,key", "by"),
                                          ("by=key&cursor=W10", None), ("by=key&cursor=WyJhIiwiYiJd", "cursor")])
def test_a_question_of_usage_names_what_does_not_fit(boss, query, field):
    status, _, body = boss.ask("GET", f"/v1/usage?{query}")
    assert (status, body.get("field")) == ((400, field) if field else (200, None)), body


def test_a_chain_is_read_in_pieces(boss):
    key = boss.do("POST", "/v1/keys", {})["id"]
    for n in range(5):
        boss.do("PATCH", f"/v1/keys/{key}", {"label": str(n)})
    whole = boss.do("GET", f"/v1/audit/{key}")["data"]
    assert [entry["seq"] for entry in whole] == [1, 2, 3, 4, 5, 6]
    for limit in (1, 2, 5):
        pieces, at = [], 1
        while piece := boss.do("GET", f"/v1/audit/{key}?from={at}&limit={limit}")["data"]:
            pieces, at = pieces + piece, at + limit
        assert pieces == whole
    assert boss.do("GET", f"/v1/audit/{key}?from={2**64 - 1}")["data"] == []
    assert boss.ask("GET", f"/v1/audit/{key}?from=-1")[2]["field"] == "from"


# --- problems -----------------------------------------------------------------------------------------------------------------

LONG = "x" * 201
# Method, path, body, status, field (None: it is not one field's fault).
BAD = [
    ("POST", "/v1/keys", [], 422, None),
    ("POST", "/v1/keys", {"lable": "x"}, 422, "lable"),
    ("POST", "/v1/keys", {"label": 1}, 422, "label"),
    ("POST", "/v1/keys", {"label": None}, 422, "label"),
    ("POST", "/v1/keys", {"label": LONG}, 422, "label"),
    ("POST", "/v1/keys", {"label": "ü" * 101}, 422, "label"),
    ("POST", "/v1/keys", {"team": "none"}, 422, "team"),
    ("POST", "/v1/keys", {"team": ["a"]}, 422, "team"),
    ("POST", "/v1/keys", {"policy": "none"}, 422, "policy"),
    ("POST", "/v1/keys", {"allow": {"models": "gpt"}}, 422, "allow.models"),
    ("POST", "/v1/keys", {"allow": {"models": [""]}}, 422, "allow.models"),
    ("POST", "/v1/keys", {"allow": {"models": ["m" * 257]}}, 422, "allow.models"),
    ("POST", "/v1/keys", {"allow": {"models": ["m"] * 1001}}, 422, "allow.models"),
    ("POST", "/v1/keys", {"allow": {"endpoints": [1]}}, 422, "allow.endpoints[0]"),
    ("POST", "/v1/keys", {"allow": {"hosts": []}}, 422, "allow.hosts"),
    ("POST", "/v1/keys", {"budgets": {}}, 422, "budgets"),
    ("POST", "/v1/keys", {"budgets": [{"usd": 5, **TOTAL}]}, 422, "budgets[0].usd"),
    ("POST", "/v1/keys", {"budgets": [{"usd": "-1", **TOTAL}]}, 422, "budgets[0].usd"),
    ("POST", "/v1/keys", {"budgets": [{"usd": "1e3", **TOTAL}]}, 422, "budgets[0].usd"),
    ("POST", "/v1/keys", {"budgets": [{"usd": "0.0000000001", **TOTAL}]}, 422, "budgets[0].usd"),
    ("POST", "/v1/keys", {"budgets": [{"usd": "1000000001", **TOTAL}]}, 422, "budgets[0].usd"),
    ("POST", "/v1/keys", {"budgets": [{"usd": "1", "window": "week"}]}, 422, "budgets[0].window"),
    ("POST", "/v1/keys", {"budgets": [{"usd": "1"}]}, 422, "budgets[0].window"),
    ("POST", "/v1/keys", {"budgets": [{"usd": "1", **TOTAL}] * 2}, 422, "budgets[1].window"),
    ("POST", "/v1/keys", {"expires_in": "soon"}, 422, "expires_in"),
    ("POST", "/v1/keys", {"expires_in": 60}, 422, "expires_in"),
    ("POST", "/v1/keys", {"expires_in": "3651d"}, 422, "expires_in"),
    ("POST", "/v1/keys", {"expires_in": "１m"}, 422, "expires_in"),
    ("POST", "/v1/keys", {"tags": {"": "x"}}, 422, "tags"),
    ("POST", "/v1/keys", {"tags": {"x": 1}}, 422, "tags.x"),
    ("POST", "/v1/keys", {"tags": {f"t{n}": "" for n in range(33)}}, 422, "tags"),
    ("POST", "/v1/keys", {"personal": {"name": "n" * 257}}, 422, "personal"),
    ("PATCH", "/v1/keys/{key}", {"status": "revoked"}, 422, "status"),
    ("PATCH", "/v1/keys/{key}", {"status": None}, 422, "status"),
    ("PATCH", "/v1/keys/{key}", {"token": "vk_x"}, 422, "token"),
    ("PATCH", "/v1/keys/{key}", {"policy": "none"}, 422, "policy"),
    ("PATCH", "/v1/keys/{key}", {"team": "none"}, 422, "team"),
    ("POST", "/v1/keys/{key}/rotate", {"overlap": "1 h"}, 422, "overlap"),
    ("POST", "/v1/keys/{key}/rotate", {"overlap": 1}, 422, "overlap"),
    ("POST", "/v1/admin-tokens", {}, 422, "role"),
    ("POST", "/v1/admin-tokens", {"role": 5}, 422, "role"),
    ("POST", "/v1/admin-tokens", ["admin"], 422, None),
    ("POST", "/v1/admin-tokens", {"role": "root"}, 422, "role"),
    ("POST", "/v1/admin-tokens", {"role": "developer"}, 422, "team"),
    ("POST", "/v1/admin-tokens", {"role": "developer", "team": "none"}, 422, "team"),
    ("POST", "/v1/admin-tokens", {"role": "admin", "team": "etag"}, 422, "team"),
    ("POST", "/v1/admin-tokens", {"role": "admin", "label": LONG}, 422, "label"),
    ("POST", "/v1/admin-tokens", {"role": "admin", "expires_in": "-1s"}, 422, "expires_in"),
    ("POST", "/v1/organisations", {"id": "acme"}, 422, "id"),
    ("POST", "/v1/organisations", {"id": "org_"}, 422, "id"),
    ("POST", "/v1/organisations", {"id": "org_Ä"}, 422, "id"),
    ("POST", "/v1/organisations", {"id": "org_ok", "label": LONG}, 422, "label"),
    ("POST", "/v1/teams", {"name": "a b", "spec": {}}, 422, "name"),
    ("POST", "/v1/teams", {"name": "x" * 129, "spec": {}}, 422, "name"),
    ("POST", "/v1/teams", {"name": "../etc", "spec": {}}, 422, "name"),
    ("POST", "/v1/teams", {"name": "ok"}, 422, "spec"),
    ("PUT", "/v1/teams/t", {"max_keys": -1}, 422, "max_keys"),
    ("PUT", "/v1/teams/t", {"max_keys": 2**32}, 422, "max_keys"),
    ("PUT", "/v1/teams/t", {"max_key_usd": "lots"}, 422, "max_key_usd"),
    ("PUT", "/v1/teams/t", {"max_expires_in": "1w"}, 422, "max_expires_in"),
    ("PUT", "/v1/teams/t", {"allow": {"endpoints": ["chat"]}}, 422, "allow.endpoints[0]"),
    ("PUT", "/v1/policies/p", {"pools": {"openai": "none"}}, 422, "pools.openai"),
    ("PUT", "/v1/policies/p", {"budgets": [{"usd": "", **TOTAL}]}, 422, "budgets[0].usd"),
    ("PUT", "/v1/policies/p", {"expires_in": "forever"}, 422, "expires_in"),
    ("PUT", "/v1/pools/p", {"provider": "openai", "credentials": []}, 422, "credentials"),
    ("PUT", "/v1/pools/p", {"provider": "openai", "credentials": ["none"]}, 422, "credentials[0]"),
    ("PUT", "/v1/pools/p", {"provider": "openai", "credentials": ["main", "main"]}, 422, "credentials[1]"),
    ("PUT", "/v1/pools/p", {"provider": "anthropic", "credentials": ["main"]}, 422, "credentials[0]"),
    ("PUT", "/v1/pools/p", {"credentials": ["main"]}, 422, "provider"),
    ("PUT", "/v1/routes/r", {"targets": []}, 422, "targets"),
    ("PUT", "/v1/routes/r", {"targets": [{"provider": "openai"}]}, 422, "targets[0].model"),
    ("PUT", "/v1/routes/r", {"targets": [{"provider": "x", "model": "m"}]}, 422, "targets[0].provider"),
    ("PUT", "/v1/routes/r", {"targets": [{"provider": "openai", "model": "m", "pool": "none"}]}, 422, "targets[0].pool"),
    ("PUT", "/v1/providers/openai", {"url": "ftp://x:1"}, 422, "url"),
    ("PUT", "/v1/providers/openai", {"enabled": "yes"}, 422, "enabled"),
    ("PUT", "/v1/providers/openai", {"prices": {"gpt-4o": {"input": 2.5, "output": "10"}}}, 422, "prices.gpt-4o.input"),
    ("PUT", "/v1/providers/openai", {"prices": {"gpt-4o": {"input": "2.50"}}}, 422, "prices.gpt-4o.output"),
    ("PUT", "/v1/providers/openai", {"prices": {"gpt-4o": {"input": "2.50", "output": "10", "per": "token"}}}, 422, "prices.gpt-4o.per"),
    ("PUT", "/v1/providers/nobody", {}, 404, None),
    ("POST", "/v1/credentials", {**OPENAI}, 422, "secret"),
    ("POST", "/v1/credentials", {**OPENAI, "secret": ""}, 422, "secret"),
    ("POST", "/v1/credentials", {**OPENAI, "secret": "two words"}, 422, "secret"),
    ("POST", "/v1/credentials", {**OPENAI, "secret": ["x"]}, 422, "secret"),
    ("POST", "/v1/credentials", {"provider": "nobody", "secret": SECRET}, 422, "provider"),
    ("POST", "/v1/credentials", {**OPENAI, "secret": SECRET, "account": ""}, 422, "account"),
    ("POST", "/v1/credentials", {**OPENAI, "secret": SECRET, "name": "a/b"}, 422, "name"),
    ("PATCH", "/v1/credentials/main", {"secret": None}, 422, "secret"),
    ("PUT", "/v1/config", {"team": {}}, 422, "team"),
    ("PUT", "/v1/config", {"teams": {"t": {"max_keys": "x"}}}, 422, "teams.t.max_keys"),
    ("POST", "/v1/config/diff", {"routes": {"r": {"targets": [{"model": 1}]}}}, 422, "routes.r.targets[0].model"),
]


@pytest.mark.parametrize("method, path, body, status, field", BAD)
def test_a_problem_names_the_field(boss, method, path, body, status, field):
    path = path.replace("{key}", boss.do("POST", "/v1/keys", {})["id"])
    before = boss.etag("/v1/config")
    got, headers, problem = boss.ask(method, path, body)
    assert (got, problem.get("field")) == (status, field), problem
    assert headers["content-type"] == "application/problem+json"
    assert (problem["type"], problem["status"]) == ("about:blank", status) and problem["title"] and problem["detail"]
    assert boss.etag("/v1/config") == before, "nothing was changed"


def test_a_configuration_names_everything_that_is_wrong(boss):
    status, _, problem = boss.ask("PUT", "/v1/config", {"teams": {"a b": {}}, "routes": {"r": {"targets": []}}, "pools": {"p": {**OPENAI, "credentials": ["none"]}}})
    assert status == 422
    assert {error["field"] for error in problem["errors"]} == {"teams.a b", "routes.r.targets", "pools.p.credentials[0]"}


@pytest.mark.parametrize("body, status, headers", [
    (b"", 400, {}), (b"{", 400, {}), (b"{} {}", 400, {}), (b'{"label": "\xff"}', 400, {}), (b'{"label": "\\ud800"}', 400, {}),
    (b"[" * 200 + b"]" * 200, 400, {}), (b'{"tags": ' + b"[" * 100_000, 400, {}), (b"{}", 415, {"content_type": "text/plain"}),
    (b"{" + b" " * (4 << 20) + b"}", 413, {}), (b"{" + b" " * (4 << 20) + b"}", 413, {"Idempotency_Key": "large"}),
])
def test_a_body_that_can_t_be_read_is_a_problem_too(boss, body, status, headers):
    got, answer, problem = boss.ask("POST", "/v1/keys", body, **{"content_type": "application/json", **headers})
    assert (got, answer["content-type"]) == (status, "application/problem+json"), problem


@pytest.mark.parametrize("method, path, status", [("GET", "/v1/keys/%ff", 400), ("GET", "/v1/keys/%00", 404), ("GET", "/v1/nothing", 404), ("GET", "/", 404),
                                                  ("TRACE", "/v1/keys", 405), ("PUT", "/v1/keys", 405), ("DELETE", "/v1/config", 405)])
def test_what_is_not_there_is_a_problem_too(boss, method, path, status):
    got, headers, problem = boss.ask(method, path)
    assert (got, headers["content-type"], problem["status"]) == (status, "application/problem+json", status)
    assert status != 405 or "GET" in headers["allow"]


def test_the_scheme_of_authorization_has_no_case(service, boss):
    for value, status in ((f"bearer {boss.token}", 200), (f"BEARER {boss.token}", 200), (f"Basic {boss.token}", 401), (boss.token, 401), ("Bearer", 401)):
        assert call(service.admin_base, "GET", "/v1/whoami", headers={"authorization": value})[0] == status, value


# --- secrets ------------------------------------------------------------------------------------------------------------------

def test_a_secret_is_shown_nowhere(service, boss):
    secret = "sk-proj-Never7Shown3Qw9Er5Ty1Ui8Op2As4Df6Gh"
    boss.do("POST", "/v1/credentials", {"name": "hidden", **OPENAI, "secret": secret}, Idempotency_Key="hidden")
    shown = [boss.ask("PATCH", "/v1/credentials/hidden", {"secret": secret}), boss.ask("POST", "/v1/credentials", {"name": "hidden", **OPENAI, "secret": secret})]
    wrong = [("POST", "/v1/credentials", {**OPENAI, "secret": {secret: 1}}), ("POST", "/v1/credentials", {**OPENAI, "secret": [secret]}),
             ("POST", "/v1/credentials", {**OPENAI, "secret": f"{secret} {secret}"}), ("POST", "/v1/credentials", {"provider": [secret], "secret": secret}),
             ("PATCH", "/v1/credentials/hidden", {"label": {"x": secret}}), ("POST", "/v1/admin-tokens", {"role": secret}),
             ("PATCH", "/v1/keys/key_x", {"status": secret}), ("PUT", "/v1/config", {"credentials": {"c": {**OPENAI, "secret": [secret]}}}),
             ("PUT", "/v1/config", {"credentials": {"c": {**OPENAI, "from": "env:X", "secret": secret, "account": ""}}}),
             ("POST", "/v1/config/diff", {"credentials": {"hidden": {**OPENAI, "secret": secret + "x"}}}),
             ("POST", "/v1/config/diff", {"credentials": {"new": {**OPENAI, "secret": secret}}}),
             ("POST", "/v1/credentials", f'{{"secret": "{secret}" "x"}}'.encode()), ("POST", "/v1/settlements/import", f"KS1 {secret}\n".encode())]
    shown += [boss.ask(method, path, body, content_type="application/json") for method, path, body in wrong]
    document = json.loads(call(service.admin_base, "GET", "/openapi.json")[2])
    shown += [boss.ask("GET", path) for path in document["paths"] if "{" not in path and "get" in document["paths"][path]]
    shown += [boss.ask("GET", path) for path in ("/v1/credentials/hidden", "/v1/audit/adm_org_default?limit=1000", "/v1/audit/adm_org_default/bundle", "/metrics",
                                                 "/openapi.json", "/healthz", "/readyz")]
    service.restart()
    texts = {"answers": json.dumps(shown, default=str).encode(), "log": service.service.log.read_bytes(), **service.files()}
    for where, text in texts.items():
        assert secret.encode() not in text, where
    assert b"kwa_" not in texts["log"] and boss.token.encode() not in texts["keyward.db"]


# --- every write is an entry -----------------------------------------------------------------------------------------------------

def entries(who, chain):
    """A chain, checked from its start by the second reading."""
    return audit.verify(who.do("GET", f"/v1/audit/{chain}/bundle"))


def test_every_write_is_one_entry_of_the_right_chain(service):
    boss = organisation(service, "org_written")
    chain = "adm_org_written"
    me = f"admin {boss.do('GET', '/v1/whoami')['token_id']}"
    steps = [
        ("PUT", "/v1/teams/t", {}, 201, ("create", "teams/t")), ("PUT", "/v1/teams/t", {"label": "x"}, 200, ("update", "teams/t")),
        ("POST", "/v1/teams", {"name": "u", "spec": {}}, 201, ("create", "teams/u")), ("DELETE", "/v1/teams/u", None, 204, ("delete", "teams/u")),
        ("DELETE", "/v1/teams/u", None, 404, None), ("PUT", "/v1/teams/t", {"max_keys": "x"}, 422, None),
        ("POST", "/v1/credentials", {"name": "c", **OPENAI, "secret": SECRET}, 201, ("create", "credentials/c")),
        ("POST", "/v1/credentials", {"name": "c", **OPENAI, "secret": SECRET}, 409, None),
        ("PATCH", "/v1/credentials/c", {"label": "x"}, 200, ("update", "credentials/c")),
        ("PUT", "/v1/pools/p", {**OPENAI, "credentials": ["c"]}, 201, ("create", "pools/p")),
        ("DELETE", "/v1/credentials/c", None, 409, None),
        ("PUT", "/v1/policies/q", {"pools": {"openai": "p"}}, 201, ("create", "policies/q")), ("PUT", "/v1/routes/a/b", ROUTE, 201, ("create", "routes/a/b")),
        ("PUT", "/v1/providers/openai", {}, 200, ("create", "providers/openai")), ("DELETE", "/v1/providers/openai", None, 204, ("delete", "providers/openai")),
        ("DELETE", "/v1/routes/a/b", None, 204, ("delete", "routes/a/b")), ("DELETE", "/v1/policies/q", None, 204, ("delete", "policies/q")),
        ("DELETE", "/v1/pools/p", None, 204, ("delete", "pools/p")), ("DELETE", "/v1/credentials/c", None, 204, ("delete", "credentials/c")),
        ("PUT", "/v1/config", {"teams": {"applied": {}}}, 200, ("create", "teams/applied")), ("PUT", "/v1/config", {"teams": {"applied": {}}}, 200, None),
        ("PUT", "/v1/config", {}, 200, ("delete", "teams/applied")), ("POST", "/v1/config/diff", {"teams": {"x": {}}}, 200, None),
        ("POST", "/v1/settlements/import", b"nothing\n", 200, ("import", "settlements")), ("POST", "/v1/organisations", {"id": "org_x"}, 403, None),
    ]
    for method, path, body, status, wanted in steps:
        before = entries(boss, chain)
        assert boss.ask(method, path, body)[0] == status, (method, path)
        new = entries(boss, chain)[len(before):]
        assert [(e["actor"], e["action"], e["target"]) for e in new] == ([(me, *wanted)] if wanted else []), (method, path)
        assert all(json.loads(entry["detail"]) is not None for entry in new), "details are JSON"
    made = boss.do("POST", "/v1/admin-tokens", {"role": "auditor"})["id"]
    for _ in range(2):
        boss.do("DELETE", f"/v1/admin-tokens/{made}")
    tail = [(e["action"], e["target"]) for e in entries(boss, chain)[-2:]]
    assert tail == [("create", f"admin-tokens/{made}"), ("delete", f"admin-tokens/{made}")], "twice is no error and no entry"
    first = [(e["action"], e["target"].split("/adt_")[0]) for e in entries(boss, chain)[:2]]
    assert first == [("create", "organisations/org_written"), ("create", "admin-tokens")]
    home = [e["target"] for e in entries(admin(service), "adm_org_default")]
    assert home.count("organisations/org_written") == 1, "who made it has it in their own chain as well"
    secrets = json.dumps(entries(boss, chain))
    assert SECRET not in secrets and "kwa_" not in secrets


def test_every_write_of_a_key_is_one_entry_of_its_chain(boss):
    key = boss.do("POST", "/v1/keys", {"label": "a", "personal": {"name": "Ann"}})["id"]
    path = f"/v1/keys/{key}"
    before = len(entries(boss, "adm_org_default"))
    steps = [("PATCH", path, {"label": "b"}, "KEY_CHANGED"), ("POST", f"{path}/rotate", {"overlap": "1h"}, "KEY_CHANGED"),
             ("DELETE", f"{path}/personal", None, "KEY_CHANGED"), ("DELETE", f"{path}/personal", None, None), ("DELETE", path, None, "KEY_REVOKED"),
             ("DELETE", path, None, None), ("PATCH", path, {"label": "c"}, None), ("POST", f"{path}/rotate", {}, None)]
    wanted = ["KEY_CREATED"]
    for method, where, body, event in steps:
        boss.ask(method, where, body)
        wanted += [event] if event else []
        chain = entries(boss, key)
        assert [entry["event"] for entry in chain] == wanted, (method, where)
    assert all(entry["actor"].startswith("admin adt_") for entry in chain)
    assert len(entries(boss, "adm_org_default")) == before


# --- erasing ------------------------------------------------------------------------------------------------------------------------

def test_what_is_erased_is_in_no_file(service, boss):
    """Long and short fields of many keys, changed and erased in odd order, so that pages split and come free; nothing may stay in
    the database, in its write-ahead log, or in answers that are kept."""
    keys = []
    for n in range(150):
        fields = {"name": f"Erasable Person {n:04}", "note": f"ErasableNote{n:04}" + "z" * (n % 200)}
        spec = {"label": f"e{n}", "personal": fields, "tags": {"user": f"erasable-user-{n:04}"}}
        spec["personal"] |= {f"long{i}": f"ErasableLong{n:04}" + "y" * 230 for i in range(20 if n % 7 == 0 else 0)}
        keys.append(boss.do("POST", "/v1/keys", spec, Idempotency_Key=f"person {n}")["id"])
    for key in keys[::3]:
        boss.do("PATCH", f"/v1/keys/{key}", {"personal": {"name": "Erasable Second Name " + "w" * 100}})
    before = {key: boss.do("GET", f"/v1/keys/{key}") for key in keys[:3]}
    assert before[keys[0]]["personal"]["name"].startswith("Erasable Second")
    assert any(b"rasable" in data for data in service.files().values()), "the search finds what is there"
    boss.do("DELETE", f"/v1/keys/{keys[1]}")
    for key in keys[::2] + keys[1::2]:
        assert boss.ask("DELETE", f"/v1/keys/{key}/personal")[0] == 204
    for key in keys:
        now = boss.do("GET", f"/v1/keys/{key}")
        assert (now["personal"], now["tags"]) == (None, {})

    def traces():
        found = {name: len(re.findall(b"(?i)erasable", data)) for name, data in service.files().items()}
        return {name: count for name, count in found.items() if count}

    wait_for("no trace", lambda: not traces(), 5)
    chain = entries(boss, keys[0])
    assert [entry["event"] for entry in chain] == ["KEY_CREATED", "KEY_CHANGED", "KEY_CHANGED"]
    assert json.loads(chain[0]["detail"])["personal_sha256"] and json.loads(chain[2]["detail"])["personal_sha256"] is None
    assert "rasable" not in json.dumps(chain)
    # The same write again would tell what was erased: its answer is gone, and no second key comes of it.
    spec = {"label": "e2", "personal": {"name": "Erasable Person 0002", "note": "ErasableNote0002zz"}, "tags": {"user": "erasable-user-0002"}}
    assert boss.ask("POST", "/v1/keys", spec, Idempotency_Key="person 2")[0] == 409
    assert boss.do("GET", f"/v1/keys/{keys[1]}")["status"] == "revoked", "a revoked key's data can be erased as well"
    service.restart()
    assert not traces()
    assert b"rasable" not in service.service.log.read_bytes()


def test_personal_data_can_be_erased_whatever_the_team_s_limits_are_by_now(service, boss):
    boss.do("PUT", "/v1/teams/stricter", {})
    key = boss.do("POST", "/v1/keys", {"team": "stricter", "personal": {"name": "Ann"}})["id"]
    boss.do("PUT", "/v1/teams/stricter", {"max_key_usd": "1.00", "max_expires_in": "1h", "max_keys": 0})
    assert person(service, "developer", "stricter").ask("DELETE", f"/v1/keys/{key}/personal")[0] == 204


# --- rotation, through Envoy --------------------------------------------------------------------------------------------------------------

def test_a_rotated_key_answers_to_both_tokens_until_the_overlap_ends(stack):
    key, first = stack.new_key("5.00")
    tokens = [first]

    def rotate(**body):
        tokens.append(stack.admin("POST", f"/v1/keys/{key}/rotate", body)["token"])
        stack.tokens.append(tokens[-1])

    def refused(token):
        status, headers, _ = stack.chat(token)
        # `expired` is told where the end comes while the answer is awaited.
        assert (status, headers.get("x-keyward-reason")) in ((200, None), (401, "revoked"), (401, "expired"))
        return headers.get("x-keyward-reason") == "revoked"

    rotate(overlap="1h")
    assert [refused(token) for token in (*tokens, first)] == [False] * 3
    rotate(overlap="1s")
    wait_for("the end of the overlap", lambda: refused(tokens[1]))
    assert [refused(token) for token in tokens] == [True, True, False], "an earlier overlap does not outlast a later one"
    rotate(overlap="1h")
    rotate()
    assert [refused(token) for token in tokens] == [True] * 4 + [False], "without overlap all but the newest end at once"
    assert len(set(tokens)) == 5
    # One key, one chain, one budget.
    stack.books(key)
    assert [entry["event"] for entry in stack.audit(key)].count("KEY_CHANGED") == 4


# --- whole configurations ------------------------------------------------------------------------------------------------------------------

WHOLE = {
    "teams": {"search": {"label": "Search", "max_keys": 50, "max_key_usd": "100.00", "max_expires_in": "30d"}},
    "providers": {"anthropic": {"enabled": False}},
    "credentials": {"first": {**OPENAI, "from": "env:OPENAI_API_KEY", "secret": SECRET}, "second": {**OPENAI, "secret": SECRET + "2", "account": "shared"}},
    "pools": {"prod": {**OPENAI, "credentials": ["second", "first"]}},
    "policies": {"ci": {"pools": {"openai": "prod"}, "budgets": [{"usd": "5.00", **TOTAL}], "expires_in": "10m", "allow": {"models": ["gpt-4o*"]}}},
    "routes": {"fast": {"targets": [{"provider": "openai", "model": "gpt-4o-mini", "pool": "prod"}]}},
}


@pytest.fixture
def applied(service, request):
    """A new organisation with the whole configuration and one team that was made otherwise."""
    boss = organisation(service, "org_" + re.sub("[^a-z0-9]", "_", request.node.name)[:50])
    boss.do("PUT", "/v1/teams/by-hand", {"label": "by hand"})
    assert len(boss.do("PUT", "/v1/config", WHOLE)["changes"]) == 7
    return boss


def without(section, name):
    return {key: {n: v for n, v in value.items() if (key, n) != (section, name)} for key, value in WHOLE.items()}


def test_apply_twice_changes_nothing_and_nothing_differs_after_it(applied):
    tag = applied.etag("/v1/config")
    chain = applied.do("GET", "/v1/whoami")["organisation"]
    before = len(entries(applied, f"adm_{chain}"))
    again = applied.ask("PUT", "/v1/config", WHOLE)
    assert (again[2]["changes"], again[1]["etag"]) == ([], tag)
    assert applied.do("POST", "/v1/config/diff", WHOLE)["changes"] == []
    assert (applied.etag("/v1/config"), len(entries(applied, f"adm_{chain}"))) == (tag, before)
    shown = applied.do("GET", "/v1/config")["configuration"]
    assert applied.do("POST", "/v1/config/diff", shown)["changes"] == [
        {"action": "update", "kind": "team", "name": "by-hand", "fields": [{"field": "managed_by", "from": "api", "to": "configuration"}]}]
    assert SECRET not in json.dumps(shown)


def test_diff_says_what_apply_then_does(applied):
    wanted = json.loads(json.dumps(without("routes", "fast")))
    wanted["teams"]["search"]["max_keys"] = 51
    wanted["credentials"]["first"]["secret"] = SECRET + "3"
    wanted["policies"]["new"] = {}
    planned = applied.do("POST", "/v1/config/diff", wanted)["changes"]
    assert {(c["action"], c["kind"], c["name"]) for c in planned} == {
        ("update", "team", "search"), ("update", "credential", "first"), ("create", "policy", "new"), ("delete", "route", "fast")}
    assert [c["fields"] for c in planned if c["kind"] == "credential"] == [[{"field": "secret", "from": "(secret)", "to": "(secret)"}]]
    assert [c["fields"] for c in planned if c["name"] == "search"] == [[{"field": "max_keys", "from": 50, "to": 51}]]
    assert applied.do("PUT", "/v1/config", wanted)["changes"] == planned
    assert applied.do("POST", "/v1/config/diff", wanted)["changes"] == []


def test_an_apply_removes_only_what_an_apply_made(applied):
    applied.do("PUT", "/v1/config", {})
    left = applied.do("GET", "/v1/config")["configuration"]
    assert {section: list(objects) for section, objects in left.items() if objects} == {"teams": ["by-hand"]}


def test_an_apply_happens_whole_or_not_at_all(applied):
    key = applied.do("POST", "/v1/keys", {"policy": "ci"})["id"]
    before = applied.do("GET", "/v1/config")
    # The first parts are fine; the policy that goes is still a key's.
    status, _, problem = applied.ask("PUT", "/v1/config", {**without("policies", "ci"), "teams": {"another": {}}})
    assert status == 409 and "ci" in problem["detail"]
    assert applied.ask("PUT", "/v1/config", {**WHOLE, "teams": {"another": {}}, "routes": {"r": {"targets": []}}})[0] == 422
    assert applied.ask("PUT", "/v1/config", {**WHOLE, "credentials": {**WHOLE["credentials"], "third": OPENAI}})[0] == 422, "no secret"
    assert applied.do("GET", "/v1/config") == before
    applied.do("DELETE", f"/v1/keys/{key}")
    assert applied.ask("PUT", "/v1/config", without("policies", "ci"))[0] == 200


def test_of_ten_applies_from_one_revision_one_wins(applied):
    tag = applied.etag("/v1/config")
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda n: applied.ask("PUT", "/v1/config", {**WHOLE, "teams": {f"writer-{n}": {}}}, If_Match=tag), range(10)))
    assert sorted(status for status, _, _ in answers) == [200] + [412] * 9
    won = next(i for i, (status, _, _) in enumerate(answers) if status == 200)
    assert set(applied.do("GET", "/v1/config")["configuration"]["teams"]) == {"by-hand", f"writer-{won}"}
    assert applied.ask("PUT", "/v1/config", WHOLE, If_Match=tag)[0] == 412
    assert applied.ask("PUT", "/v1/config", WHOLE, If_None_Match="*")[0] == 412
    assert applied.ask("PUT", "/v1/config", WHOLE, If_Match=applied.etag("/v1/config"))[0] == 200


def test_what_is_needed_is_not_removed(applied):
    for path, by in (("/v1/pools/prod", "policies.ci.pools.openai"), ("/v1/credentials/first", "pools.prod.credentials[1]")):
        status, _, problem = applied.ask("DELETE", path)
        assert status == 409 and by in problem["detail"], problem
    key = applied.do("POST", "/v1/keys", {"policy": "ci", "team": "by-hand"})["id"]
    for path in ("/v1/policies/ci", "/v1/teams/by-hand"):
        status, _, problem = applied.ask("DELETE", path)
        assert status == 409 and "1 keys" in problem["detail"], problem
    applied.do("DELETE", f"/v1/keys/{key}")
    developer = applied.do("POST", "/v1/admin-tokens", {"role": "developer", "team": "by-hand"})["id"]
    applied.do("POST", "/v1/admin-tokens", {"role": "developer", "team": "by-hand", "expires_in": "0s"})
    assert "1 admin tokens" in applied.ask("DELETE", "/v1/teams/by-hand")[2]["detail"]
    applied.do("DELETE", f"/v1/admin-tokens/{developer}")
    assert applied.ask("DELETE", "/v1/teams/by-hand")[0] == 204
    assert Person(applied.stack, applied.token).do("GET", f"/v1/keys/{key}")["team"] == "by-hand", "a revoked key keeps its history"
