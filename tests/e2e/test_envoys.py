"""The configuration works on every Envoy it is rendered for, and over verified TLS on both sides."""

import re
import ssl
import subprocess
import urllib.request

import pytest
from fleet import Reader
from harness import ENVOY_BIN, KEYWARD_BIN, ROOT, Stack, call, wait_for

VERSIONS = [line.split()[0] for line in (ROOT / "tools/envoy-versions.txt").read_text().splitlines() if re.match(r"1\.\d+\.\d+\s", line)]


@pytest.mark.parametrize("version", sorted(set(VERSIONS)))
def test_a_request_goes_through_every_supported_envoy(version):
    binary = subprocess.run([ROOT / "tools/fetch-envoy", version], check=True, capture_output=True, text=True).stdout.strip()
    with Stack(envoy_bin=binary, envoy_minor=int(version.split(".")[1])) as stack:
        key_id, token = stack.new_key("1.00")
        status, _, body = stack.chat(token, "[[sim tokens=20]]", stream=True)
        assert status == 200 and b"[DONE]" in body and b"prompt_tokens" not in body
        stack.settled(key_id)
        stack.sim.quiet()
        assert stack.key(key_id)["spent_nanodollars"] == stack.sim.totals()["overall"]["cost_nanodollars"]
        with Reader() as reader:
            silent, waits, streams = "tokens=300 pace_ms=20000", "first_ms=20000", "tokens=2900 pace_ms=40"
            key = stack.new_key("50.00")
            asked = [reader.open(stack.listen_port, key, words) for words in (streams, silent, waits)]
            reader.wait_flowing(asked[:2], 1)
            wait_for("the provider at work", lambda: stack.key(key[0])["in_flight"] == 3)
            stack.admin("DELETE", f"/v1/keys/{key[0]}")
            reader.wait_closed(asked[:2])
            wait_for("the refusal", lambda: b"revoked" in asked[2].data)
            assert [stream.ended_by() for stream in asked[:2]] == ["revoked", None] and asked[2].status == 401
            assert {end["outcome"] for end in stack.books(key[0])[2]} == {"ended:revoked"}
        assert stack.unadmitted([key_id, key[0]]) == [] and stack.sim.totals()["violations"] == []


@pytest.mark.parametrize("version", sorted(set(VERSIONS)))
def test_every_supported_envoy_repeats_a_try_by_callout(version):
    """And shows the provider's last word, not its own, although its own first try never connected."""
    binary = subprocess.run([ROOT / "tools/fetch-envoy", version], check=True, capture_output=True, text=True).stdout.strip()
    with Stack(envoy_bin=binary, envoy_minor=int(version.split(".")[1]), rotation="callout", render_options=("--provider", "dead=http://127.0.0.1:9")) as stack:
        stack.admin("PUT", "/v1/providers/dead", {"dialect": "openai", "url": "http://127.0.0.1:9"})
        stack.admin("POST", "/v1/credentials", {"provider": "dead", "label": "dead", "secret": "gsk_Dm3LqV8xTz5KrWf2CjNp9SbYh6EgXa4U"})
        targets = [{"provider": "dead", "model": "llama-3.3-70b-versatile"}, {"provider": "openai", "model": "gpt-4o-mini"}]
        stack.admin("PUT", "/v1/routes/dead-first", {"targets": targets})
        _, token = stack.new_key()
        status, headers, _ = stack.chat(token, model="dead-first")
        assert (status, headers["x-keyward-served-by"], headers["x-keyward-attempts"]) == (200, "openai/gpt-4o-mini", "2")
        stack.sim.fault("status=500")
        status, headers, body = stack.chat(token, model="dead-first")
        assert (status, headers.get("x-keyward-reason")) == (500, None) and b"provider_unreachable" not in body


def test_validate_finds_a_broken_configuration(tmp_path):
    file = tmp_path / "envoy.yaml"
    file.write_text("static_resources: {listeners: [{no_such_field: 1}]}")
    result = subprocess.run([KEYWARD_BIN, "envoy", "validate", file], capture_output=True, text=True, env={"ENVOY_BIN": ENVOY_BIN, "PATH": "/usr/bin:/bin"})
    assert result.returncode == 1 and "no_such_field" in result.stderr


def test_providers_are_reached_over_verified_tls(tmp_path):
    certificates = tmp_path / "tls"
    certificates.mkdir()
    options = ("--tls-dir", str(certificates), "--host", "api.openai.com", "--host", "api.anthropic.com")
    with Stack(sim_options=options) as stack:
        key_id, token = stack.new_key("1.00")
        assert stack.chat(token)[0] == 200
        body = {"model": "claude-haiku-4-5", "max_tokens": 20, "messages": [{"role": "user", "content": "Hello"}]}
        status, _, _ = call(stack.base, "POST", "/v1/messages", body, {"x-api-key": token, "anthropic-version": "2023-06-01"})
        assert status == 200
        stack.settled(key_id)
        assert stack.unadmitted([key_id]) == []


def test_a_provider_with_another_certificate_gets_nothing(tmp_path):
    """The same simulator under a name that is not the provider's: no request may reach it, and nothing is charged."""
    certificates = tmp_path / "tls"
    certificates.mkdir()
    with Stack(sim_options=("--tls-dir", str(certificates), "--host", "somebody.else.example")) as stack:
        key_id, token = stack.new_key("1.00")
        status, headers, _ = stack.chat(token)
        assert status == 503 and headers["x-keyward-reason"] == "provider_unreachable"
        stack.settled(key_id)
        assert stack.sim.ledger() == [] and stack.key(key_id)["spent_nanodollars"] == 0


def test_the_listener_can_speak_tls(tmp_path):
    for command in (
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    options = ("--listen-certificate", str(tmp_path / "cert.pem"), "--listen-key", str(tmp_path / "key.pem"))
    with Stack(render_options=options) as stack:
        _, token = stack.new_key()
        request = urllib.request.Request(f"https://localhost:{stack.listen_port}/v1/models", headers={"authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=tmp_path / "cert.pem")) as answer:
            assert answer.status == 200 and b"gpt-4o" in answer.read()
