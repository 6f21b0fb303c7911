"""The vault string as people use it: `keyward vault` and `keyward up --vault-string-env`, with the real command."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
import vault_string
from harness import CREDENTIALS, ENVOY_BIN, KEYWARD_BIN, ROOT, Part, Simulator, Stack, call, free_port, wait_for
from test_canary import Search

OPENAI, ANTHROPIC = (credential["secret"] for credential in CREDENTIALS)
PASSWORD = "Nebel-uber-7-Bergen"
# The cheapest that is accepted: what is tested here is not how long a guess takes.
CHEAP = ["--memory-mib", "19", "--passes", "3", "--lanes", "1"]
UNSET = {name: "" for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "KEYWARD_VAULT", "KEYWARD_VAULT_PASSWORD", "KEYWARD_ADMIN_TOKEN")}


def vault(*command, stdin="", password=PASSWORD, **env):
    """`keyward vault ...` without a terminal: code, standard output, standard error."""
    env = {**{name: value for name, value in os.environ.items() if name not in UNSET}, "KEYWARD_VAULT_PASSWORD": password, **env}
    done = subprocess.run([KEYWARD_BIN, "vault", *map(str, command)], input=stdin, env=env, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert OPENAI not in done.stdout + done.stderr and ANTHROPIC not in done.stdout + done.stderr and PASSWORD not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def fine(*command, **more):
    code, out, error = vault(*command, **more)
    assert code == 0, (command, error)
    return out


def refused(*command, **more):
    code, out, error = vault(*command, **more)
    assert code != 0 and out == "", (command, out, error)
    return error


@pytest.fixture
def file(tmp_path):
    """A vault string with both providers' keys, in a file."""
    file = tmp_path / "team.vault"
    fine("init", "--file", file, *CHEAP)
    fine("add-key", "openai", "--from-env", "THE_KEY", "--account", "org-7", "--file", file, THE_KEY=OPENAI)
    fine("add-key", "anthropic", "--name", "second", "--file", file, stdin=ANTHROPIC + "\n")
    return file


# --- the command -------------------------------------------------------------------------------------------------------


def test_a_string_is_made_changed_and_listed(file):
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text()
    assert re.fullmatch(r"kw_vault_v1_[A-Za-z0-9_-]+\n", text)
    rows = [{"provider": "openai", "name": "main", "account": "org-7"}, {"provider": "anthropic", "name": "second", "account": None}]
    assert json.loads(fine("list", "--file", file, "--output", "json")) == rows
    assert fine("list", "--file", file).splitlines() == ["PROVIDER   NAME    ACCOUNT", "openai     main    org-7", "anthropic  second  -"]
    assert "there is a key" in refused("add-key", "openai", "--file", file, stdin="sk-other")
    assert "there is no provider" in refused("add-key", "opnai", "--file", file, stdin="sk-other")
    assert "1 to 4096 visible" in refused("add-key", "openai", "--name", "b", "--file", file, stdin="two words")
    assert "THE_KEY is not set" in refused("add-key", "openai", "--name", "b", "--from-env", "THE_KEY", "--file", file)
    assert "there is no key" in refused("remove-key", "openai", "--name", "other", "--file", file)
    assert "exists" in refused("init", "--file", file, *CHEAP)
    assert file.read_text() == text, "what was refused changed nothing"
    fine("remove-key", "openai", "--file", file)
    assert json.loads(fine("list", "--file", file, "--output", "json")) == rows[1:]
    assert file.stat().st_mode & 0o777 == 0o600 and [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_secret_is_never_an_argument(file):
    """Whoever lists processes sees arguments."""
    code, _, error = vault("add-key", "openai", "sk-from-an-argument", "--file", file)
    assert code == 2 and "unexpected argument" in error
    assert vault("add-key", "openai", "--secret", "x", "--file", file)[0] == 2


def test_a_string_in_a_variable_is_changed_on_standard_output():
    empty = fine("init", *CHEAP)
    one = fine("add-key", "openai", stdin=OPENAI, KEYWARD_VAULT=empty)
    assert fine("export", KEYWARD_VAULT=one) == one, "as it is, password or not"
    assert len(one) == len(empty), "one key more does not show in the length"
    assert json.loads(fine("list", "--string-env", "ELSEWHERE", "--output", "json", ELSEWHERE=one))[0]["provider"] == "openai"
    assert "set KEYWARD_VAULT" in refused("list")


def test_a_wrong_password_and_a_changed_string_are_answered_the_same(file):
    text = file.read_text()
    wrong = refused("list", "--file", file, password="Nebel-uber-8-Bergen")
    file.write_text(text[:-10] + ("A" if text[-10] != "A" else "B") + text[-9:])
    assert refused("list", "--file", file) == wrong == "keyward: the vault string can't be opened: the password is wrong, or the string was changed\n"
    file.write_text(text[:-300])
    assert "no vault string" in refused("list", "--file", file)


def test_a_new_password_and_pbkdf2_open_with_a_second_reading(file):
    """What docs/vault-string.md says is enough to read one."""
    new = "another password"
    text = fine("export", "--file", file, "--new-password-env", "NEW", "--kdf", "pbkdf2", NEW=new).strip()
    assert vault_string.open_string(text, new) == {"version": 1, "keys": [
        {"provider": "openai", "name": "main", "account": "org-7", "secret": OPENAI}, {"provider": "anthropic", "name": "second", "secret": ANTHROPIC}]}
    with pytest.raises(ValueError, match="tag"):
        vault_string.open_string(text, PASSWORD)
    assert "can't be opened" in refused("list", KEYWARD_VAULT=text)
    assert len(json.loads(fine("list", "--output", "json", KEYWARD_VAULT=text, password=new))) == 2
    # A change keeps the derivation; the file that was exported from keeps its password.
    again = fine("remove-key", "anthropic", "--name", "second", KEYWARD_VAULT=text, password=new).strip()
    assert [key["provider"] for key in vault_string.open_string(again, new)["keys"]] == ["openai"]
    assert len(json.loads(fine("list", "--file", file, "--output", "json"))) == 2
    target = file.with_name("new.vault")
    assert fine("export", "--file", file, "--to", target) == "" and target.read_text() == file.read_text() and target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["argon2id", "pbkdf2"])
