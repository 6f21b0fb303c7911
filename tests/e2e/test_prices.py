"""The command that makes the price table: what it takes from two public lists, what it says, and that it always says the same."""

import subprocess

from harness import ROOT

LISTS = [ROOT / "tests/prices/litellm.json", ROOT / "tests/prices/genai.json"]


def run(*arguments):
    return subprocess.run([ROOT / "tools/prices", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def made(date="2026-11-20"):
    """Cells by model and column, and the lines of the header."""
    done = run("--date", date, *LISTS)
    assert done.returncode == 0, done.stderr
    header = [line[2:] for line in done.stdout.splitlines() if line.startswith("#")]
    columns = header[-1].split("\t")
    rows = [line.split("\t") for line in done.stdout.splitlines() if not line.startswith("#")]
    return {row[1]: dict(zip(columns, row)) for row in rows}, header


def test_the_same_files_make_the_same_bytes():
    first, second = (run("--date", "2026-11-20", *LISTS).stdout for _ in range(2))
    assert first == second and first.endswith("\n")


def test_the_dearer_is_taken_and_said():
    rows, header = made()
    cells = lambda model, *columns: [rows[model].get(column, "") for column in columns]
    assert cells("same", "input", "cache_read", "output", "context") == ["2500000000", "1250000000", "10000000000", "128000"]
    assert cells("dearer-here", "input", "cache_read", "output") == ["5000000000", "", "15000000000"]
    # From 2026-12-01 on; the long cache stays 1.6 times the short one.
    assert cells("dearer-there", "input", "cache_write", "cache_write_1h", "output") == ["3000000000", "3750000000", "6000000000", "15000000000"]
    differs = [line.removeprefix("differs: ") for line in header if line.startswith("differs: ")]
    assert differs == [
        "anthropic dearer-there cache_write: $2.50, $3.75",
        "anthropic dearer-there input: $2.00, $3.00",
        "anthropic dearer-there output: $10.00, $15.00",
        "anthropic long-there context: 200000 tokens, 1000000 tokens",
        "anthropic long-there tier_above: none, 200000 tokens",
        "openai dearer-here input: $5.00, $2.50",
        "openai dearer-here output: $15.00, $10.00",
    ]
    assert any("differ in 7 cells" in line for line in header)


def test_long_prompts_cost_what_they_do_in_either_list():
    rows, _ = made()
    tier = lambda model: [rows[model].get(f"tier_{column}", "") for column in ("above", "input", "cache_write", "cache_write_1h", "output")]
    assert tier("long") == ["100000", "500000000", "", "", "2500000000"]
    assert tier("long-there") == ["200000", "6000000000", "7500000000", "12000000000", "22500000000"]


def test_what_is_listed_and_how():
    rows, _ = made()
    assert rows["dearer-there-5"]["input"] == "1000000000", "the next version is not the family"
    assert rows["no-limits"].get("max_output", "") == "", "priced, but no budget can be held for it"
    assert (rows["tiny"]["input"], rows["tiny"]["output"]) == ("1", "1"), "rounded up, never to nothing"
    assert (rows["spoken"]["unit"], rows["spoken"]["each"]) == ("characters", "15000000000")
    assert (rows["heard"]["unit"], rows["heard"]["each"]) == ("seconds", "100000000000")
    assert not {"x-search-preview", "elsewhere/same", "other", "sample_spec"} & set(rows)


def test_what_is_sold_by_region_costs_the_dearest():
    rows, _ = made()
    cells = lambda model: [rows[model].get(column, "") for column in ("provider", "input", "cache_read", "output", "context", "reasoning")]
    # Europe does not say what its cache costs: a tenth more, as everything there.
    assert cells("sold") == ["azure", "1100000000", "550000000", "4400000000", "1000", "1"]
    assert rows["sold-2026-01-01"]["output"] == "4400000000", "the regions of the model are the snapshot's"
    assert not {"router", "eu/sold", "hd/sold"} & set(rows), "a router bills for another model besides"


def test_the_other_providers():
    rows, _ = made()
    cells = lambda model, *columns: [rows[model].get(column, "") for column in columns]
    assert cells("draws", "provider", "mode", "output", "audio_input", "max_output") == ["gemini", "", "30000000000", "1000000000", "100"]
    assert cells("vectors", "mode", "input", "output", "max_output") == ["embedding", "150000000", "0", "0"]
    assert cells("by-day", "input", "cache_read", "cache_write", "output") == ["270000000", "70000000", "", "1100000000"]
    assert cells("acme/Llama-9", "provider", "input", "max_output") == ["together", "200000000", ""], "a window is no limit of output"
    assert cells("acme/quick", "provider", "output", "reasoning") == ["groq", "80000000", "1"], "who knows whether it thinks?"
    assert not {"sings", "voxtral-1", "acme/gone"} & set(rows)


def test_openrouter_charges_what_the_maker_does():
    rows, _ = made()
    columns = ("input", "cache_read", "tier_above", "tier_input", "tier_cache_read", "tier_output", "max_output")
    assert [rows["anthropic/long"].get(column, "") for column in columns] == [
        "100000000", "10000000", "100000", "500000000", "50000000", "2500000000", "128000"]
    # Hosted by many: a price, and no bound to hold a budget by. One whose long prompts are dearer elsewhere has no price.
    assert (rows["acme/llama-9"]["context"], rows["acme/llama-9"].get("max_output", "")) == ("8192", "")
    assert not {"llama-9", "acme/long", "anthropic/unheard-of", "~acme/latest"} & set(rows)


def test_sources_and_date_stand_in_the_header():
    for header in (made("2026-11-20")[1], (ROOT / "core/data/prices.tsv").read_text().splitlines()):
        sources = [line for line in header if "source: " in line]
        assert len(sources) == 2 and all("as of 20" in line and "sha256 " in line and "github.com/" in line for line in sources)
    assert run("--date", "today", *LISTS).returncode != 0
