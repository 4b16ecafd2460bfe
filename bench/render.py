"""Write tables and plots of the records: `python -m bench render`.

In the documents, the text between `<!-- bench:NAME -->` and `<!-- /bench -->` becomes the table of the record NAME.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from bench.plots import DRAWN, draw
from bench.records import PARTIAL, TRACE, read_record
from bench.tables import table
from mtt_fast.commands.option_fields import MAY_BE_EMPTY
from mtt_fast.errors import InputError
from mtt_fast.storage.text_files import write_text

log = logging.getLogger("mtt_fast")

_MARKED = re.compile(r"(<!-- bench:(?P<name>\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


@dataclass(frozen=True)
class Options:
    """Make Markdown tables and PNG plots of the records, and update the documents that quote them."""

    results: str = "bench/results"
    """folder of the records; NAME.md and NAME.png are written beside NAME.json"""
    documents: Annotated[str, MAY_BE_EMPTY] = "docs/performance.md,docs/gpu-measurements.md,docs/precision.md"
    """files with markers to fill in, joined by commas; "" for none"""


def main(options: Options, command: str) -> None:
    """Render every record, then fill in the marked places of the documents."""
    folder = Path(options.results)
    paths = sorted(path for path in folder.glob("*.json") if not path.name.endswith((TRACE, PARTIAL)))
    if not paths:
        raise InputError(f"{folder}: holds no records; make one, e.g. with python -m bench meta_step")
    tables = {}
    for path in paths:
        record = read_record(path)
        tables[path.stem] = rendered(record)
        write_text(path.with_suffix(".md"), tables[path.stem])
        if record["benchmark"] in DRAWN:
            draw(record, path.with_suffix(".png"))
    for document in map(Path, filter(None, options.documents.split(","))):
        write_text(document, filled_in(document.read_text(encoding="utf-8"), tables, document))
    log.info("%s: %d records", folder, len(paths))


def filled_in(text: str, tables: dict[str, str], where: Path) -> str:
    """Return `text` with each marked place holding its record's table. Raises `InputError` for an unknown record."""

    def replaced(match: re.Match[str]) -> str:
        if match["name"] not in tables:
            raise InputError(f"{where}: marker bench:{match['name']}: no such record; there are {', '.join(tables)}")
        return f"{match[1]}{tables[match['name']]}{match[3]}"

    return _MARKED.sub(replaced, text)


def rendered(record: dict[str, Any]) -> str:
    """Return a record's table, with the conditions under it."""
    versions = record["versions"]
    dirty = " with changes" if record.get("dirty") else ""
    return (
        f"{table(record['benchmark'], record['conditions'], record['rows'])}\n"
        f"{record['device']}, torch {versions.get('torch')}, {str(record.get('time'))[:10]}, "
        f"commit {str(record.get('commit'))[:8]}{dirty}: `{record.get('command')}`\n"
    )
