"""The `keyward` command as an operator uses it: a gateway from a file, changed, compared, watched; every subcommand once."""

import contextlib
import json
import os
import pty
import signal
import subprocess

import pytest
from harness import CREDENTIALS, KEYWARD_BIN, Part, Simulator, call, free_port, wait_for

SECRETS = {credential["provider"]: credential["secret"] for credential in CREDENTIALS}
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("KEYWARD_ADMIN", "KEYWARD_DATA", "OPENAI_", "ANTHROPIC_"))}

MANIFEST = """
# What the search team may use.
providers:
  openai: {{url: "{sim}"}}
  anthropic: {{url: "{sim}"}}
credentials:
  openai-main: {{provider: openai, from: env:THE_OPENAI_KEY}}
  claude: {{provider: anthropic, from: "file:claude.key", account: acme}}
pools:
  openai-prod: {{provider: openai, credentials: [openai-main]}}
teams:
  search: {{max_keys: 2, max_key_usd: "10.00"}}
policies:
  small:
    allow: {{models: [gpt-4o-mini, fast]}}
    budgets: [{{usd: "1.00", window: total}}]
    pools: {{openai: openai-prod}}
routes:
  fast: {{targets: [{{provider: openai, model: gpt-4o-mini, pool: openai-prod}}]}}
"""


class Gateway:
    """`keyward up -c keyward.yaml`, on free ports, with the simulator behind it."""

    def __init__(self, directory):
        self.directory = directory
        self.sim, self.up = Simulator("sim", directory), Part("up", directory)
        self.listen, self.admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self.file = directory / "keyward.yaml"
        self.env = {**CLEAN, "THE_OPENAI_KEY": SECRETS["openai"], "KEYWARD_DATA": str(directory / "state"), "KEYWARD_ADMIN": f"http://{self.admin}",
                    "KEYWARD_GATEWAY": f"http://{self.listen}"}

    def __enter__(self):
        self.sim.start()
        (self.directory / "claude.key").write_text(SECRETS["anthropic"] + "\n")
        self.file.write_text(MANIFEST.format(sim=self.sim.api))
        self.up.spawn([KEYWARD_BIN, "up", "-c", str(self.file), "--listen", self.listen, "--admin", self.admin, "--data", str(self.directory / "state"),
                       "--concurrency", "1", "--drain-timeout", "5"], env=self.env)
        wait_for("keyward up", lambda: "keyward is up" in self.log(), 60)
        return self

    def __exit__(self, *_):
        self.up.process.send_signal(signal.SIGTERM)
        self.up.process.wait(30)
        self.sim.kill()

    def log(self):
        return self.up.log.read_text(errors="replace") if self.up.log.exists() else ""

    def run(self, *command, code=0, stdin="", env=None):
        done = subprocess.run([KEYWARD_BIN, *map(str, command)], input=stdin, env={**self.env, **(env or {})}, capture_output=True, text=True, timeout=60,
                              cwd=self.directory)
        assert done.returncode == code, (command, done.returncode, done.stdout, done.stderr)
        for secret in SECRETS.values():
            assert secret not in done.stdout + done.stderr, command
        return done.stdout if code == 0 else done.stdout + done.stderr

    def json(self, *command, **more):
        return json.loads(self.run(*command, "--output", "json", **more))

    def chat(self, token, model="gpt-4o-mini"):
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        return call(f"http://{self.listen}", "POST", "/v1/chat/completions", body, {"authorization": f"Bearer {token}"})


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with Gateway(tmp_path_factory.mktemp("command")) as gateway:
        yield gateway


def test_a_gateway_from_a_file_serves_what_the_file_allows(gateway):
    key = gateway.json("keys", "create", "--team", "search", "--policy", "small", "--label", "first")
    assert (key["budget_usd"], key["team"], key["policy"]) == ("1.00", "search", "small"), "its policy's budget is its own"
    status, headers, body = gateway.chat(key["token"])
    assert status == 200 and json.loads(body)["choices"], body
    status, _, body = gateway.chat(key["token"], "fast")
    assert status == 200 and json.loads(body)["model"].startswith("gpt-4o-mini"), "a route is a name for another model"
    status, headers, _ = gateway.chat(key["token"], "gpt-4o")
    assert (status, headers["x-keyward-reason"]) == (403, "model_not_allowed")
    gateway.run("keys", "revoke", key["id"])