def test_strings_of_old_open(kind):
    golden = json.loads((ROOT / f"tests/vault-string/{kind}.json").read_text())
    rows = json.loads(fine("list", "--output", "json", KEYWARD_VAULT=golden["vault"], password=golden["password"]))
    assert [(row["provider"], row["name"]) for row in rows] == [(key["provider"], key["name"]) for key in golden["content"]["keys"]]
    if kind == "pbkdf2":
        assert vault_string.open_string(golden["vault"], golden["password"]) == golden["content"]


def test_weak_choices_are_refused(tmp_path):
    file = tmp_path / "v"
    assert "at least 8 characters" in refused("init", "--file", file, password="seven77")
    assert "must be" in refused("init", "--file", file, "--memory-mib", "16")
    assert "must be" in refused("init", "--file", file, "--memory-mib", "19", "--passes", "1")
    assert "must be" in refused("init", "--file", file, "--kdf", "pbkdf2", "--iterations", "599999")
    assert "is for" in refused("init", "--file", file, "--iterations", "700000")
    assert "are for" in refused("init", "--file", file, "--kdf", "pbkdf2", "--passes", "3")
    assert "no terminal" in refused("init", "--file", file, password="")
    assert "NOT_SET is not set" in refused("init", "--file", file, "--password-env", "NOT_SET")
    assert not file.exists()


