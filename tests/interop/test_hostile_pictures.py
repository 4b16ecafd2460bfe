"""Test pictures with records, and parquet files, that are built to hurt: one line that names the file, at once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from mtt_fast.interop import (
    read_set,
)
from tests.interop.helpers import N, distilled
from tests.interop.hostile import INFO, refused

pytestmark = pytest.mark.usefixtures("bounded")


BROKEN: dict[str, list[Any]] = {
    "labels": [[10**30] * N, [float("nan")] * N, [1.0] * N, "abcdef", {"a": 1}, [True] * N, [[0]] * N, [None] * N],
    "lr": [float("inf"), 0, -1, [1], "x", 10**400, None, True],
    "lr_per_step": [[0.1, 0], [], "x", [[0.1]], 0.1],
    "std": [[0, 1, 1], [-1, 1, 1], [1, 1], ["a"] * 3, [10**400] * 3, [10**29] * 3, None, 5, [[1], [1], [1]]],
    "mean": [[float("nan")] * 3, [float("inf")] * 3, {}, [True] * 3],
    "class_names": [["a", "a", "b"], [1, 2, 3], "abc", [], [[1], [2], [3]], None],
    "canvas": [
        {"size": 3, "samples": 1}, {"a": 1}, {"size": 0, "samples": 1}, {"size": 2.0, "samples": 1}, [2, 1],
        {"size": True, "samples": 1},
    ],
    "files": [[], ["nope.png"] * N, ["labels.json"] * N, [""] * N, ["a\0b"] * N, ["x" * 5000] * N, {"a": 1}],
    "label_kind": ["zz", None, [1]],
    "recipe": [[], None],
    "versions": [3],
    "whitened": ["yes", True],
    "format": [None, [1]],
    "checksum": ["x", None, 5],
}  # fmt: skip
FIELDS = [(name, value) for name, values in BROKEN.items() for value in values]


@pytest.mark.parametrize(("name", "value"), FIELDS)
def test_wrong_records_of_pictures_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    distilled().export("png", tmp_path)
    record = json.loads((tmp_path / "labels.json").read_text())
    (tmp_path / "labels.json").write_text(json.dumps(record | {name: value}))
    refused(lambda: read_set(tmp_path), tmp_path.name)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b"1" * 10**6,
        b"",
        b"null",
        b"[]",
        b"3",
        b"\xff",
        b"{}",
        b'{"format": "mtt_fast pictures 2"}',
    ],
)
def test_hostile_json_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "labels.json").write_bytes(text)
    refused(lambda: read_set(tmp_path, "png"), "labels.json")


def picture(width: int = 5, height: int = 4, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def cells(*contents: bytes | None) -> list[dict[str, Any]]:
    return [{"bytes": content, "path": "x"} for content in contents]


def one_often(size: int, count: int) -> Any:
    """Return a column that names one image of `size` bytes `count` times."""
    where = pyarrow.array([0] * count, pyarrow.int32())
    contents = pyarrow.DictionaryArray.from_arrays(where, pyarrow.array([bytes(size)], pyarrow.binary()))
    return pyarrow.StructArray.from_arrays([contents], ["bytes"])


def tables() -> dict[str, Any]:
    good = cells(*[picture()] * 3)
    columns: dict[str, dict[str, Any]] = {
        "text for images": {"image": ["a"] * 3, "label": [0, 1, 2]},
        "bytes without a path": {"image": [picture()] * 3, "label": [0, 1, 2]},
        "a row without image": {"image": [good[0], None, good[0]], "label": [0, 1, 2]},
        "an image without bytes": {"image": cells(picture(), None, picture()), "label": [0, 1, 2]},
        "a row without label": {"image": good, "label": [0, None, 2]},
        "labels of another set": {"image": good, "label": ["zebra", "owl", "cat"]},
        "labels between": {"image": good, "label": [0.5, 1, 2]},
        "lists for labels": {"image": good, "label": [[0], [1], [2]]},
        "labels of 2⁶³": {"image": good, "label": pyarrow.array([2**63] * 3, pyarrow.uint64())},
        "labels of 10¹²": {"image": good, "label": [10**12] * 3},
        "labels below 0": {"image": good, "label": [-1] * 3},
        "truth for labels": {"image": good, "label": [True] * 3},
        "no labels": {"image": good},
        "nothing": {"image": pyarrow.array([], pyarrow.struct([("bytes", pyarrow.binary())])), "label": pyarrow.array([], pyarrow.int64())},
        "ragged soft labels": {"image": good, "label": [0, 1, 2], "soft_label": [[0.1], [0.1, 0.2], [1.0]]},
        "soft labels that lack": {"image": good, "label": [0, 1, 2], "soft_label": [[0.1, 0.2, 0.7], None, [0.1, 0.2, 0.7]]},
        "soft labels of two classes": {"image": good, "label": [0, 1, 2], "soft_label": [[0.5, 0.5]] * 3},
        "text for soft labels": {"image": good, "label": [0, 1, 2], "soft_label": ["a"] * 3},
        "sizes that differ": {"image": cells(picture(), picture(4), picture()), "label": [0, 1, 2]},
        "no pictures": {"image": cells(*[b"xx"] * 3), "label": [0, 1, 2]},
        "a large picture": {"image": cells(picture(9000, 9000, "1")), "label": [0]},
        "sixteen bits": {"image": cells(picture(mode="I;16")), "label": [0]},
        "another program's": {"image": cells(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "label": [0]},
        "zeros": {"image": cells(bytes(3_000_000)), "label": [0]},
        "one often": {"image": one_often(400_000, 50), "label": [0] * 50},
        "nested": {"image": [{"bytes": {"bytes": b"a"}}] * 3, "label": [0, 1, 2]},
    }  # fmt: skip
    return {name: pyarrow.table(column) for name, column in columns.items()}


def test_tables_that_hold_no_set_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.storage.foreign._EXTRA_BYTES", 1 << 20)  # so that a bomb is small, too
    file = tmp_path / "x.parquet"
    for name, table in tables().items():
        parquet.write_table(table, file, compression="zstd")
        assert refused(lambda: read_set(file, info=INFO), "x.parquet"), name


@pytest.mark.parametrize(
    ("name", "words"),
    [("zeros", "1 rows that claim 3,0"), ("one often", "bytes of images, found more; it is damaged")],
)
def test_tables_that_unpack_to_much_more_are_refused_before_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setattr("mtt_fast.storage.foreign._EXTRA_BYTES", 1 << 20)
    parquet.write_table(tables()[name], tmp_path / "x.parquet", compression="zstd")
    assert refused(lambda: read_set(tmp_path / "x.parquet", info=INFO), words)


@pytest.mark.parametrize("key", ["huggingface", "mtt_fast"])
@pytest.mark.parametrize("text", [b"{", b"[]", b"3", b'{"info": 3}', b'{"info": null}', b'{"info": {"features": []}}', b"[" * 100_000, b"\xff",
                                  b'{"info": {"features": {"label": {"names": "abc"}}}}', b'{"info": {"features": {"label": {"names": ["a", 2, 3]}}}}'])  # fmt: skip
def test_wrong_metadata_of_tables_is_refused(tmp_path: Path, key: str, text: bytes) -> None:
    good = pyarrow.table({"image": cells(*[picture()] * 3), "label": [0, 1, 2]})
    parquet.write_table(good.replace_schema_metadata({key: text}), tmp_path / "x.parquet")
    refused(lambda: read_set(tmp_path / "x.parquet", info=INFO), "x.parquet")
