"""What operators see: every documented metric exists, has its type and unit, and counts what really happened; dashboard and
alerts ask only for metrics that exist; log lines are JSON and carry the caller's trace."""

import collections
import contextlib
import json
import os
import re
import secrets
import socket
import time

import promql_parser
import pytest
import yaml
from harness import CREDENTIALS, PROVIDERS, ROOT, Stack, call, wait_for
from test_canary import everything, installation, unissued

DOCS = (ROOT / "docs/metrics.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
DASHBOARD = json.loads((ROOT / "envoy/grafana-dashboard.json").read_text())
ALERTS = yaml.safe_load((ROOT / "envoy/alerts.yaml").read_text())
# Every code that a refusal can have.
REASONS = set("""
    missing_key unknown_key revoked expired model_not_allowed endpoint_not_allowed state_not_owned unknown_provider unknown_model bad_request
    unbounded_input body_too_large cap_exhausted cap_reserved quota_exhausted rate_limited concurrency_limited pool_exhausted provider_credential_rejected provider_unreachable policy_unavailable audit_unavailable
""".split())
# Suffixes that say the unit, by the unit of the table.
SUFFIXES = {"seconds": "seconds", "microseconds": "microseconds", "nanodollars": "nanodollars", "bytes": "bytes"}
SERIES = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)')


