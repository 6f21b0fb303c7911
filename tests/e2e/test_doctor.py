"""`keyward doctor` on a healthy installation, and on real ones with exactly one thing broken: it names that thing and nothing else."""

import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from harness import CREDENTIALS, ENVOY_BIN, KEYWARD_BIN, PROVIDERS, ROOT, Part, Simulator, Stack, call, free_port, wait_for

HOSTS = [option for host in ("api.openai.com", "api.anthropic.com", "generativelanguage.googleapis.com", "api.groq.com", "api.mistral.ai",
                             "api.deepseek.com", "api.together.xyz", "openrouter.ai") for option in ("--host", host)]
VERSIONS = sorted({line.split()[0] for line in (ROOT / "tools/envoy-versions.txt").read_text().splitlines() if re.match(r"1\.\d+\.\d+\s", line)})
# What is read from the running Envoy: none of it can be known when there is none.
OF_ENVOY = ("envoy-version", "envoy-flags", "gate", "attempt", "vm", "routes", "timeouts", "policy-cluster", "provider-tls", "access-log",
            "filter-running", "filter-version", "gate-answers")


class Installation(Stack):
    """The harness's parts as an operator would set them up: providers over TLS, Envoy with the flags that the documents name."""

    def __init__(self, tls_dir, **options):
        super().__init__(sim_options=("--tls-dir", str(tls_dir), *HOSTS), **options)

    def spawn_envoy(self, config=None):
        self.envoy.spawn([self.envoy_bin, "-c", str(config or self.directory / "envoy.yaml"), "--use-dynamic-base-id", "--log-level", "warning",
                          "--concurrency", str(self.concurrency), "--file-flush-interval-msec", "100", "--drain-strategy", "immediate"])
        wait_for("Envoy", lambda: call(f"http://127.0.0.1:{self.envoy_admin_port}", "GET", "/ready")[0] == 200 or not self.envoy.running())
        assert self.envoy.running(), self.envoy.log.read_text(errors="replace")[-4000:]

    @property
    def config(self):
        return (self.directory / "envoy.yaml").read_text()

    @contextlib.contextmanager
    def running(self, text):
        """Envoy with another configuration, until the test has looked at it."""
        file = self.directory / "broken.yaml"
        file.write_text(text)
        self.envoy.kill()
        try:
            self.spawn_envoy(file)
            yield file
        finally:
            self.envoy.kill()
            self.spawn_envoy()

    def restart_service(self, **env):
        self.service.terminate()
        self.service_env = env
        self.start_service()

    def doctor(self, *more, config=None):
        """Exit code, rows by check."""
        options = ["--data", self.directory / "data", "--admin", self.admin_base, "--admin-token", self.admin_token, "--envoy-bin", self.envoy_bin,
                   "--envoy-admin", f"127.0.0.1:{self.envoy_admin_port}", "--envoy-config", config or self.directory / "envoy.yaml"]
        secrets = [*self.secrets, self.admin_token.removeprefix("kwa_"), *self.secret_files()]
        return doctor(secrets, *options, *more)

    def secret_files(self):
        files = [self.directory / "data" / name for name in ("edge-token", "kek", "root")]
        return [file.read_text(errors="replace").strip().removeprefix("Bearer kwe_") for file in files if file.exists()]


def doctor(secrets, *options, cwd=None):
    """Runs it twice, as a table and as JSON: both say the same, neither shows a secret. Exit code, rows by check."""
    options = list(map(str, options))
    # A later option replaces an earlier one of the same name.
    last = {options[i]: options[i + 1] for i in range(0, len(options), 2)}
    command = [KEYWARD_BIN, "doctor", *(part for pair in last.items() for part in pair)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("KEYWARD_")}
    table = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    result = subprocess.run([*command, "--output", "json"], capture_output=True, text=True, env=env, cwd=cwd)
    printed = table.stdout + table.stderr + result.stdout + result.stderr
    assert not [secret for secret in secrets if secret in printed], printed
    assert table.returncode == result.returncode, printed
    rows = {row["check"]: row for row in json.loads(result.stdout)}
    lines = [line for line in table.stdout.splitlines() if not line.startswith(" ")]
    assert len(lines) == len(rows) and all(check in line for check, line in zip(rows, lines)), table.stdout
    assert table.stdout.count("FAULT  ") == sum(row["status"] == "fault" for row in rows.values())
    return result.returncode, rows