def at_a_terminal(command, answers, **env):
    """Runs a command on a terminal of its own and answers its questions: code, all that the terminal showed."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(command[0], command, {**os.environ, **UNSET, **env})
    shown, answers, end = b"", list(answers), time.monotonic() + 30
    while time.monotonic() < end:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
        if answers and shown.endswith(b": "):
            # The question comes a moment before the terminal stops to show what is typed; nobody types that fast.
            wait_for("a silent terminal", lambda: not termios.tcgetattr(terminal)[3] & termios.ECHO, 5)
            os.write(terminal, answers.pop(0).encode() + b"\n")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


def test_a_terminal_is_asked_twice_and_shows_nothing(tmp_path):
    file = tmp_path / "v"
    init = [KEYWARD_BIN, "vault", "init", "--file", str(file), *CHEAP]
    code, shown = at_a_terminal(init, [PASSWORD, PASSWORD + "x"])
    assert code == 1 and "not the same" in shown and not file.exists()
    code, shown = at_a_terminal(init, ["short"])
    assert code == 1 and "at least 8 characters" in shown
    code, shown = at_a_terminal(init, [PASSWORD, PASSWORD])
    assert code == 0 and PASSWORD not in shown and shown.count(": ") == 2
    code, shown = at_a_terminal([KEYWARD_BIN, "vault", "add-key", "openai", "--file", str(file)], [PASSWORD, OPENAI])
    assert code == 0 and PASSWORD not in shown and OPENAI not in shown and "now holds 1 key" in shown
    assert json.loads(fine("list", "--file", file, "--output", "json")) == [{"provider": "openai", "name": "main", "account": None}]


# --- keyward up --------------------------------------------------------------------------------------------------------


class Up(Part):
    """`keyward up` in front of a simulator; no credential but what a vault string lends."""

    def __init__(self, directory):
        super().__init__("up", directory)
        self.data, self.stack = directory / "data", Stack(directory=directory)
        self.sim = self.stack.sim

    def start(self, *options, **env):
        said = len(self.log.read_bytes()) if self.log.exists() else 0
        command = [KEYWARD_BIN, "up", "--data", str(self.data), "--listen", f"127.0.0.1:{self.stack.listen_port}", "--admin", f"127.0.0.1:{self.stack.admin_port}",
                   "--provider", f"openai={self.sim.api}", "--provider", f"anthropic={self.sim.api}", *options]
        self.spawn(command, {**UNSET, "ENVOY_BIN": ENVOY_BIN, **env})
        wait_for("keyward up", lambda: b"keyward is up" in self.log.read_bytes()[said:] or not self.running(), 30)
        self.said = self.log.read_bytes()[said:].decode()
        if self.running():
            self.stack.admin_token = (self.data / "admin-token").read_text().strip()
        return self.running()

    def envoys(self):
        """The Envoys that run on this data directory."""
        config, found = str(self.data / "envoy.yaml").encode(), []
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdigit() and config in (process / "cmdline").read_bytes() and "\nState:\tZ" not in (process / "status").read_text():
                    found.append(int(process.name))
            except OSError:
                pass
        return found

    def end(self):
        self.kill()
        for pid in self.envoys():
            os.kill(pid, signal.SIGKILL)
        wait_for("no Envoy", lambda: not self.envoys())

    def credentials(self):
        """By label: the list's own order is that of the names, which each installation makes for itself."""
        return sorted(self.stack.admin("GET", "/v1/credentials")["data"], key=lambda row: row["label"])

    def served(self):
        """Requests that the provider answered, by credential."""
        self.sim.quiet()
        totals = self.sim.totals()
        assert totals["violations"] == []
        return {name: count["by_status"]["200"] for name, count in totals["credentials"].items() if "200" in count["by_status"]}

    def claude(self, token):
        body = {"model": "claude-haiku-4-5", "max_tokens": 20, "messages": [{"role": "user", "content": "Hello"}]}
        return call(self.stack.base, "POST", "/v1/messages", body, {"x-api-key": token, "anthropic-version": "2023-06-01"})[0]

    def files(self):
        return {str(path.relative_to(self.data.parent)): path.read_bytes() for path in self.data.parent.rglob("*") if path.is_file()}


