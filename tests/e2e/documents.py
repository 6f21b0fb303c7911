"""Runs what the documentation tells its readers to type: every block, in order, in one shell per document, in a fresh directory,
against a real `keyward up` whose providers are the simulator. What stands in for something is listed in this file, and nowhere else."""

import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from harness import (
    CREDENTIALS, ENVOY_BIN, KEYWARD_BIN, LOADGEN_BIN, NODE_MODULES, ROOT, SERVICE_BIN, SIM_BIN, Simulator, call, free_port, wait_for)

# A fence names its language. These run; those are shown. Any other fence, and one without a name, is a mistake.
RUN = {"sh", "console", "python", "js"}
SHOWN = {"text", "yaml", "json", "toml"}

# Commands that stay in the foreground until they are stopped: here they run beside the shell, and the document goes on as soon as
# their output says that they are ready.
SERVERS = {
    r"make up\b": "keyward is up",
    r"keyward up\b": "keyward is up",
    r"provider-sim\b": '"control"',
    r"keyward-policy-service\b": '"bootstrap_admin_token"',
    r"envoy -c\b": "starting main dispatch loop",
    r"keyward audit tail\b.*--follow": "KEY_CREATED",
}
# These run this very test, or take the whole machine for long: make reads them and tells what it would do.
ONLY_READ = {"test", "test-unit", "test-wasm", "test-e2e", "bench", "soak", "lint", "setup", "clean"}
PASSWORD = "correct horse battery staple"
SECRETS = {c["provider"]: c["secret"] for c in CREDENTIALS}


class Block:
    def __init__(self, file, line, language, text):
        self.file, self.line, self.language, self.text = file, line, language, text

    def __str__(self):
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    def commands(self):
        """The shell commands of a block, each whole: (line, text)."""
        lines = self.text.splitlines()
        if self.language == "console":
            # What follows a command and its continuations is what it printed.
            lines, shown, more = [], lines, False
            for line in shown:
                command = line[2:] if line.startswith("$ ") else line if more else ""
                more = command.endswith("\\")
                lines.append(command)
        pending = []
        for number, line in enumerate(lines, self.line + 1):
            pending.append(line)
            text = "\n".join(pending)
            if not line.endswith("\\") and complete(text):
                if text.strip() and not all(part.lstrip().startswith("#") for part in pending if part.strip()):
                    yield number - len(pending) + 1, text
                pending = []
        assert not pending, f"{self}: the block ends within a command"


def complete(text):
    """Whether bash would run this, rather than wait for more. Of a here-document without its end it only warns."""
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True)
    return done.returncode == 0 and not done.stderr


def blocks(file):
    """The fenced blocks of a document."""
    found, fence = [], None
    for number, line in enumerate(file.read_text().splitlines(), 1):
        mark = re.match(r"\s*(```+|~~~+)\s*(\S*)\s*$", line)
        if fence is None and mark:
            fence = (mark[1], number, mark[2], [], len(line) - len(line.lstrip()))
        elif fence is not None and mark and not mark[2] and mark[1].startswith(fence[0]):
            found.append(Block(file, fence[1], fence[2], "\n".join(part[fence[4]:] for part in fence[3]) + "\n"))
            fence = None
        elif fence is not None:
            fence[3].append(line)
    assert fence is None, f"{file.name}:{fence and fence[1]}: a fence is not closed"
    unknown = [f"{block}: a fence named {block.language!r}" for block in found if block.language not in RUN | SHOWN]
    assert not unknown, unknown
    return found


