"""The admin API is what /openapi.json says: schemathesis makes requests from the document, fitting and unfitting, one by one and
one after the other, and holds every answer against it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import call
from openapi_spec_validator import OpenAPIV31SpecValidator
from people import Service, admin, person

SEED = 20261120
# What a body that fits the schema can still be refused for: names that lead nowhere, a limit, what others made meanwhile.
REFUSALS = ["2xx", "403", "404", "409", "412", "422"]
CONFIGURATION = f"""
[checks]
positive_data_acceptance.expected-statuses = {json.dumps(REFUSALS)}
# A tag of no known form is one that does not match.
negative_data_rejection.expected-statuses = ["400", "401", "403", "404", "405", "409", "412", "413", "415", "422"]

# What makes a cursor good can't be said in a schema.
[[operations]]
include-method = "GET"
checks.positive_data_acceptance.expected-statuses = {json.dumps([*REFUSALS, "400"])}

# A revoked key is still shown, for what it has spent and for its chain.
[[operations]]
include-operation-id = "revoke_key"
checks.use_after_free.enabled = false

# A provider is built in: only its settings go.
[[operations]]
include-operation-id = ["reset_provider", "show_provider", "put_provider", "show_key", "change_key", "rotate_key"]
checks.use_after_free.enabled = false
"""
# The token in use must outlast the run; every other one may be revoked. White space around a header's value is taken away by HTTP
# itself: what is meant to be wrong by it arrives right.
HOOKS = """
import os, schemathesis

@schemathesis.hook
def filter_case(context, case):
    headers = {name.lower(): str(value) for name, value in (case.headers or {}).items()}
    key = headers.get("idempotency-key", "")
    return os.environ["OWN_TOKEN_ID"] not in str(case.path_parameters) and key == key.strip()
"""


@pytest.fixture(scope="module")
def service():
    with Service() as service:
        yield service


@pytest.fixture(scope="module")
def document(service):
    status, headers, body = call(service.admin_base, "GET", "/openapi.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    return json.loads(body)


def test_the_document_is_valid_openapi_3_1(document):
    assert document["openapi"].startswith("3.1")
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


def test_the_document_describes_every_answer(document):
    """Errors are problems; what can be changed has an ETag; lists have pages; secrets only go in."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            where, answers = f"{method} {path}", operation["responses"]
            assert operation["security"] == [{"admin_token": []}] and operation["tags"] and operation["summary"], where
            assert {"400", "401", "403", "404", "503"} <= set(answers), where
            for status, answer in answers.items():
                assert answer["description"], where
                if status >= "400":
                    assert list(answer["content"]) == ["application/problem+json"], where
            taken = {parameter["name"] for parameter in operation.get("parameters", [])}
            assert "cursor" not in taken or "limit" in taken, where
            if "If-Match" in taken and method != "delete" or "Idempotency-Key" in taken and "spec" in json.dumps(operation):
                assert all("ETag" in answers[status]["headers"] for status in ("200", "201") if status in answers), where
    written = {name: [field for field, schema in body.get("properties", {}).items() if schema.get("writeOnly")]
               for name, body in document["components"]["schemas"].items()}
    assert {name for name, fields in written.items() if fields == ["secret"]} == {"AddCredential", "ChangeCredential", "Credential"}
    for word in ("sk-", "kwa_0", "vk_0"):
        assert word not in json.dumps(document)


@pytest.mark.timeout(180)
def test_requests_made_from_the_document_are_answered_as_it_says(service, tmp_path):
    boss = admin(service)
    tester = person(service, "admin", label="schemathesis")
    boss.do("POST", "/v1/credentials", {"name": "main", "provider": "openai", "secret": "sk-proj-Sc4Ty8Me1Qa6Zx3Wv9Bn5Hj2Kl7Po0Ud"})
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    (tmp_path / "hooks.py").write_text(HOOKS)
    program = Path(sys.executable).with_name("schemathesis")
    command = [program, "--config-file", "schemathesis.toml", "run", f"{service.admin_base}/openapi.json", "--header", f"Authorization: Bearer {tester.token}",
               "--phases", "examples,coverage,fuzzing,stateful", "--mode", "all", "--max-examples", "12", "--seed", str(SEED), "--generation-database", "none",
               "--suppress-health-check", "all", "--request-timeout", "20", "--max-time", "60", "--no-color"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path), "OWN_TOKEN_ID": tester.do("GET", "/v1/whoami")["token_id"]}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    (tmp_path / "output").write_text(run.stdout + run.stderr)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    # The run was one: it knew every operation, and its token lived to the end.
    assert tester.ask("GET", "/v1/whoami")[0] == 200
    assert call(service.admin_base, "GET", "/readyz")[0] == 200
    assert service.service.running() and b"panicked" not in service.service.log.read_bytes()