@pytest.fixture
def up(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    up = Up(directory)
    try:
        up.sim.start()
        yield up
    finally:
        up.end()
        up.sim.kill()


def test_lent_keys_serve_and_reach_no_file(up, file):
    string = file.read_text()
    search = Search()
    for name, secret in (("the openai key", OPENAI), ("the anthropic key", ANTHROPIC), ("the password", PASSWORD), ("the vault string", string.strip())):
        search.secret(name, secret)
    lending = ("--vault-string-env", "TEAM", "--vault-password-env", "TEAM_PASSWORD")
    variables = {"TEAM": string, "TEAM_PASSWORD": PASSWORD}
    assert up.start(*lending, **variables), up.said
    rows = up.credentials()
    assert [(row["provider"], row["label"], row["source"]) for row in rows] == [("openai", "main", "vault_string"), ("anthropic", "second", "vault_string")]
    assert rows[0]["account"] == "org-7" and rows[1]["account"] == rows[1]["id"] and all(re.fullmatch("cred_[0-9a-f]{16}", row["id"]) for row in rows)
    key_id, token = up.stack.new_key("1.00")
    assert up.stack.chat(token)[0] == 200
    assert up.stack.chat(token, "[[sim tokens=30]]", stream=True)[0] == 200
    assert up.claude(token) == 200
    up.stack.settled(key_id)
    assert up.served() == {"openai-1": 2, "anthropic-1": 1}
    assert up.stack.unadmitted([key_id]) == []

    # What is lent can't be taken away, and a stored one beside it changes nothing.
    status, _, problem = call(up.stack.admin_base, "DELETE", f"/v1/credentials/{rows[0]['id']}", headers={"authorization": f"Bearer {up.stack.admin_token}"})
    assert status == 409 and "vault string" in json.loads(problem)["detail"]
    stored = up.stack.admin("POST", "/v1/credentials", {"provider": "openai", "label": "stored", "secret": "sk-stored-beside-the-lent-one"})
    assert stored["source"] == "stored"
    up.stack.admin("DELETE", f"/v1/credentials/{stored['id']}")
    assert [row["id"] for row in up.credentials()] == [row["id"] for row in rows] and up.stack.chat(token)[0] == 200
    up.stack.settled(key_id)

    # Envoy was started without our secrets. That the search sees an environment shows in our own.
    [envoy] = up.envoys()
    environments = {name: Path(f"/proc/{pid}/environ").read_bytes() for name, pid in (("up", up.process.pid), ("envoy", envoy))}
    assert {place for place, _ in search.hits(environments)} == {"up"}

    # Every file, while it runs and as kill -9 leaves it.
    running = up.files()
    up.end()
    killed = up.files()
    for moment in (running, killed):
        assert "data/keyward.db" in moment and "data/keyward.db-wal" in moment and "up.log" in moment and "data/access.log" in moment
        assert search.hits(moment) == []
        # These are the files that it works with: what may be in them is found.
        known = Search()
        known.secret("the credential's id", rows[0]["id"])
        assert {place for place, _ in known.hits(moment)} & {"data/keyward.db", "data/keyward.db-wal"}
    # And a canary planted in each of them, as each of the forms, is found.
    for place, data in killed.items():
        for form in search.needles:
            assert search.hits({place: data[:len(data) // 2] + form + data[len(data) // 2:]}), (place, form)

    # The next start knows nothing of them by itself, and the same ids with the string.
    assert up.start(), up.said
    assert up.credentials() == [] and up.stack.chat(token)[0] == 429
    up.end()
    assert up.start(*lending, **variables), up.said
    assert [row["id"] for row in up.credentials()] == [row["id"] for row in rows]
    before = up.served()["openai-1"]
    assert up.stack.chat(token)[0] == 200 and up.served()["openai-1"] == before + 1
    up.stack.settled(key_id)
    up.terminate(30)
    assert up.process.returncode == 0 and search.hits(up.files()) == []


def test_up_does_not_start_with_a_string_that_does_not_open(up, file):
    string = file.read_text()
    lending = ("--vault-string-env", "TEAM")
    assert not up.start(*lending, TEAM=string, KEYWARD_VAULT_PASSWORD="Nebel-uber-8-Bergen")
    wrong = up.said
    assert not up.start(*lending, TEAM=string.replace(string[-20:-10], string[-20:-10].swapcase()), KEYWARD_VAULT_PASSWORD=PASSWORD)
    assert up.said == wrong and "TEAM: the vault string can't be opened" in wrong
    assert not up.start(*lending, TEAM="sk-no-vault-string", KEYWARD_VAULT_PASSWORD=PASSWORD)
    assert "TEAM: this is no vault string" in up.said and "sk-no-vault-string" not in up.said
    assert not up.start(*lending, KEYWARD_VAULT_PASSWORD=PASSWORD) and "TEAM is not set" in up.said
    assert not (up.data / "keyward.db").exists(), "the string is opened first"
    assert up.start(*lending, TEAM=string, KEYWARD_VAULT_PASSWORD=PASSWORD), up.said


def test_import_stores_what_is_not_there_yet(up, file):
    assert up.start(), up.said
    fine("add-key", "openai", "--name", "third", "--file", file, stdin="sk-proj-third")
    up.stack.admin("POST", "/v1/credentials", {"provider": "openai", "label": "third", "secret": "sk-proj-already-there"})
    access = ["--admin", up.stack.admin_base, "--data", up.data, "--file", file, "--output", "json"]
    rows = json.loads(fine("import", *access))
    assert [(row["provider"], row["name"], row["result"]) for row in rows] == [
        ("openai", "main", "stored"), ("anthropic", "second", "stored"), ("openai", "third", "there already")]
    assert sorted((row["id"], row["label"], row["account"] == "org-7", row["source"]) for row in up.credentials()) == sorted(
        (row["id"], row["name"], row["name"] == "main", "stored") for row in rows)
    assert {row["result"] for row in json.loads(fine("import", *access))} == {"there already"}
    _, token = up.stack.new_key("1.00")
    assert up.claude(token) == 200 and up.served() == {"anthropic-1": 1}
    assert "can't be reached" in refused("import", "--admin", f"http://127.0.0.1:{free_port()}", "--data", up.data, "--file", file)