def expect(result, check=None, *words, others=None):
    """Exactly this check is a fault, names the words and has a cure; all others are ok, but for those listed."""
    code, rows = result
    statuses = {name: row["status"] for name, row in rows.items()}
    wanted = {name: "ok" for name in rows} | (others or {}) | ({check: "fault"} if check else {})
    assert statuses == wanted, json.dumps([row for row in rows.values() if row["status"] != wanted.get(row["check"])], indent=1)
    assert code == (3 if check else 0)
    if check:
        assert all(word in rows[check]["found"] for word in words), rows[check]
        assert len(rows[check]["cure"]) > 10, rows[check]
    return rows


def replaced(text, old, new):
    assert old in text, old
    return text.replace(old, new, 1)


def cluster(text, name, old, new):
    """Changes something within one cluster."""
    start = text.index(f"  - name: {name}\n    type: ")
    following = text.find("\n  - name: ", start)
    end = following if following > 0 else len(text)
    return text[:start] + replaced(text[start:end], old, new) + text[end:]


GATE = re.compile(r"          - name: keyward\.gate\n.*?(?=          - name: envoy\.filters\.http\.router)", re.S)
ATTEMPT = re.compile(r"        - name: keyward\.attempt\n.*?(?=        - name: envoy\.filters\.http\.upstream_codec)", re.S)


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    """One healthy installation; each test breaks it and mends it again."""
    with Installation(tmp_path_factory.mktemp("tls"), concurrency=1) as installation:
        yield installation
        # Whatever was broken was mended: no test can pass because of another's fault.
        expect(installation.doctor())


# --- healthy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_a_healthy_installation_has_no_fault(version, tmp_path):
    """The oldest and the newest Envoy tell of themselves in different ways."""
    binary = subprocess.run([ROOT / "tools/fetch-envoy", version], check=True, capture_output=True, text=True).stdout.strip()
    with Installation(tmp_path, envoy_bin=binary, envoy_minor=int(version.split(".")[1]), concurrency=2) as installation:
        rows = expect(installation.doctor())
        assert {"provider:openai", "provider:anthropic", "gate", "clock", "disk"} <= rows.keys()
        assert "role admin" in rows["admin-token"]["found"] and "certificate good until" in rows["provider:openai"]["found"]
        # Looking changes nothing: no admission, no refusal of a key, nothing rejected.
        metrics = installation.metrics()
        admitted = sum(value for name, value in metrics.items() if name.startswith("keyward_admissions_total"))
        assert metrics["keyward_records_rejected_total"] == 0 and admitted == 0


def test_what_keyward_up_starts_is_found_without_an_option(tmp_path):
    """With one provider's key in the environment, the others are not used, and that is no fault."""
    sim, up = Simulator("sim", tmp_path), Part("up", tmp_path)
    try:
        sim.start()
        admin = free_port()
        secret = CREDENTIALS[0]["secret"]
        providers = [option for name in PROVIDERS for option in ("--provider", f"{name}={sim.api}")]
        command = [KEYWARD_BIN, "up", "--data", tmp_path / ".keyward", "--listen", f"127.0.0.1:{free_port()}", "--admin", f"127.0.0.1:{admin}", *providers]
        up.spawn(list(map(str, command)), env={"OPENAI_API_KEY": secret, "ENVOY_BIN": ENVOY_BIN})
        wait_for("keyward up", lambda: "keyward is up" in up.log.read_text() or not up.running())
        rows = expect(doctor([secret], "--admin", f"http://127.0.0.1:{admin}", cwd=tmp_path))
        assert "stored for openai; none for anthropic" in rows["credentials"]["found"] and "provider:anthropic" not in rows
    finally:
        up.terminate()
        sim.kill()


