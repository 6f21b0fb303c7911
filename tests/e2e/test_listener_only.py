"""What the files for Istio and Envoy Gateway patch into a listener works there: each is applied, as its kind says, to an Envoy whose
routes lead by host, as a mesh's do, and whose clusters know nothing of Keyward. Istio and Envoy Gateway themselves are not run."""

import copy
import json

import pytest
import yaml

from harness import CREDENTIALS, KEYWARD_BIN, ROOT, Stack, pool, subprocess

HOSTS = {"openai": "api.openai.com", "anthropic": "api.anthropic.com"}
HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


def address(host, port):
    return {"socket_address": {"address": host, "port_value": port}}


def cluster(name, host, port):
    return {"name": name, "type": "STRICT_DNS", "connect_timeout": "1s",
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(host, port)}}]}]}}


def merged(into, what):
    for key, value in what.items():
        into[key] = merged(into.get(key, {}), value) if isinstance(value, dict) else value
    return into


def istio(hcm, routes):
    """Gives the gate's filter and the clusters that are added; the rest of the patches goes into hcm and routes."""
    clusters, gate = [], None
    for patch in documents("istio.yaml")["EnvoyFilter"]["spec"]["configPatches"]:
        kind, value = patch["applyTo"], copy.deepcopy(patch["patch"]["value"])
        if kind == "HTTP_FILTER":
            assert patch["patch"]["operation"] == "INSERT_BEFORE"
            gate = value
        elif kind == "NETWORK_FILTER":
            merged(hcm, value["typed_config"])
        elif kind == "HTTP_ROUTE":
            for route in routes:
                merged(route, value)
        elif kind == "CLUSTER":
            clusters.append(value)
        else:
            raise AssertionError(f"{kind} is not applied here")
    return gate, clusters


def envoy_gateway(hcm, routes):
    clusters, gate = [], None
    for patch in documents("envoy-gateway.yaml")["EnvoyPatchPolicy"]["spec"]["jsonPatches"]:
        operation = patch["operation"]
        assert operation["op"] == "add"
        if patch["type"].endswith("Listener"):
            assert operation["path"] == "/default_filter_chain/filters/0/typed_config/http_filters/0"
            gate = operation["value"]
        else:
            clusters.append(operation["value"])
    return gate, clusters


def documents(name):
    return {document["kind"]: document for document in yaml.safe_load_all((ROOT / "envoy" / name).read_text())}


class Mesh(Stack):
    """An Envoy of somebody's mesh, patched."""

    patches = None

    def start_envoy(self):
        module = self.directory / "filter.wasm"
        subprocess.run([KEYWARD_BIN, "filter", "export", str(module)], check=True)
        token = yaml.safe_load(documents("istio.yaml")["ConfigMap"]["data"]["edge-token-sds.yaml"])
        token["resources"][0]["generic_secret"]["secret"]["filename"] = str(self.directory / "data/edge-token")
        (self.directory / "sds.yaml").write_text(yaml.safe_dump(token))

        hcm = {"@type": HCM, "stat_prefix": "mesh", "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]}
        routes = [{"match": {"prefix": "/"}, "route": {}} for _ in HOSTS]
        gate, clusters = self.patches(hcm, routes)
        settings = gate["typed_config"]["config"]["configuration"]["value"]
        names = json.loads(settings)["clusters"]
        assert set(names) == set(HOSTS)
        host, port = self.sim.api.removeprefix("http://").split(":")
        for route, (provider, name) in zip(routes, names.items()):
            route["route"]["cluster"] = name
            clusters.append(cluster(name, host, int(port)))
        hcm["route_config"] = {"virtual_hosts": [
            {"name": provider, "domains": [HOSTS[provider], f"{HOSTS[provider]}:*"], "routes": [route]} for provider, route in zip(names, routes)] + [
            {"name": "agents", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 404}}]}]}
        hcm["http_filters"].insert(0, gate)
        config = {
            "node": {"id": "mesh", "cluster": "mesh"},
            "admin": {"address": address("127.0.0.1", self.envoy_admin_port)},
            "static_resources": {"clusters": clusters, "listeners": [{
                "name": "gateway", "address": address("127.0.0.1", self.listen_port),
                "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": hcm}]}]}]},
        }
        text = json.dumps(config)
        for ours, here in (("/etc/keyward/filter.wasm", str(module)), ("/etc/keyward/edge-token-sds.yaml", str(self.directory / "sds.yaml")),
                           ("keyward.keyward.svc.cluster.local", "127.0.0.1"), ('"port_value": 7801', f'"port_value": {self.edge_port}')):
            assert ours in text, ours
            text = text.replace(ours, here)
        (self.directory / "envoy.yaml").write_text(text)
        self.spawn_envoy()


@pytest.mark.parametrize("patches", [istio, envoy_gateway])
def test_the_patches_work_in_a_gateway_that_knows_nothing_else(patches):
    keys = pool(4)
    with type("Patched", (Mesh,), {"patches": staticmethod(patches)})(concurrency=2, credentials=keys + [CREDENTIALS[1]]) as mesh:
        key_id, token = mesh.new_key("1.00")
        for key in keys[:3]:
            mesh.sim.fault("status=429 retry_after=30", count=1000, credential=key["id"])
        for number in range(8):
            status, headers, body = mesh.chat(token, f"Say it {number}. [[sim echo=1]]", stream=number % 2 == 1)
            assert status == 200, body
            if number % 2:
                assert body.endswith(b"data: [DONE]\n\n")
            else:
                assert f"Say it {number}" in json.loads(body)["choices"][0]["message"]["content"]
            assert 1 <= int(headers["x-keyward-attempts"]) <= 4
        status, headers, _ = mesh.chat("vk_" + "0" * 49, "Hello")
        assert (status, headers["x-keyward-reason"]) == (401, "unknown_key")
        true, charged, ends = mesh.books(key_id)
        assert true == charged > 0 and len(ends) == 8
        served = [call["credential"] for call in mesh.sim.ledger() if call["status"] == 200]
        assert served == [keys[3]["id"]] * 8
        limited = [call["credential"] for call in mesh.sim.ledger() if call["status"] == 429]
        assert sorted(limited) == sorted({key["id"] for key in keys[:3]} & set(limited)), "each limited key is asked once"
        assert not mesh.sim.totals()["violation_count"], mesh.sim.totals()["violations"]
