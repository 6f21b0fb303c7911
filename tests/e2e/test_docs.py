"""Every command and snippet of README and docs is run as a reader would, in order, against a real Keyward."""

import json
import re

import pytest
import yaml
from documents import RUN, Block, Reader, blocks
from harness import ROOT

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "examples/README.md", *(ROOT / "docs").rglob("*.md")])
BY_NAME = [pytest.param(file, id=str(file.relative_to(ROOT))) for file in DOCUMENTS]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", [
    p for p in BY_NAME if any(block.language in RUN for block in blocks(p.values[0]))])
def test_every_command_and_snippet_runs(file):
    with Reader() as reader:
        reader.read(file)
        totals = reader.sim.totals()
        assert totals["violations"] == []


@pytest.mark.parametrize("file", BY_NAME)
def test_what_is_shown_can_be_read(file):
    """Fences have a known language, and the data in them parses."""
    for block in blocks(file):
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            list(yaml.safe_load_all(block.text))


@pytest.mark.parametrize("file", BY_NAME)
def test_links_lead_somewhere(file):
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.S)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (file.parent / link).exists()] == []


def test_troubleshooting_has_exactly_the_codes_there_are():
    """Each `x-keyward-reason` that can reach a caller has its row, with the status it comes with, and no row is left over."""
    source = (ROOT / "core/src/refusal.rs").read_text()
    function = lambda name: source[source.index(f"fn {name}("):].split("\n    }\n", 1)[0]
    names = dict(re.findall(r'Code::(\w+) => "(\w+)"', function("name")))
    statuses = {}
    for variants, status in re.findall(r"((?:Code::\w+[\s|]*)+)=> (\d{3})", function("status")):
        statuses |= {names[variant]: status for variant in re.findall(r"Code::(\w+)", variants)}
    assert set(statuses) == set(names.values()) and len(names) >= 17, "the source reads otherwise than this test expects"
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}(?: or \d{3})?)(?:, again)? \|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.M)
    assert len(rows) == len(dict(rows)), "a code has two rows"
    told = dict(rows)
    # The gate's answer, and Envoy's own in its configuration.
    assert "value: provider_unreachable" in (ROOT / "envoy/envoy.yaml").read_text()
    assert told.pop("provider_unreachable") == "503 or 504" and statuses.pop("provider_unreachable") == "503"
    assert told == statuses


# --- the extractor itself: what it overlooks is not tested ---------------------------------------------------------------


def test_no_fence_is_overlooked(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("~~~sh\na\n~~~\n\n- x\n\n  ```python\n  if 1:\n      pass\n  ```\n\n````text\n```sh\n````\n")
    found = blocks(file)
    assert [(b.language, b.line, b.text) for b in found] == [
        ("sh", 1, "a\n"), ("python", 7, "if 1:\n    pass\n"), ("text", 12, "```sh\n")]
    for bad in ("```\nls\n```\n", "```bash\nls\n```\n", "```sh\nls\n"):
        file.write_text(bad)
        with pytest.raises((AssertionError, ValueError)):
            blocks(file)


def test_commands_are_told_apart():
    text = "# first\na \\\n  b  # c\n\nfor x in 1 2; do\n  y $x\ndone\ncat <<'E'\n$ z\nE\nd '\n'"
    assert [command.strip() for _, command in Block(ROOT / "README.md", 1, "sh", text).commands()] == [
        "a \\\n  b  # c", "for x in 1 2; do\n  y $x\ndone", "cat <<'E'\n$ z\nE", "d '\n'"]
    console = Block(ROOT / "README.md", 4, "console", "$ a\nprinted\n$ b \\\n  c\nmore\n")
    assert list(console.commands()) == [(5, "a"), (7, "b \\\n  c")]


def test_a_command_that_fails_fails_the_document():
    with Reader() as reader:
        for text in ("false", "false && true", "true | false | true", "exit_code_of_nothing", "(exit 3)"):
            with pytest.raises(AssertionError):
                reader.run(Block(ROOT / "README.md", 1, "sh", f"true\n{text}\ntrue\n"))
        with pytest.raises(AssertionError, match="stand in"):
            reader.run(Block(ROOT / "README.md", 1, "sh", "echo token_...\n"))
        with pytest.raises(AssertionError):
            reader.run(Block(ROOT / "README.md", 1, "python", "raise SystemExit(1)\n"))
        assert reader.run(Block(ROOT / "README.md", 1, "sh", "x=1\necho $((x + 1))\n")).strip() == "2"