def test_apply_twice_changes_nothing_and_diff_says_so(gateway):
    before = json.loads(gateway.run("config", "show"))
    assert "nothing to change" in gateway.run("apply", "-f", gateway.file)
    after = json.loads(gateway.run("config", "show"))
    assert after == before and "secret" not in json.dumps(after["configuration"]["credentials"])
    assert json.loads(gateway.run("diff", "-f", gateway.file))["changes"] == []
    changed = gateway.directory / "changed.yaml"
    changed.write_text(gateway.file.read_text().replace("max_keys: 2", "max_keys: 3").replace("  fast: {targets", "  quick: {targets"))
    differences = json.loads(gateway.run("diff", "-f", changed, code=3))["changes"]
    assert [(d["action"], d["kind"], d["name"]) for d in differences] == [("update", "team", "search"), ("create", "route", "quick"), ("delete", "route", "fast")]
    assert differences[0]["fields"] == [{"field": "max_keys", "from": 2, "to": 3}]
    revision = before["revision"]
    assert "revision" in gateway.run("apply", "-f", changed, "--revision", revision)
    assert "changed" in gateway.run("apply", "-f", gateway.file, "--revision", revision, code=7), "read at an older revision"
    assert "1 to create, 1 to update, 1 to delete" in gateway.run("apply", "-f", gateway.file)
    other = gateway.run("diff", "-f", gateway.file, env={"THE_OPENAI_KEY": "sk-another"}, code=3)
    assert [f["field"] for f in json.loads(other)["changes"][0]["fields"]] == ["secret"] and "sk-another" not in other


