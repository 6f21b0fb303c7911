"""Who may do what. The table below is the promise, written by hand: every operation of /openapi.json stands in it, and each is
tried by everybody with a real token."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from edge import BareGate
from harness import CREDENTIALS, Stack, call, wait_for
from people import Person, Service, admin, organisation, person

SECRET = "sk-proj-Rt5Lq9Wz3Kx7Vb1Nm8Jh4Gf6Ds2Pa0Yo"
EVERYBODY = {"admin", "operator", "auditor", "developer"}
READERS = {"admin", "operator", "auditor"}
KEEPERS = {"admin", "operator"}
KEY_WRITERS = {"admin", "operator", "developer"}
ADMINS = {"admin"}


class World:
    """Objects to try operations on: fresh ones, so that each try meets the same."""

    def __init__(self, stack):
        self.stack, self.admin, self.numbers = stack, admin(stack), itertools.count()
        self.admin.do("PUT", "/v1/teams/mine", {})
        self.admin.do("PUT", "/v1/teams/other", {})

    def name(self):
        return f"ours-{next(self.numbers)}"

    def key(self):
        return self.admin.do("POST", "/v1/keys", {"label": self.name(), "team": "mine"})["id"]

    def put(self, collection, spec):
        name = self.name()
        self.admin.do("PUT", f"/v1/{collection}/{name}", spec)
        return f"/v1/{collection}/{name}"

    def credential(self):
        name = self.name()
        self.admin.do("POST", "/v1/credentials", {"name": name, "provider": "openai", "secret": SECRET})
        return name

    def pool_spec(self):
        return {"provider": "openai", "credentials": [self.credential()]}

    def token(self):
        return self.admin.do("POST", "/v1/admin-tokens", {"role": "auditor", "label": self.name()})["id"]


ROUTE = {"targets": [{"provider": "openai", "model": "gpt-4o"}]}

# Operation: who may, and how to try it (path, body).
OPERATIONS = {
    "GET /v1/whoami": (EVERYBODY, lambda w: ("/v1/whoami", None)),
    "GET /v1/keys": (EVERYBODY, lambda w: ("/v1/keys", None)),
    "POST /v1/keys": (KEY_WRITERS, lambda w: ("/v1/keys", {"label": w.name()})),
    "GET /v1/keys/{id}": (EVERYBODY, lambda w: (f"/v1/keys/{w.key()}", None)),
    "PATCH /v1/keys/{id}": (KEY_WRITERS, lambda w: (f"/v1/keys/{w.key()}", {"label": w.name()})),
    "DELETE /v1/keys/{id}": (KEY_WRITERS, lambda w: (f"/v1/keys/{w.key()}", None)),
    "POST /v1/keys/{id}/rotate": (KEY_WRITERS, lambda w: (f"/v1/keys/{w.key()}/rotate", {})),
    "DELETE /v1/keys/{id}/personal": (KEY_WRITERS, lambda w: (f"/v1/keys/{w.key()}/personal", None)),
    "GET /v1/usage": (EVERYBODY, lambda w: ("/v1/usage?by=key", None)),
    "GET /v1/audit/{key}": (EVERYBODY, lambda w: (f"/v1/audit/{w.key()}", None)),
    "GET /v1/audit/{key}/bundle": (EVERYBODY, lambda w: (f"/v1/audit/{w.key()}/bundle", None)),
    "GET /v1/teams": (EVERYBODY, lambda w: ("/v1/teams", None)),
    "POST /v1/teams": (KEEPERS, lambda w: ("/v1/teams", {"name": w.name(), "spec": {}})),
    "GET /v1/teams/{name}": (EVERYBODY, lambda w: ("/v1/teams/mine", None)),
    "PUT /v1/teams/{name}": (KEEPERS, lambda w: (w.put("teams", {}), {"label": "changed"})),
    "DELETE /v1/teams/{name}": (KEEPERS, lambda w: (w.put("teams", {}), None)),
    "GET /v1/policies": (EVERYBODY, lambda w: ("/v1/policies", None)),
    "POST /v1/policies": (KEEPERS, lambda w: ("/v1/policies", {"name": w.name(), "spec": {}})),
    "GET /v1/policies/{name}": (EVERYBODY, lambda w: (w.put("policies", {}), None)),
    "PUT /v1/policies/{name}": (KEEPERS, lambda w: (w.put("policies", {}), {"label": "changed"})),
    "DELETE /v1/policies/{name}": (KEEPERS, lambda w: (w.put("policies", {}), None)),
    "GET /v1/routes": (EVERYBODY, lambda w: ("/v1/routes", None)),
    "POST /v1/routes": (KEEPERS, lambda w: ("/v1/routes", {"name": w.name(), "spec": ROUTE})),
    "GET /v1/routes/{name}": (EVERYBODY, lambda w: (w.put("routes", ROUTE), None)),
    "PUT /v1/routes/{name}": (KEEPERS, lambda w: (w.put("routes", ROUTE), ROUTE)),
    "DELETE /v1/routes/{name}": (KEEPERS, lambda w: (w.put("routes", ROUTE), None)),
    "GET /v1/pools": (READERS, lambda w: ("/v1/pools", None)),
    "POST /v1/pools": (KEEPERS, lambda w: ("/v1/pools", {"name": w.name(), "spec": w.pool_spec()})),
    "GET /v1/pools/{name}": (READERS, lambda w: (w.put("pools", w.pool_spec()), None)),
    "PUT /v1/pools/{name}": (KEEPERS, lambda w: (w.put("pools", w.pool_spec()), w.pool_spec())),
    "DELETE /v1/pools/{name}": (KEEPERS, lambda w: (w.put("pools", w.pool_spec()), None)),
    "GET /v1/providers": (READERS, lambda w: ("/v1/providers", None)),
    "GET /v1/providers/{name}": (READERS, lambda w: ("/v1/providers/openai", None)),
    "PUT /v1/providers/{name}": (KEEPERS, lambda w: ("/v1/providers/anthropic", {"enabled": True})),
    "DELETE /v1/providers/{name}": (KEEPERS, lambda w: w.admin.do("PUT", "/v1/providers/anthropic", {}) and ("/v1/providers/anthropic", None)),
    "GET /v1/credentials": (READERS, lambda w: ("/v1/credentials", None)),
    "POST /v1/credentials": (KEEPERS, lambda w: ("/v1/credentials", {"name": w.name(), "provider": "openai", "secret": SECRET})),
    "GET /v1/credentials/{name}": (READERS, lambda w: (f"/v1/credentials/{w.credential()}", None)),
    "PATCH /v1/credentials/{name}": (KEEPERS, lambda w: (f"/v1/credentials/{w.credential()}", {"label": "changed"})),
    "POST /v1/credentials/{name}/reset": (KEEPERS, lambda w: (f"/v1/credentials/{w.credential()}/reset", None)),
    "DELETE /v1/credentials/{name}": (KEEPERS, lambda w: (f"/v1/credentials/{w.credential()}", None)),
    "GET /v1/config": (READERS, lambda w: ("/v1/config", None)),
    "PUT /v1/config": (KEEPERS, lambda w: ("/v1/config", {"teams": {"applied": {}}})),
    "POST /v1/config/diff": (READERS, lambda w: ("/v1/config/diff", {"teams": {"planned": {}}})),
    "GET /v1/admin-tokens": (READERS, lambda w: ("/v1/admin-tokens", None)),
    "POST /v1/admin-tokens": (ADMINS, lambda w: ("/v1/admin-tokens", {"role": "auditor", "label": w.name()})),
    "DELETE /v1/admin-tokens/{id}": (ADMINS, lambda w: (f"/v1/admin-tokens/{w.token()}", None)),
    "GET /v1/usage/would-deny": (EVERYBODY, lambda w: ("/v1/usage/would-deny?by=reason", None)),
    "GET /v1/organisation": (READERS, lambda w: ("/v1/organisation", None)),
    "PATCH /v1/organisation": (KEEPERS, lambda w: ("/v1/organisation", {"rates": {"rpm": 1_000_000}})),
    "GET /v1/organisation/webhook-secret": (ADMINS, lambda w: ("/v1/organisation/webhook-secret", None)),
    "GET /v1/organisations": (READERS, lambda w: ("/v1/organisations", None)),
    "POST /v1/organisations": (ADMINS, lambda w: ("/v1/organisations", {"id": f"org_{next(w.numbers)}"})),
    "POST /v1/settlements/import": (KEEPERS, lambda w: ("/v1/settlements/import", b"")),
}


@pytest.fixture(scope="module")
def service():
    with Service() as service:
        yield service


@pytest.fixture(scope="module")
def world(service):
    return World(service)


@pytest.fixture(scope="module")
def people(world):
    """Everybody of this organisation, by role."""
    roles = {role: person(world.stack, role) for role in ("operator", "auditor")}
    return {"admin": world.admin, "developer": person(world.stack, "developer", "mine"), **roles}


@pytest.fixture(scope="module")
def strangers(world):
    """Those whose token is no token."""
    revoked = world.admin.do("POST", "/v1/admin-tokens", {"role": "admin"})
    world.admin.do("DELETE", f"/v1/admin-tokens/{revoked['id']}")
    expired = world.admin.do("POST", "/v1/admin-tokens", {"role": "admin", "expires_in": "0s"})
    key = world.admin.do("POST", "/v1/keys", {})
    edge = (world.stack.directory / "data/edge-token").read_text().strip().removeprefix("Bearer ")
    texts = {"revoked": revoked["token"], "expired": expired["token"], "virtual key": key["token"], "edge token": edge, "nobody": None, "empty": "",
             "made up": "kwa_" + "0" * 64}
    return {name: Person(world.stack, text) for name, text in texts.items()}


def ask(who, operation, world):
    method = operation.split()[0]
    path, body = OPERATIONS[operation][1](world)
    return who.ask(method, path, body)


def test_the_table_has_every_operation(service):
    document = json.loads(call(service.admin_base, "GET", "/openapi.json")[2])
    described = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
    assert described == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_role_may_what_the_table_says(operation, world, people):
    for role, who in people.items():
        status, _, body = ask(who, operation, world)
        if role in OPERATIONS[operation][0]:
            assert 200 <= status < 300, (role, operation, status, body)
        else:
            assert (status, body["title"]) == (403, "forbidden"), (role, operation, status, body)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_who_has_no_valid_token_gets_nothing(operation, world, strangers):
    for name, who in strangers.items():
        status, headers, body = ask(who, operation, world)
        assert (status, body["title"], headers["www-authenticate"]) == (401, "unauthenticated", "Bearer"), (name, operation, status, body)


def test_a_token_that_expires_ends_by_itself(world):
    who, seen = person(world.stack, "auditor", expires_in="1s"), set()
    wait_for("its end", lambda: seen.add(who.ask("GET", "/v1/whoami")[0]) or 401 in seen)
    assert seen <= {200, 401}


@pytest.fixture(scope="module")
def abroad(service):
    """The administrator of an organisation that has nothing."""
    return organisation(service, "org_abroad")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_another_organisation_sees_and_changes_nothing_of_ours(operation, world, abroad, request):
    path, body = OPERATIONS[operation][1](world)
    method = operation.split()[0]
    shown = path.removesuffix("/personal").removesuffix("/rotate").removesuffix("/bundle").removesuffix("/reset")
    ours = world.admin.ask("GET", shown)[2] if "{" in operation and "/admin-tokens/" not in operation else None
    makes = operation in ("PUT /v1/config", "POST /v1/config/diff") or method in ("PUT", "POST") and "{" not in operation
    if makes or operation.startswith("PUT"):
        # It makes one of its own, or may not; that must not touch ours.
        status, _, _ = organisation(world.stack, f"org_by_{next(world.numbers)}").ask(method, path, body)
        assert status in (200, 201, 403, 422), status
    else:
        status, _, answer = abroad.ask(method, path, body)
        if "{" in operation and "/providers/" not in path:
            assert status == 404, (operation, status, answer)
        assert "ours-" not in json.dumps(answer), answer
    assert operation != "POST /v1/organisations" or status == 403
    if ours is not None:
        assert world.admin.ask("GET", shown)[2] == ours


def test_another_organisation_has_its_own_lists_and_chain(world, abroad):
    home = {entry["id"] for entry in admin(world.stack).pages("/v1/organisations", 10)}
    assert {"org_default", "org_abroad"} <= home
    assert [o["id"] for o in abroad.pages("/v1/organisations", 10)] == ["org_abroad"]
    assert abroad.ask("GET", "/v1/audit/adm_org_default")[0] == 404
    assert abroad.ask("GET", "/v1/audit/adm_org_abroad")[0] == 200
    assert admin(world.stack).ask("GET", "/v1/audit/adm_org_abroad")[0] == 404
    assert abroad.ask("POST", "/v1/keys", {"team": "mine"})[2]["field"] == "team"


# --- teams ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def teams(world):
    """Developers of two teams, and a key of the second."""
    a, b = person(world.stack, "developer", "mine"), person(world.stack, "developer", "other")
    return a, b, b.do("POST", "/v1/keys", {"label": "theirs", "tags": {"user": "bea"}})


def test_a_developer_s_key_is_of_their_team(teams):
    assert teams[2]["team"] == "other"
    assert all(key["team"] == "mine" for key in teams[0].pages("/v1/keys", 5))
    assert [team["name"] for team in teams[0].pages("/v1/teams", 5)] == ["mine"]


@pytest.mark.parametrize("method, path, body", [
    ("GET", "/v1/keys/{id}", None), ("PATCH", "/v1/keys/{id}", {"label": "x"}), ("PATCH", "/v1/keys/{id}", {"team": "mine"}),
    ("DELETE", "/v1/keys/{id}", None), ("POST", "/v1/keys/{id}/rotate", {}), ("DELETE", "/v1/keys/{id}/personal", None),
    ("GET", "/v1/audit/{id}", None), ("GET", "/v1/audit/{id}/bundle", None), ("GET", "/v1/audit/adm_org_default", None),
    ("GET", "/v1/audit/adm_org_default/bundle", None), ("GET", "/v1/teams/other", None),
])
def test_what_is_another_team_s_is_not_there(teams, world, method, path, body):
    before = world.admin.do("GET", f"/v1/keys/{teams[2]['id']}")
    missing = teams[0].ask(method, path.replace("{id}", "key_00").replace("other", "none").replace("org_default", "none"), body)
    status, _, answer = teams[0].ask(method, path.replace("{id}", teams[2]["id"]), body)
    assert status == 404 and answer == missing[2], "as good as none, in the same words"
    assert world.admin.do("GET", f"/v1/keys/{teams[2]['id']}") == before


def test_lists_and_sums_of_another_team_are_empty(teams):
    assert teams[0].do("GET", "/v1/keys?team=other") == {"data": []}
    assert teams[0].do("GET", "/v1/usage?team=other&by=key") == {"data": []}
    assert teams[0].do("GET", f"/v1/usage?key={teams[2]['id']}&by=key") == {"data": []}


def test_a_key_can_t_be_made_for_or_moved_to_another_team(teams):
    assert teams[0].ask("POST", "/v1/keys", {"team": "other"})[0] == 403
    own = teams[0].do("POST", "/v1/keys", {})["id"]
    for team in ("other", None, "none"):
        assert teams[0].ask("PATCH", f"/v1/keys/{own}", {"team": team})[0] == 403


# --- limits of a team ------------------------------------------------------------------------------------------------------

def limited(world, **limits):
    """A developer of a new team with these limits."""
    name = world.name()
    world.admin.do("PUT", f"/v1/teams/{name}", limits)
    return name, person(world.stack, "developer", name)


def test_a_team_has_no_more_keys_than_it_may_however_they_come_to_be(world):
    team, who = limited(world, max_keys=3)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: who.ask("POST", "/v1/keys", {}), range(20)))
    assert sorted(status for status, _, _ in answers) == [201] * 3 + [422] * 17
    assert {body["field"] for status, _, body in answers if status == 422} == {"team"}
    # One that ends makes room; one that comes back to life, or comes from elsewhere, needs it.
    first, second, _ = (body["id"] for status, _, body in answers if status == 201)
    who.do("PATCH", f"/v1/keys/{first}", {"expires_in": "0s"})
    who.do("POST", "/v1/keys", {})
    status, _, body = who.ask("PATCH", f"/v1/keys/{first}", {"expires_in": None})
    assert (status, body["field"]) == (422, "team")
    elsewhere = world.admin.do("POST", "/v1/keys", {})["id"]
    assert world.admin.ask("PATCH", f"/v1/keys/{elsewhere}", {"team": team})[2]["field"] == "team"
    assert who.ask("PATCH", f"/v1/keys/{second}", {"label": "still mine"})[0] == 200
    who.do("DELETE", f"/v1/keys/{second}")
    assert who.ask("PATCH", f"/v1/keys/{first}", {"expires_in": None})[0] == 200


def test_a_key_s_budget_keeps_to_its_team_s_limit(world):
    _, who = limited(world, max_key_usd="5.00")
    def budget(usd):
        return {"budgets": [{"usd": usd, "window": "total"}]}

    for body in ({}, budget("5.000000001"), {"policy": world.put("policies", budget("6")).rsplit("/", 1)[1]}):
        assert who.ask("POST", "/v1/keys", body)[2]["field"] == "budgets", body
    key = who.do("POST", "/v1/keys", budget("5.00"))["id"]
    for change in (budget("5.01"), {"budgets": []}, {"budgets": None}):
        assert who.ask("PATCH", f"/v1/keys/{key}", change)[2]["field"] == "budgets", change
    assert who.do("PATCH", f"/v1/keys/{key}", budget("1.00"))["budget_usd"] == "1.00"


def test_a_key_s_life_keeps_to_its_team_s_limit_counted_from_its_making(world):
    _, who = limited(world, max_expires_in="1h")
    for body in ({}, {"expires_in": "61m"}):
        assert who.ask("POST", "/v1/keys", body)[2]["field"] == "expires_in", body
    key = who.do("POST", "/v1/keys", {"expires_in": "30m"})["id"]
    time.sleep(0.01)
    for expires_in in (None, "1h", "2h"):
        assert who.ask("PATCH", f"/v1/keys/{key}", {"expires_in": expires_in})[2]["field"] == "expires_in", expires_in
    assert who.ask("PATCH", f"/v1/keys/{key}", {"expires_in": "50m"})[0] == 200


def test_what_an_operator_must_look_at_a_developer_can_t_let_go_on(world):
    who, gate = person(world.stack, "developer", "mine"), BareGate(world.stack)
    world.credential()
    key = who.do("POST", "/v1/keys", {"budgets": [{"usd": "1.00", "window": "total"}]})
    req, answer = gate.admit(key["token"])
    assert "plan" in answer, answer
    # The provider says that it was far dearer than anything that the request allowed.
    gate.settle(gate.record(req, "complete", status=200, usage={"in": 10, "out": 1_000_000}))
    assert who.do("GET", f"/v1/keys/{key['id']}")["status"] == "frozen"
    assert who.ask("PATCH", f"/v1/keys/{key['id']}", {"status": "active"})[0] == 403
    assert world.admin.do("PATCH", f"/v1/keys/{key['id']}", {"status": "active"})["status"] == "active"


# --- spending --------------------------------------------------------------------------------------------------------------

def test_each_organisation_spends_with_its_own_credentials_only():
    theirs = "sk-proj-Zx8Cv7Bn6Mq5Lw4Ke3Jr2Ht1Gy0FuTiDs"
    with Stack() as stack:
        stack.sim.put("/control/credentials", [*CREDENTIALS, {"id": "openai-theirs", "provider": "openai", "secret": theirs}])
        other = organisation(stack, "org_theirs")
        key = other.do("POST", "/v1/keys", {})
        stack.tokens.append(key["token"])
        # Without a credential of its own it has none, however many others there are.
        status, headers, _ = stack.chat(key["token"])
        assert (status, headers["x-keyward-reason"]) == (429, "pool_exhausted")
        other.do("POST", "/v1/credentials", {"provider": "openai", "secret": theirs})
        ours_id, ours = stack.new_key()
        for token, times in ((key["token"], 7), (ours, 5)):
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(lambda _: stack.chat(token)[0], range(times))) == [200] * times
        stack.sim.quiet()
        totals = stack.sim.totals()
        counts = {name: sum(count["by_status"].values()) for name, count in totals["credentials"].items()}
        assert (counts["openai-theirs"], counts["openai-1"]) == (7, 5), counts
        assert totals["violations"] == []
        stack.settled(ours_id)
        wait_for("theirs settled", lambda: other.do("GET", f"/v1/keys/{key['id']}")["in_flight"] == 0)
        assert other.do("GET", "/v1/usage")["data"][0]["requests"] == 7
        assert admin(stack).do("GET", "/v1/usage")["data"][0]["requests"] == 5