def test_bad_usage_is_told_apart_from_faults(tmp_path):
    for options in (["--data", "nowhere"], ["--data", ".", "--envoy-config", "nowhere.yaml"], ["--data", ".", "--envoy-admin", "9901"], ["--colour", "red"]):
        result = subprocess.run([KEYWARD_BIN, "doctor", *options], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == (2 if "--colour" in options else 8) and result.stderr and not result.stdout, (options, result)


# --- Envoy ---------------------------------------------------------------------------------------------------------------


def test_an_envoy_that_is_too_old(installation, tmp_path):
    """No wheel of it is pinned: a program that says so in Envoy's words stands in for the binary on this machine."""
    old = tmp_path / "envoy"
    old.write_text("#!/bin/sh\necho 'envoy  version: 0000/1.35.3/Clean/RELEASE/BoringSSL'\n")
    old.chmod(0o755)
    expect(installation.doctor("--envoy-bin", old), "envoy-binary", "1.35", "1.36 to 1.40", others={"configuration-loads": "not_checked"})


def test_envoy_is_not_running(installation):
    installation.envoy.kill()
    try:
        rows = expect(installation.doctor(), "envoy-running", str(installation.envoy_admin_port), others=dict.fromkeys(OF_ENVOY, "not_checked"))
        # What the file tells is looked at all the same.
        assert rows["provider:openai"]["status"] == "ok" and rows["edge-token"]["status"] == "ok"
    finally:
        installation.spawn_envoy()


def test_a_configuration_for_another_envoy(installation):
    text = replaced(installation.config, "# Keyward in Envoy 1.40.", "# Keyward in Envoy 1.37.")
    with installation.running(text) as file:
        expect(installation.doctor(config=file), "envoy-version", "1.40", "1.37")


def test_a_configuration_that_does_not_load(installation):
    """The running Envoy goes on with the old one; the next start would fail."""
    file = installation.directory / "next.yaml"
    file.write_text(replaced(installation.config, "    connect_timeout: 0.5s\n", "    connect_timeout: 0.5s\n    no_such_field: 1\n"))
    expect(installation.doctor(config=file), "configuration-loads", "no_such_field")


# --- the filter ----------------------------------------------------------------------------------------------------------


def test_the_gate_is_missing(installation):
    text = GATE.sub("", installation.config)
    # The anchor of vm_config stood in the gate.
    text = replaced(text, "vm_config: *keyward_vm", "vm_config: &keyward_vm {vm_id: keyward, runtime: envoy.wasm.runtime.v8, "
                    f'code: {{local: {{filename: "{installation.directory}/filter.wasm"}}}}}}')
    with installation.running(text) as file:
        expect(installation.doctor(config=file), "gate", "no listener", "reached without it by keyward", others={"gate-answers": "not_checked"})


def test_a_filter_of_another_version(installation, tmp_path):
    """The same module with one more custom section: it runs, and it is not the one that this command carries."""
    module = tmp_path / "filter.wasm"
    name = b"another version"
    module.write_bytes((installation.directory / "filter.wasm").read_bytes() + bytes([0, len(name) + 1, len(name)]) + name)
    with installation.running(replaced(installation.config, str(installation.directory / "filter.wasm"), str(module))) as file:
        rows = expect(installation.doctor(config=file), "filter-version", str(module), "sha256")
        assert "keyward filter export" in rows["filter-version"]["cure"]


def test_a_filter_that_fails_open(installation):
    with installation.running(replaced(installation.config, "failure_policy: FAIL_RELOAD\n", "failure_policy: FAIL_OPEN\n")) as file:
        expect(installation.doctor(config=file), "gate", "FAIL_OPEN", others={"gate-answers": "not_checked"})


def test_a_cluster_without_the_attempt(installation):
    start = installation.config.index("  - name: openai\n    type: ")
    text = installation.config[:start] + ATTEMPT.sub("", installation.config[start:], count=1)
    with installation.running(text) as file:
        expect(installation.doctor(config=file), "attempt", "openai")


def test_gate_and_attempt_in_two_vms(installation):
    other = f'vm_config: {{vm_id: other, runtime: envoy.wasm.runtime.v8, code: {{local: {{filename: "{installation.directory}/filter.wasm"}}}}}}'
    with installation.running(cluster(installation.config, "openai", "vm_config: *keyward_vm", other)) as file:
        expect(installation.doctor(config=file), "vm", "openai", "vm_config.vm_id")


# --- routes and log ------------------------------------------------------------------------------------------------------


def test_a_route_to_the_policy_cluster(installation):
    way = '              - {match: {prefix: "/internal/"}, route: {cluster: keyward_policy, prefix_rewrite: "/edge/"}}\n'
    text = replaced(installation.config, "              # Admitted: the gate has named the target.\n", way)
    with installation.running(text) as file:
        expect(installation.doctor(config=file), "routes", "route 1", "keyward_policy")


def test_an_access_log_without_the_record(installation):
    text = replaced(installation.config, '                  settle: "%FILTER_STATE(wasm.keyward.settle:PLAIN)%"\n', "")
    with installation.running(text) as file:
        expect(installation.doctor(config=file), "access-log", "settle")


def test_an_access_log_with_the_credential(installation):
    text = replaced(installation.config, '                  method: "%REQ(:METHOD)%"\n', '                  method: "%REQ(Authorization)%"\n')
    with installation.running(text) as file:
        expect(installation.doctor(config=file), "access-log", "authorization")


def test_answers_that_are_cut(installation):
    text = replaced(installation.config, "                  timeout: 0s\n                  idle_timeout: 900s\n", "                  idle_timeout: 900s\n")
    with installation.running(text) as file:
        expect(installation.doctor(config=file), "timeouts", "15 s")


# --- tokens, service, files ----------------------------------------------------------------------------------------------


def test_envoy_has_another_edge_token(installation, tmp_path):
    other = tmp_path / "edge-token"
    other.write_text("Bearer kwe_" + "0" * 64 + "\n")
    other.chmod(0o600)
    text = replaced(installation.config, str(installation.directory / "data/edge-token"), str(other))
    with installation.running(text) as file:
        expect(installation.doctor(config=file), "edge-token", str(other), "differs", others={"gate-answers": "not_checked"})


def test_the_service_has_a_new_edge_token_and_envoy_an_old_one(installation):
    """Both files agree; what Envoy read at its start does not."""
    file = installation.directory / "data/edge-token"
    kept = file.read_text()
    file.unlink()
    installation.restart_service()
    try:
        assert file.read_text() != kept
        expect(installation.doctor(), "gate-answers", "policy_unavailable")
    finally:
        file.write_text(kept)
        installation.restart_service()


def test_an_edge_token_that_others_can_read(installation):
    file = installation.directory / "data/edge-token"
    file.chmod(0o644)
    try:
        rows = expect(installation.doctor(), "edge-token-file", str(file), "0644")
        assert f"chmod 600 {file}" in rows["edge-token-file"]["cure"]
    finally:
        file.chmod(0o600)


def test_a_vault_key_that_others_can_read(installation):
    file = installation.directory / "data/kek"
    file.chmod(0o640)
    try:
        expect(installation.doctor(), "secret-files", str(file), "0640")
    finally:
        file.chmod(0o600)


def test_the_policy_service_is_down(installation):
    installation.service.terminate()
    try:
        unknown = dict.fromkeys(("edge-token", "gate-answers", "admin-token", "credentials"), "not_checked")
        expect(installation.doctor(), "policy-service", installation.admin_base, others=unknown)
    finally:
        installation.start_service()


def test_the_policy_service_hangs(installation):
    """A port that accepts and never answers is as bad as none."""
    installation.service.process.send_signal(signal.SIGSTOP)
    try:
        unknown = dict.fromkeys(("edge-token", "gate-answers", "admin-token", "credentials"), "not_checked")
        expect(installation.doctor(), "policy-service", installation.admin_base, others=unknown)
    finally:
        installation.service.process.send_signal(signal.SIGCONT)


def test_a_wrong_admin_token(installation):
    expect(installation.doctor("--admin-token", "kwa_" + "0" * 43), "admin-token", "does not know", others={"credentials": "not_checked"})


def test_no_credential(installation):
    """One provider's absence is said, that of all is a fault: then nothing can be called."""
    stored = installation.admin("GET", "/v1/credentials")["data"]
    try:
        for credential in sorted(stored, key=lambda c: c["provider"]):
            installation.admin("DELETE", f"/v1/credentials/{credential['id']}")
            if credential["provider"] == "anthropic":
                assert "none for anthropic" in expect(installation.doctor())["credentials"]["found"]
        expect(installation.doctor(), "credentials", "openai", "anthropic")
    finally:
        for credential in CREDENTIALS:
            installation.admin("POST", "/v1/credentials", {"provider": credential["provider"], "label": credential["id"], "secret": credential["secret"]})


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *at) {
    int (*real)(clockid_t, struct timespec *) = (int (*)(clockid_t, struct timespec *)) dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, at);
    if (id == CLOCK_REALTIME) at->tv_sec += SHIFT;
    return result;
}
"""


@pytest.mark.parametrize("shift, status", [(-7200, "fault"), (20, "warn")])
def test_a_clock_that_is_off(installation, tmp_path, shift, status):
    """The service's process really lives in another time: a library put before libc's answers it so."""
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", f"-DSHIFT={shift}", "-o", library, source, "-ldl"], check=True)
    installation.restart_service(LD_PRELOAD=str(library))
    try:
        if status == "fault":
            expect(installation.doctor(), "clock", "the policy service", "behind")
        else:
            assert "ahead" in expect(installation.doctor(), others={"clock": "warn"})["clock"]["found"]
    finally:
        installation.restart_service()


def test_a_disk_that_is_nearly_full(tmp_path):
    """The data directory on a file system of 32 MiB."""
    data = tmp_path / "stack/data"
    data.mkdir(parents=True)
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,mode=0700", "tmpfs", data], capture_output=True)
    if not mounted or mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        (tmp_path / "tls").mkdir()
        with Installation(tmp_path / "tls", directory=tmp_path / "stack") as installation:
            expect(installation.doctor(), "disk", "MiB free")
    finally:
        subprocess.run(["umount", data], check=True)


# --- providers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """A second simulator with an authority of its own and another name."""
    sim = Simulator("other-sim", tmp_path)
    sim.start("--tls-dir", str(tmp_path), "--host", "somebody.else.example")
    yield sim
    sim.kill()


def port(sim):
    return sim.api.rsplit(":", 1)[1].rstrip("/")


def test_a_provider_that_is_not_there(installation):
    closed = free_port()
    with installation.running(cluster(installation.config, "openai", f"port_value: {port(installation.sim)}", f"port_value: {closed}")) as file:
        expect(installation.doctor(config=file), "provider:openai", str(closed), "refused")


def test_a_provider_whose_name_is_unknown(installation):
    text = cluster(installation.config, "openai", "type: STATIC", "type: STRICT_DNS")
    text = cluster(text, "openai", "address: 127.0.0.1,", "address: api.openai.invalid,")
    with installation.running(text) as file:
        expect(installation.doctor(config=file), "provider:openai", "api.openai.invalid", "no address")


def test_a_provider_with_a_certificate_for_another_name(installation, elsewhere):
    text = cluster(installation.config, "openai", f"port_value: {port(installation.sim)}", f"port_value: {port(elsewhere)}")
    with installation.running(cluster(text, "openai", installation.sim.ca, elsewhere.ca)) as file:
        expect(installation.doctor(config=file), "provider:openai", "somebody.else.example", "not for api.openai.com")


def test_a_provider_with_a_certificate_of_another_authority(installation, elsewhere):
    with installation.running(cluster(installation.config, "openai", installation.sim.ca, elsewhere.ca)) as file:
        expect(installation.doctor(config=file), "provider:openai", "not from an authority", elsewhere.ca)


class Refuses(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_):
        pass


def expired_certificate(directory):
    """An authority, and a certificate of its that ended in 2021."""
    def openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, cwd=directory)
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-days", "3650", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    openssl("req", *key, "-subj", "/CN=api.openai.com", "-keyout", "leaf.key", "-out", "leaf.csr")
    (directory / "index").touch()
    (directory / "serial").write_text("01\n")
    (directory / "ca.conf").write_text("[ca]\ndefault_ca=it\n[it]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=any\n"
                                       "x509_extensions=leaf\n[any]\ncommonName=supplied\n[leaf]\nsubjectAltName=DNS:api.openai.com\n")
    openssl("ca", "-batch", "-config", "ca.conf", "-cert", "ca.pem", "-keyfile", "ca.key", "-in", "leaf.csr", "-out", "leaf.pem", "-notext",
            "-startdate", "20200101000000Z", "-enddate", "20210101000000Z")
    return directory / "ca.pem", directory / "leaf.pem", directory / "leaf.key"


def test_a_provider_with_an_expired_certificate(installation, tmp_path):
    authority, certificate, key = expired_certificate(tmp_path)
    server = HTTPServer(("127.0.0.1", free_port()), Refuses)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        text = cluster(installation.config, "openai", f"port_value: {port(installation.sim)}", f"port_value: {server.server_port}")
        with installation.running(cluster(text, "openai", installation.sim.ca, str(authority))) as file:
            expect(installation.doctor(config=file), "provider:openai", "expired on 01 Jan 2021")
    finally:
        server.shutdown()
        server.server_close()