class Reader:
    """Somebody who sits down with one document, in a fresh directory, and types all of it."""

    def __init__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="keyward-docs-"))
        self.ports = {port: free_port() for port in ("7800", "7801", "7802", "7809", "8443", "9000", "9001")}
        self.sim = Simulator("sim", self.directory)
        self.servers, self.shell, self.count = [], None, 0

    def __enter__(self):
        try:
            self.sim.start()
            left_by_hand = shutil.ignore_patterns("node_modules", "tls", ".keyward", "*.log")
            shutil.copytree(ROOT / "examples", self.directory / "examples", ignore=left_by_hand)
            for file in (self.directory / "examples").rglob("*.yaml"):
                file.write_text(self.on_free_ports(file.read_text()))
            (self.directory / "node_modules").symlink_to(NODE_MODULES)
            self.make_commands()
            self.start_shell()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, *_):
        for server in reversed(self.servers):
            self.stop(server)
        if self.shell:
            self.shell.kill()
            self.shell.wait()
        self.sim.kill()
        if kind is None:
            shutil.rmtree(self.directory, ignore_errors=True)
        else:
            print(f"\ndocument's directory: {self.directory}", file=sys.stderr)

    # --- what stands in for something ------------------------------------------------------------------------------

    def on_free_ports(self, text):
        """The documented ports, as free ones of this machine."""
        for documented, port in self.ports.items():
            text = re.sub(rf"(?<=[: =]){documented}\b", str(port), text)
        return text

    def replaced(self, text):
        """What a reader fills in: the simulator's keys for the provider's, the tokens and ids that were printed."""
        text = self.on_free_ports(text).replace("target/release/", "")
        text = text.replace("sk-ant-...", SECRETS["anthropic"]).replace("sk-...", SECRETS["openai"])
        text = text.replace("KEYWARD_VAULT_PASSWORD=...", f"KEYWARD_VAULT_PASSWORD={shlex.quote(PASSWORD)}")
        text = text.replace("vk_...", self.first_key() if "vk_..." in text else "").replace("key_...", "$(newest-key)")
        left = re.search(r"[\w=]*\.\.\.", text.replace("/...", ""))
        assert left is None, f"nothing is known to stand in for {left and left[0]}"
        return text

    def first_key(self):
        """The virtual key that `keyward up` printed."""
        found = [token for log in self.directory.glob("server-*.log") for token in re.findall(r"vk_\w{49}", log.read_text())]
        assert found, "vk_... stands before any `keyward up`"
        return found[-1]

    def environment(self):
        import llama_index.core

        return {
            "PATH": f"{self.directory / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.directory), "LANG": "C.UTF-8",
            "KEYWARD_ADMIN": f"http://127.0.0.1:{self.ports['7802']}", "KEYWARD_DATA": str(self.directory / ".keyward"),
            "ENVOY_BIN": ENVOY_BIN, "KEYWARD_PYTHON": sys.executable,
            # A reader has the providers' keys at hand.
            "OPENAI_API_KEY": SECRETS["openai"], "ANTHROPIC_API_KEY": SECRETS["anthropic"],
            # Nothing leaves this machine, even if a snippet forgets its base URL.
            "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1,localhost,llm.example",
            # Typed at the prompt otherwise.
            "KEYWARD_VAULT_PASSWORD": PASSWORD,
            # Token tables that LangChain would fetch from the internet; LlamaIndex brings the same file along.
            "TIKTOKEN_CACHE_DIR": str(Path(llama_index.core.__file__).parent / "_static/tiktoken_cache"),
        }

    def make_commands(self):
        """The programs a reader has on the search path. Each is the real one, told where this test's parts are."""
        folder = self.directory / "bin"
        folder.mkdir()
        programs = {"envoy": ENVOY_BIN, "keyward-policy-service": SERVICE_BIN, "provider-sim": SIM_BIN, "loadgen": LOADGEN_BIN}
        for name, program in programs.items():
            (folder / name).symlink_to(shutil.which(program) or program)
        keyward = shlex.quote(KEYWARD_BIN)
        providers = " ".join(f"--provider {name}={self.sim.api}" for name in SECRETS)
        self.program("keyward", f"""
            [ "${{1-}}" = up ] || exec {keyward} "$@"
            # A configuration of the reader's own says where the providers are.
            case " $* " in *" -c "*) ;; *) set -- "$@" {providers} ;; esac
            set -- "$@" --admin 127.0.0.1:{self.ports['7802']}
            case " $* " in *" --listen "*) ;; *) set -- "$@" --listen 127.0.0.1:{self.ports['7800']} ;; esac
            exec {keyward} "$@"
        """)
        # The recipe itself runs; what it is made from is there already (-o), under the names of this folder (RELEASE).
        real_make = shlex.quote(shutil.which("make") or "make")
        self.program("make", f"""
            for word; do case "$word" in {'|'.join(sorted(ONLY_READ))}) set -- -n "$@"; break ;; esac; done
            exec {real_make} --no-print-directory -C {shlex.quote(str(ROOT))} -o build -o envoy -o venv -o node-modules -o rust-targets \\
                RELEASE={shlex.quote(str(folder))} PYTHON={shlex.quote(sys.executable)} "$@"
        """)
        # The locked packages are what the newest would be for the reader.
        real_npm = shlex.quote(shutil.which("npm") or "npm")
        self.program("npm", f"""
            [ "${{1-}}" = install ] || exec {real_npm} --loglevel=error "$@"
            ln -sfn {shlex.quote(str(NODE_MODULES))} node_modules
        """)
        (self.directory / "tools").mkdir()
        (self.directory / "tools/fetch-envoy").write_text(f"#!/bin/bash\necho {shlex.quote(ENVOY_BIN)}\n")
        (self.directory / "tools/fetch-envoy").chmod(0o755)
        # A password manager: `pass show NAME`.
        cases = " ".join(f"{name}) echo {shlex.quote(secret)} ;;" for name, secret in SECRETS.items())
        self.program("pass", f'case "$2" in {cases} *) exit 1 ;; esac')
        newest = 'import json, sys; print(max(json.load(sys.stdin), key=lambda key: key["created_ms"])["id"])'
        self.program("newest-key", f"{keyward} keys list --output json | {shlex.quote(sys.executable)} -c {shlex.quote(newest)}")

    def program(self, name, script):
        file = self.directory / "bin" / name
        file.write_text("#!/bin/bash\n" + script)
        file.chmod(0o755)

    # --- typing ----------------------------------------------------------------------------------------------------

    def start_shell(self):
        self.shell = subprocess.Popen(["bash", "--norc"], cwd=self.directory, env=self.environment(), text=True, bufsize=1,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        self.lines = queue.Queue()
        threading.Thread(target=lambda: [self.lines.put(line) for line in self.shell.stdout] and None, daemon=True).start()
        self.shell.stdin.write("set -o pipefail\n")

    def read(self, file):
        """Runs a document from its first block to its last; gives what its commands printed. One that starts no Keyward by itself
        is read while one runs."""
        if not re.search(r"^(make|keyward) up\b", "".join(block.text for block in blocks(file) if block.language == "sh"), flags=re.M):
            self.up()
        return "".join(self.run(block) for block in blocks(file) if block.language in RUN)

    def up(self, options=""):
        """`keyward up`, as the README starts it."""
        self.serve(f"keyward up {options}", SERVERS[r"keyward up\b"], "before the document")

    def run(self, block):
        if block.language in ("sh", "console"):
            return "".join(self.type(self.replaced(text), f"{block.file.relative_to(ROOT)}:{line}") for line, text in block.commands())
        self.count += 1
        runner, suffix = {"python": (sys.executable, "py"), "js": ("node", "mjs")}[block.language]
        (self.directory / f"snippet-{self.count}.{suffix}").write_text(self.replaced(block.text))
        return self.type(f"{runner} {self.directory}/snippet-{self.count}.{suffix}", str(block))

    def type(self, command, where):
        """One command in the document's shell: what it printed. A command that fails ends the test."""
        for pattern, ready in SERVERS.items():
            if re.match(pattern, command.lstrip()):
                return self.serve(command, ready, where)
        status, output = self.execute(command)
        assert status == 0, f"{where}: this ended with {status}:\n{command}\n{output[-4000:]}"
        return output

    def execute(self, command, timeout=300):
        """Status and output. The command shares the shell's variables and folder, not its input."""
        self.count += 1
        script, end = self.directory / f"command-{self.count}", f"end of command {self.count}:"
        script.write_text(command + "\n")
        self.shell.stdin.write(f". {script} </dev/null; printf '\\n{end} %s\\n' $?\n")
        output, until = [], time.monotonic() + timeout
        while True:
            try:
                line = self.lines.get(timeout=0.5)
            except queue.Empty:
                assert self.shell.poll() is None, f"the shell ended at:\n{command}\n{''.join(output)}"
                assert time.monotonic() < until, f"no end after {timeout} s:\n{command}\n{''.join(output)[-4000:]}"
                continue
            if line.startswith(end):
                return int(line.removeprefix(end)), "".join(output)
            output.append(line)

    def serve(self, command, ready, where):
        """Starts a server with the shell's variables and folder, and waits until it says that it is ready."""
        kind = " ".join(command.split()[:2]).replace("make up", "keyward up")
        for server in [server for server in self.servers if server["kind"] == kind and kind == "keyward up"]:
            # The reader has stopped the one before: two can't have the same ports.
            self.stop(server)
        self.count += 1
        log = self.directory / f"server-{self.count}.log"
        command = re.sub(r"\s*(&\s*)?(#[^'\"]*)?$", "", command.strip())
        status, output = self.execute(f"setsid bash -c {shlex.quote('exec ' + command)} >{log} 2>&1 </dev/null &\necho pid=$!")
        server = {"kind": kind, "pid": int(re.search(r"pid=(\d+)", output)[1]), "log": log}
        self.servers.append(server)
        wait_for(f"{where}: {command}", lambda: ready in log.read_text(errors="replace") or not alive(server["pid"]), 60)
        text = log.read_text(errors="replace")
        assert ready in text, f"{where}: this ended before it was ready:\n{command}\n{text[-4000:]}"
        return text

    def stop(self, server):
        """As Ctrl-C does, and waits for the end."""
        self.servers.remove(server)
        if not alive(server["pid"]):
            return
        os.kill(server["pid"], signal.SIGTERM)
        try:
            wait_for(f"the end of {server['kind']}", lambda: not alive(server["pid"]), 90)
        except TimeoutError:
            os.killpg(server["pid"], signal.SIGKILL)
            admin = self.directory / ".keyward/envoy-admin"
            if admin.exists():
                call(f"http://{admin.read_text().strip()}", "POST", "/quitquitquit")
            raise


def alive(pid):
    """Whether a process runs; one that only waits for its parent to take note does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
