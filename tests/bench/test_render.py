"""Check the tables that are made from records, and that the committed tables and documents are those of the committed records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.plots import DRAWN
from bench.records import PARTIAL, TRACE, read_record
from bench.render import Options, filled_in, rendered
from bench.tables import TABLES, table
from mtt_fast import InputError
from mtt_fast.commands import cli

ROOT = Path(__file__).resolve().parents[2]


def test_render_fills_in_the_marked_places(tmp_path: Path) -> None:
    times = {"median": 2.0, "least": 1.5, "most": 2.5, "n": 3}
    rows = [
        {"engine": "fused", "exact": True, "seconds": times, "speedup": 4.0, "error": 1e-6, "problem": None},
        {"engine": "own", "exact": True, "seconds": None, "problem": "does not fit"},
    ]
    record = {
        "name": "one", "benchmark": "meta_step", "conditions": {"case": "toy"}, "rows": rows, "device": "a device",
        "versions": {"torch": "1"}, "commit": "abcdef0123", "dirty": False, "time": "2026-01-01", "command": "measured so",
    }  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(record))
    (tmp_path / "two.trace.json").write_text("{}")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:one -->\nold\n<!-- /bench -->\nafter\n")
    assert cli.run(main, ["render", "--results", str(tmp_path), "--documents", str(readme)]) == 0
    text = readme.read_text()
    assert "| fused  | 2 s (1.5 to 2.5, n = 3) | 4.00×" in text
    assert "does not fit" in text
    assert "commit abcdef01: `measured so`" in text
    assert "old" not in text
    assert text.startswith("before\n<!-- bench:one -->\n")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert (tmp_path / "one.png").stat().st_size > 1000

    assert cli.run(main, ["render", "--results", str(tmp_path), "--documents", str(readme)]) == 0
    assert readme.read_text() == text  # again changes nothing
    with pytest.raises(InputError, match="marker bench:three: no such record; there are one"):
        filled_in("<!-- bench:three -->\n<!-- /bench -->", {"one": ""}, readme)


RECORDS = sorted(path for path in (ROOT / "bench/results").glob("*.json") if not path.name.endswith((TRACE, PARTIAL)))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_committed_table_is_that_of_its_record(path: Path) -> None:
    record = read_record(path)
    assert path.with_suffix(".md").read_text() == rendered(record)
    assert path.with_suffix(".png").exists() == (record["benchmark"] in DRAWN)


def test_the_documents_quote_the_committed_records() -> None:
    tables = {path.stem: rendered(read_record(path)) for path in RECORDS}
    for document in (ROOT / name for name in Options().documents.split(",")):
        text = document.read_text()
        assert "<!-- bench:" in text
        assert filled_in(text, tables, document) == text


@pytest.mark.parametrize("benchmark", TABLES)
def test_every_benchmark_is_rendered(benchmark: str, tmp_path: Path) -> None:
    record = {
        "name": "one", "benchmark": benchmark, "conditions": {}, "rows": [{"problem": "none"}], "device": "a device",
        "versions": {"torch": "1"}, "commit": None, "dirty": False, "time": None, "command": "measured so",
    }  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(record))
    assert cli.run(main, ["render", "--results", str(tmp_path), "--documents", ""]) == 0
    assert "commit None: `measured so`" in (tmp_path / "one.md").read_text()
    assert (tmp_path / "one.png").exists() == (benchmark not in {"precision", "distillation", "suite", "gpu"})


def test_what_no_row_has_is_no_column() -> None:
    rendered_table = table("training", {}, [{"loop": "plain", "seconds": None, "problem": "no memory"}])
    assert rendered_table.splitlines()[0] == "| loop  | not timed because |"