def documented(section):
    """name -> (type, unit, labels) of one table of docs/metrics.md."""
    table = DOCS.split(f"<!-- {section} -->")[1].split(f"<!-- /{section} -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): (row[1], row[2], set(re.findall(r"`(\w+)`", row[3]))) for row in rows}


SERVICE, FILTER = documented("service"), documented("filter")


class Scrape:
    """One reading of a /metrics page."""

    def __init__(self, text):
        self.text, self.types, self.help, self.series = text, {}, {}, []
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ", 3)
                assert name not in self.types, f"two families of the name {name}"
                self.types[name] = kind
            elif line.startswith("# HELP "):
                _, _, name, meaning = line.split(" ", 3)
                self.help[name] = meaning
            elif line:
                name, labels, value = SERIES.fullmatch(line).groups()
                self.series.append((name, dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")), float(value)))

    def sum(self, name, **labels):
        return sum(value for n, l, value in self.series if n == name and labels.items() <= l.items())

    def by(self, name, label):
        return {l[label]: value for n, l, value in self.series if n == name and value}

    def family(self, name):
        """The documented name of a series: a histogram has three."""
        for base in (name, re.sub(r"_(bucket|sum|count)$", "", name)):
            if base in self.types:
                return base
        raise AssertionError(f"{name} has no TYPE")


def service(stack):
    return Scrape(call(stack.admin_base, "GET", "/metrics")[2].decode())


def envoy(stack):
    return Scrape(call(f"http://127.0.0.1:{stack.envoy_admin_port}", "GET", "/stats/prometheus")[2].decode())


def lines(stack):
    """The service's log, line by line: all of it is JSON."""
    return [json.loads(line) for line in stack.service.log.read_text().splitlines()]


class Traffic:
    """What a run did, as the test itself counted it."""

    def __init__(self, stack):
        self.stack, self.admitted, self.refused, self.offline = stack, collections.Counter(), collections.Counter(), collections.Counter()
        self.trace, self.span = secrets.token_hex(16), secrets.token_hex(8)
        self.key_id, self.token = stack.new_key("5.00")
        self.narrow_id, self.narrow = stack.new_key(allow={"models": ["gpt-4o"]})
        self.revoked_id, self.revoked = stack.new_key()
        stack.admin("DELETE", f"/v1/keys/{self.revoked_id}")
        self.traceparent = {"traceparent": f"00-{self.trace}-{self.span}-01", "tracestate": "vendor=1"}

    def message(self, token, **more):
        body = {"model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}], **more}
        return call(self.stack.base, "POST", "/v1/messages", body, {"x-api-key": token, "anthropic-version": "2023-06-01"})

    def good(self, count, operation, answer):
        for _ in range(count):
            status, _, body = answer()
            assert status == 200, body
        self.admitted[operation] += count

    def bad(self, count, reason, answer, asked=True):
        for _ in range(count):
            _, headers, body = answer()
            assert headers.get("x-keyward-reason") == reason, (headers, body)
        (self.refused if asked else self.offline)[reason] += count

    def run(self):
        chat, stack = self.stack.chat, self.stack
        self.good(7, ("openai", "chat"), lambda: chat(self.token, max_tokens=40))
        self.good(3, ("openai", "chat"), lambda: chat(self.token, model="gpt-4o", stream=True, content="[[sim cache_read=5]] Hello"))
        self.good(1, ("openai", "chat"), lambda: chat(self.token, headers=self.traceparent))
        self.good(4, ("anthropic", "messages"), lambda: self.message(self.token))
        cached = [{"role": "user", "content": "[[sim cache_read=3 cache_write=2]] Hello"}]
        self.good(1, ("anthropic", "messages"), lambda: self.message(self.token, messages=cached))
        self.good(2, ("openai", "models"), lambda: call(stack.base, "GET", "/v1/models", headers={"authorization": f"Bearer {self.token}"}))
        self.bad(3, "unknown_key", lambda: chat(unissued()))
        self.bad(2, "model_not_allowed", lambda: chat(self.narrow))
        self.bad(2, "revoked", lambda: chat(self.revoked, headers=self.traceparent))
        self.bad(1, "unbounded_input", lambda: chat(self.token, tools=[{"type": "web_search"}]))
        self.bad(5, "missing_key", lambda: call(stack.base, "POST", "/v1/chat/completions", {}), asked=False)
        self.bad(2, "unknown_provider", lambda: chat(self.token, path="/Nobody/v1/chat/completions"), asked=False)
        self.bad(1, "bad_request", lambda: chat(self.token, stream="perhaps"), asked=False)
        stack.settled(self.key_id)
        stack.sim.quiet()
        return self


@pytest.fixture(scope="module")
def traffic():
    with Stack(concurrency=2, service_env={"KEYWARD_LOG_FORMAT": "json", "RUST_LOG": "trace"}) as stack:
        yield Traffic(stack).run()


# --- the tables --------------------------------------------------------------------------------------------------------


def check_units(table):
    for name, (kind, unit, _) in table.items():
        assert (kind == "counter") == name.endswith("_total"), name
        suffix = SUFFIXES.get(unit)
        assert suffix is None or name.removesuffix("_total").endswith(f"_{suffix}"), (name, unit)
        assert suffix or not any(name.removesuffix("_total").endswith(f"_{other}") for other in SUFFIXES.values()), (name, unit)


def test_units_are_in_the_names():
    check_units(SERVICE)
    check_units(FILTER)
    assert not set(SERVICE) & set(FILTER), "one Prometheus takes both"


def test_the_service_shows_what_is_documented_and_nothing_else(traffic):
    scrape = service(traffic.stack)
    assert {name: (kind, *SERVICE[name][1:]) for name, kind in scrape.types.items()} == SERVICE
    assert set(scrape.help) == set(SERVICE)
    for name, labels, _ in scrape.series:
        assert set(labels) - {"le"} == SERVICE[scrape.family(name)][2], (name, labels)


def test_envoy_shows_what_is_documented_and_nothing_else(traffic):
    wait_for("merged histograms", lambda: envoy(traffic.stack).sum("keyward_admission_wait_microseconds_count") > 0)
    scrape = envoy(traffic.stack)
    ours = {name: kind for name, kind in scrape.types.items() if name.startswith("keyward_")}
    assert {name: (kind, *FILTER[name][1:]) for name, kind in ours.items()} == FILTER
    for name, labels, _ in scrape.series:
        if name.startswith("keyward_"):
            assert set(labels) - {"le"} == FILTER[scrape.family(name)][2], (name, labels)


# --- the figures -------------------------------------------------------------------------------------------------------


def test_admissions_and_refusals_are_those_that_happened(traffic):
    stack = traffic.stack
    scrape = service(stack)
    counted = {(l["provider"], l["operation"]): value for name, l, value in scrape.series if name == "keyward_admissions_total" and value}
    assert counted == traffic.admitted
    assert scrape.by("keyward_refusals_total", "reason") == traffic.refused
    everyone = sum(traffic.admitted.values())
    assert scrape.sum("keyward_admit_duration_seconds_count") == everyone + sum(traffic.refused.values())
    assert scrape.sum("keyward_settlements_total") == everyone
    for name in ("keyward_records_missing_total", "keyward_records_rejected_total", "keyward_records_unknown_total", "keyward_store_errors_total",
                 "keyward_keys_frozen_total", "keyward_holds_expired_total", "keyward_voids_total", "keyward_admission_conflicts_total"):
        assert scrape.sum(name) == 0, name
    # What the gate refused by itself is reported after 15 s at most.
    wait_for("the report of offline refusals", lambda: service(stack).by("keyward_edge_refusals_total", "reason") == traffic.offline, 40)

    def told():
        seen = envoy(stack)
        return (seen.sum("keyward_admitted_total") == everyone and seen.by("keyward_refused_by_reason_total", "reason") == traffic.refused + traffic.offline
                and seen.sum("keyward_refused_total") == sum((traffic.refused + traffic.offline).values())
                and seen.sum("keyward_admission_wait_microseconds_count") == everyone + sum(traffic.refused.values()))
    wait_for("Envoy's counts", told)
    seen = envoy(stack)
    for name in ("keyward_streams_open", "keyward_waiting_bytes", "keyward_held_bytes", "keyward_settlements_pending", "keyward_settlement_batches_failed_total"):
        assert seen.sum(name) == 0, name
    # Two workers, and the VM of the main thread.
    assert seen.sum("keyward_vm_starts_total") == 3


def test_tokens_and_money_are_the_providers(traffic):
    """Every token and every nanodollar that the simulator charged, by model; dollars are only a quotient of it."""
    calls = [entry for entry in traffic.stack.sim.ledger() if entry["cost_nanodollars"]]
    tokens, money = collections.Counter(), collections.Counter()
    for entry in calls:
        cache = {"cache_read": entry["cache_read_tokens"], "cache_write": entry["cache_write_tokens"]}
        # The simulator's books have cached tokens among those of the prompt.
        for direction, count in {"input": entry["prompt_tokens"] - sum(cache.values()), "output": entry["completion_tokens"], **cache}.items():
            tokens[entry["provider"], entry["model"], direction] += count
        money[entry["provider"], entry["model"]] += entry["cost_nanodollars"]
    assert len(calls) == 16 and tokens["openai", "gpt-4o", "cache_read"] > 0 and tokens["anthropic", "claude-haiku-4-5", "cache_write"] > 0
    scrape = service(traffic.stack)
    assert {(l["provider"], l["model"]): value for name, l, value in scrape.series if name == "keyward_spent_nanodollars_total" and value} == money
    assert {(l["provider"], l["model"], l["direction"]): value for name, l, value in scrape.series
            if name == "keyward_tokens_total" and value} == {key: count for key, count in tokens.items() if count}
    assert scrape.sum("keyward_spent_nanodollars_total") == traffic.stack.key(traffic.key_id)["spent_nanodollars"]
    assert scrape.sum("keyward_returned_nanodollars_total") == 0


def test_gauges_show_the_ledger(traffic):
    stack = traffic.stack
    with held_request(stack, traffic.token, 6000):
        wait_for("the gauges of an open request", lambda: envoy(stack).sum("keyward_streams_open") == 1)
        time.sleep(1.1)
        scrape = service(stack)
        assert scrape.sum("keyward_holds") == 1 and scrape.sum("keyward_reserved_nanodollars") == stack.key(traffic.key_id)["reserved_nanodollars"] > 0
        assert 0.5 < scrape.sum("keyward_hold_oldest_age_seconds") < 60
    stack.settled(traffic.key_id)
    traffic.admitted["openai", "chat"] += 1
    stack.sim.quiet()
    time.sleep(1.1)
    scrape = service(stack)
    assert (scrape.sum("keyward_holds"), scrape.sum("keyward_reserved_nanodollars"), scrape.sum("keyward_hold_oldest_age_seconds")) == (0, 0, 0)
    assert scrape.by("keyward_keys", "status") == {"active": 2, "revoked": 1}
    entries = sum(len(stack.audit(key_id)) for key_id in (traffic.key_id, traffic.narrow_id, traffic.revoked_id))
    own = stack.admin("GET", "/v1/audit/adm_org_default?limit=1000")["data"]
    assert scrape.sum("keyward_audit_entries") == entries + len(own)
    assert scrape.by("keyward_pool_credentials", "provider") == {"openai": 1, "anthropic": 1}
    assert scrape.sum("keyward_ready") == 1 and abs(scrape.sum("keyward_clock_seconds") - time.time()) < 60
    assert scrape.sum("process_start_time_seconds") < time.time()
    assert re.fullmatch(r"\d+\.\d+\.\d+", next(l["version"] for name, l, _ in scrape.series if name == "keyward_build_info"))


@contextlib.contextmanager
def held_request(stack, token, first_ms=2500):
    """A streamed request under way; it is read to its end afterwards."""
    content = f"[[sim first_ms={first_ms}]] Hello"
    body = json.dumps({"model": "gpt-4o-mini", "stream": True, "max_tokens": 20, "messages": [{"role": "user", "content": content}]})
    with socket.create_connection(("127.0.0.1", stack.listen_port), timeout=30) as s:
        s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n"
                  f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        yield
        while s.recv(65536):
            pass


def test_no_label_has_an_unbounded_value_or_a_secret(traffic):
    stack = traffic.stack
    for n in range(20):
        stack.chat(traffic.token, model=f"made-up-{n}-{traffic.token}")
        call(stack.admin_base, "GET", f"/v1/keys/key_{n}", headers={"authorization": f"Bearer {stack.admin_token}"})
        call(stack.admin_base, "BREW", f"/v1/pot/{traffic.token}", headers={"authorization": f"Bearer {traffic.token}"})
    stack.settled(traffic.key_id)
    pages = {"service": service(stack), "envoy": envoy(stack)}
    for page in pages.values():
        for name, labels, _ in page.series:
            if not name.startswith("keyward_"):
                continue
            assert labels.get("reason", "revoked") in REASONS
            assert labels.get("model", "other") in {"other", "gpt-4o", "gpt-4o-mini", "claude-haiku-4-5"}, labels
            assert labels.get("provider", "openai") in {*PROVIDERS, "other"}
            assert labels.get("method", "GET") in {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "other"}
            assert re.fullmatch(r"(/[a-z0-9.{}*_]+)+|other", labels.get("route", "other")), labels
            assert not re.search(r"key_[0-9a-f]|req_[0-9a-f]|vk_|made-up", json.dumps(labels)), labels
    places = {name: page.text.encode() for name, page in pages.items()} | {"log": stack.service.log.read_bytes()}
    assert everything(stack).hits(places) == [] and installation(stack).hits(places) == []
    # Even when everything is logged that can be: no prompt, no answer, nothing that a caller wrote.
    assert b"made-up" not in places["log"] and b"Hello" not in places["log"] and b"vendor=1" not in places["log"]


def test_a_trap_shows_and_the_gauges_forget_its_streams():
    """A reload is a VM start; what the dead VM had open does not stay in the gauges for ever."""
    with Stack(concurrency=1, filter_module=os.environ["TRAP_FILTER"]) as stack:
        _, token = stack.new_key("1.00")
        assert stack.chat(token)[0] == 200
        wait_for("the first count", lambda: envoy(stack).sum("keyward_vm_starts_total") == 2)
        with held_request(stack, token):
            wait_for("an open stream", lambda: envoy(stack).sum("keyward_streams_open") == 1)
            stack.chat(token, headers={"x-test-trap": "1"})
        wait_for("serving again", lambda: stack.chat(token)[0] == 200)
        wait_for("a reload", lambda: envoy(stack).sum("keyward_vm_starts_total") == 3)
        wait_for("true gauges", lambda: envoy(stack).sum("keyward_streams_open") == 0, 20)
        # And they go on counting right.
        with held_request(stack, token):
            wait_for("an open stream", lambda: envoy(stack).sum("keyward_streams_open") == 1)
        wait_for("true gauges", lambda: envoy(stack).sum("keyward_streams_open") == 0)


# --- dashboard and alerts ----------------------------------------------------------------------------------------------


def names(node):
    """Metric names in a PromQL expression, from its syntax tree."""
    if isinstance(node, promql_parser.VectorSelector):
        assert node.name, "every selector names its metric"
        return {node.name}
    found = set()
    for field in ("expr", "lhs", "rhs", "param", "args", "vs", "vector_selector"):
        child = getattr(node, field, None)
        for part in child if isinstance(child, list) else [child]:
            if isinstance(part, promql_parser.Expr):
                found |= names(part)
    return found


def asked(expression):
    for variable in ("$__rate_interval", "$__range"):
        expression = expression.replace(variable, "5m")
    found = names(promql_parser.parse(expression))
    assert found, expression
    return found


def panels():
    found = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    return found + [inner for row in DASHBOARD["panels"] for inner in row.get("panels", [])]


def rules():
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def test_dashboard_and_alerts_ask_for_what_exists(traffic):
    """Found in a running system, or the form of a documented name that Envoys without the stats tag show."""
    exists = {name for page in (service(traffic.stack), envoy(traffic.stack)) for name, _, _ in page.series}
    exists |= {f"keyward_refused_by_reason_{reason}_total" for reason in REASONS}
    expressions = {(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]}
    expressions |= {(rule["alert"], rule["expr"]) for rule in rules()}
    missing = {(where, name) for where, expression in expressions for name in asked(expression) if name not in exists}
    assert missing == set()
    shown = {name for _, expression in expressions for name in asked(expression)}
    unseen = {*SERVICE, *FILTER} - shown - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert unseen == {"keyward_edge_refusals_total", "keyward_edge_batches_total", "keyward_admin_unauthenticated_total", "process_start_time_seconds"}


def test_the_dashboard_is_one_that_grafana_loads():
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["uid"] == "keyward" and "id" not in DASHBOARD
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"], panel["title"]
        assert all(target["datasource"] == panel["datasource"] and target["refId"] for target in panel["targets"])


def test_alerts_are_rules_that_prometheus_loads():
    """The fields that Prometheus knows, and a heading in the runbook for each alert."""
    headings = set(re.findall(r"^### (\w+)$", OPERATIONS, re.M))
    assert set(ALERTS) == {"groups"} and all(set(group) <= {"name", "rules", "interval"} for group in ALERTS["groups"])
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule
        assert rule["labels"]["severity"] in {"critical", "warning"} and rule["annotations"]["summary"]
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
    assert headings == {rule["alert"] for rule in rules()} and len(headings) == len(rules())


# --- logs --------------------------------------------------------------------------------------------------------------


def test_every_log_line_is_json_with_its_fields(traffic):
    found = lines(traffic.stack)
    assert len(found) > 20
    for line in found:
        assert set(line) >= {"timestamp", "level", "target", "message"}, line
        assert line["target"].startswith("keyward") or line["level"] in ("INFO", "WARN", "ERROR"), "libraries tell no details"
    admitted = [line for line in found if line["message"] == "admitted"]
    chain = {f"req_{entry['req']}" for entry in traffic.stack.audit(traffic.key_id) if entry["event"] == "ADMITTED"}
    assert {line["request_id"] for line in admitted} == chain
    assert chain <= {line["request_id"] for line in found if line["message"] == "settled"}
    assert {line["gen_ai.provider.name"] for line in admitted} == {"openai", "anthropic"}


def test_the_callers_trace_is_in_the_log_and_none_is_made_up(traffic):
    traced = [line for line in lines(traffic.stack) if "trace_id" in line]
    assert {(line["trace_id"], line["span_id"]) for line in traced} == {(traffic.trace, traffic.span)}
    assert sorted(line["message"] for line in traced) == ["admitted", "refused", "refused"]
    assert {line.get("reason") for line in traced} == {None, "revoked"}
    # A header that is no traceparent is as good as none.
    for wrong in ("00-" + "0" * 32 + f"-{traffic.span}-01", f"ff-{traffic.trace}-{traffic.span}-01", f"00-{traffic.trace}-{traffic.span}", "vk_x"):
        assert traffic.stack.chat(traffic.token, headers={"traceparent": wrong})[0] == 200
    assert [line for line in lines(traffic.stack) if "trace_id" in line] == traced


def test_the_provider_gets_the_callers_trace_unchanged_and_no_other():
    with Stack(concurrency=1) as stack:
        _, token = stack.new_key()
        parent = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
        for sent in ({}, {"traceparent": parent, "tracestate": "a=1"}):
            assert stack.chat(token, headers=sent)[0] == 200
            headers = dict(stack.sim.headers(stack.last_seq()))
            assert {name: value for name, value in headers.items() if name.startswith("trace")} == sent
        assert CREDENTIALS[0]["secret"] not in stack.service.log.read_text()