def on_a_terminal(gateway, *command, **env):
    """What a command prints to a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([KEYWARD_BIN, *map(str, command)], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env={**gateway.env, **env},
                          cwd=gateway.directory) as process:
        os.close(theirs)
        printed = b""
        # Linux ends a terminal that nobody holds with EIO.
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 4096):
                printed += piece
    os.close(ours)
    return process.returncode, printed.decode()


def test_a_person_reads_colours_unless_they_asked_for_none(gateway):
    changed = gateway.directory / "coloured.yaml"
    changed.write_text(gateway.file.read_text().replace("max_keys: 2", "max_keys: 4"))
    code, printed = on_a_terminal(gateway, "diff", "-f", changed, NO_COLOR="")
    assert code == 3 and "\x1b[33m~ team search\x1b[0m" in printed and "max_keys: 2 -> 4" in printed and "0 to create, 1 to update" in printed
    code, printed = on_a_terminal(gateway, "diff", "-f", changed, NO_COLOR="1")
    assert code == 3 and "~ team search" in printed and "\x1b" not in printed


def test_what_the_file_does_not_name_stays_unless_an_apply_made_it(gateway):
    gateway.run("teams", "set", "by-hand", "--spec", '{"max_keys": 1}')
    assert "nothing to change" in gateway.run("apply", "-f", gateway.file)
    assert [(t["name"], t["managed_by"]) for t in gateway.json("teams", "list")] == [("by-hand", "api"), ("search", "configuration")]
    gateway.run("teams", "delete", "by-hand")
    gateway.run("teams", "show", "by-hand", code=6)


def test_a_watched_file_is_applied_and_a_bad_edit_is_not(gateway):
    good = gateway.file.read_text()
    gateway.file.write_text(good.replace("max_keys: 2", "max_keys: 7"))
    wait_for("the change", lambda: gateway.json("teams", "show", "search")["spec"]["max_keys"] == 7)
    gateway.file.write_text(good.replace("max_keys: 2", "max_kyes: 2"))
    wait_for("the complaint", lambda: "did you mean max_keys?" in gateway.log())
    line = next(line for line in gateway.log().splitlines() if "max_kyes" in line)
    number = 1 + next(i for i, text in enumerate(gateway.file.read_text().splitlines()) if "max_kyes" in text)
    assert line.startswith(f"{gateway.file}:{number}:") and "teams.search.max_kyes" in line
    assert "what was in force before stays" in gateway.log()
    assert gateway.json("teams", "show", "search")["spec"]["max_keys"] == 7
    gateway.file.write_text(good)
    wait_for("the good file again", lambda: gateway.json("teams", "show", "search")["spec"]["max_keys"] == 2)


def test_a_start_with_a_bad_file_says_where_it_is_bad(gateway):
    bad = gateway.directory / "bad.yaml"
    bad.write_text("teams:\n  search: {max_keys: many}\n")
    assert f"{bad}:2:12: teams.search.max_keys: invalid type" in gateway.run("up", "-c", bad, "--data", gateway.directory / "other", code=1)
    assert not (gateway.directory / "other").exists(), "nothing was started"
    assert "is fine" in gateway.run("config", "check", gateway.file)
    assert "teams.search.max_keys" in gateway.run("config", "check", bad, code=8)
    assert "THE_OPENAI_KEY is not set" in gateway.run("diff", "-f", gateway.file, env={"THE_OPENAI_KEY": ""}, code=8).replace("env:THE_OPENAI_KEY is empty", "THE_OPENAI_KEY is not set")


def test_the_schema_accepts_the_file():
    schema = json.loads(subprocess.run([KEYWARD_BIN, "config", "schema"], check=True, capture_output=True, text=True).stdout)
    assert schema["$schema"].startswith("https://json-schema.org/draft/2020-12") and set(schema["properties"]) == {
        "organisation", "teams", "policies", "providers", "credentials", "pools", "routes"}
    assert schema["additionalProperties"] is False


def test_the_key_commands_do_what_they_say(gateway):
    text = gateway.run("keys", "create", "--label", "snippets", "--budget", "2.00", "--tag", "feature=search", "--personal", "name=Ada", "--expires-in", "1h")
    key_id, token = text.split()[:2]
    assert key_id.startswith("key_") and token.startswith("vk_") and f"http://{gateway.listen}/v1" in text
    assert all(kind in text for kind in ("curl", "from openai import OpenAI", "import OpenAI from")) and text.count(token) == 4
    assert gateway.chat(token)[0] == 200
    shown = gateway.json("keys", "show", key_id)
    assert (shown["tags"], shown["personal"], shown["label"]) == ({"feature": "search"}, {"name": "Ada"}, "snippets")
    gateway.run("keys", "update", key_id, "--label", "renamed", "--budget", "3.00")
    gateway.run("keys", "erase", key_id)
    shown = gateway.json("keys", "show", key_id)
    assert (shown["tags"], shown["personal"], shown["label"], shown["budget_usd"]) == ({}, None, "renamed", "3.00")
    newer = gateway.json("keys", "rotate", key_id, "--overlap", "1h")["token"]
    assert newer != token and gateway.chat(token)[0] == 200 and gateway.chat(newer)[0] == 200
    gateway.json("keys", "rotate", key_id)
    status, headers, _ = gateway.chat(newer)
    assert (status, headers["x-keyward-reason"]) == (401, "revoked"), "without overlap the old token ends"
    assert key_id in gateway.run("keys", "list") and key_id not in gateway.run("keys", "list", "--team", "search")
    gateway.run("keys", "revoke", key_id)
    gateway.run("keys", "revoke", key_id)
    assert "for good" in gateway.run("keys", "update", key_id, "--label", "x", code=7)
    tail = gateway.run("audit", "tail", key_id)
    assert "KEY_CREATED" in tail and "req=req_" in tail and "actor=admin" in tail and "Ada" not in tail
    export = gateway.directory / "chain.jsonl"
    export.write_text(gateway.run("audit", "export", key_id))
    assert "verify" in gateway.run("audit", "verify", export)
    export.write_text(export.read_text().replace('"seq":2', '"seq":3', 1))
    gateway.run("audit", "verify", export, code=3)


def test_tokens_roles_and_usage(gateway):
    auditor = gateway.json("tokens", "create", "--role", "auditor", "--label", "audits", "--expires-in", "1h")
    as_auditor = {"KEYWARD_ADMIN_TOKEN": auditor["token"]}
    assert gateway.json("whoami", env=as_auditor)["role"] == "auditor"
    assert "auditor" in gateway.run("keys", "create", env=as_auditor, code=5)
    gateway.run("keys", "list", env=as_auditor)
    developer = gateway.json("tokens", "create", "--role", "developer", "--team", "search")
    as_developer = {"KEYWARD_ADMIN_TOKEN": developer["token"]}
    key = gateway.json("keys", "create", "--budget", "2.00", env=as_developer)
    assert key["team"] == "search", "a developer's keys are their team's"
    assert "at most $10.00" in gateway.run("keys", "create", "--budget", "11.00", env=as_developer, code=8)
    assert gateway.chat(key["token"])[0] == 200
    spent = lambda: [row for row in gateway.json("usage", "--by", "team,model") if row["by"] == {"team": "search", "model": "gpt-4o-mini"}]
    wait_for("the settlement", lambda: spent() and spent()[0]["spent_nanodollars"] > 0)
    table = gateway.run("usage", "--by", "team,model", env=as_developer)
    assert table.splitlines()[0].split()[:2] == ["TEAM", "MODEL"] and "search" in table
    gateway.run("keys", "revoke", key["id"])
    gateway.run("tokens", "revoke", auditor["id"])
    gateway.run("keys", "list", env=as_auditor, code=5)
    admin_chain = gateway.run("audit", "tail", "adm_org_default")
    assert "ADMIN_CHANGED" in admin_chain and "target=admin-tokens/" in admin_chain


def test_credentials_go_in_and_never_come_out(gateway):
    added = gateway.json("credentials", "add", "openai", "--name", "spare", "--account", "acme", stdin="sk-spare-1234567890\n")
    assert added["name"] == "spare" and "sk-spare" not in json.dumps(added)
    gateway.run("credentials", "update", "spare", "--label", "second", "--from-stdin", stdin="sk-spare-0987654321\n")
    assert gateway.json("credentials", "show", added["id"])["label"] == "second"
    assert "virtual key" in gateway.run("credentials", "update", "spare", "--from-stdin", stdin="vk_x", code=8)
    gateway.run("credentials", "remove", "spare")
    assert "used by pools.openai-prod" in gateway.run("credentials", "remove", "openai-main", code=7)
    assert {c["name"] for c in gateway.json("credentials", "list")} == {"openai-main", "claude"}


def test_completions_manual_and_help():
    for shell in ("bash", "zsh", "fish"):
        assert "keyward" in subprocess.run([KEYWARD_BIN, "completions", shell], check=True, capture_output=True, text=True).stdout
    help_text = subprocess.run([KEYWARD_BIN, "--help"], check=True, capture_output=True, text=True).stdout
    assert "Exit codes" in help_text


def test_manual_pages_are_written(tmp_path):
    subprocess.run([KEYWARD_BIN, "man", str(tmp_path / "man")], check=True)
    pages = {page.name for page in (tmp_path / "man").iterdir()}
    assert {"keyward.1", "keyward-keys-create.1", "keyward-apply.1"} <= pages


def test_a_service_that_is_not_there_has_its_own_exit_code(tmp_path):
    env = {**CLEAN, "KEYWARD_ADMIN_TOKEN": "kwa_x"}
    done = subprocess.run([KEYWARD_BIN, "keys", "list", "--admin", f"http://127.0.0.1:{free_port()}"], env=env, capture_output=True, text=True)
    assert done.returncode == 4 and "Is `keyward up` running?" in done.stderr
    done = subprocess.run([KEYWARD_BIN, "keys", "list", "--data", str(tmp_path)], env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 5 and "KEYWARD_ADMIN_TOKEN" in done.stderr
