"""Check what is read of damaged files: tensors, records, metrics, options."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from mtt_fast.errors import InputError
from mtt_fast.storage.checksums import checksum_of
from mtt_fast.storage.metrics import MetricsLog, read_records
from mtt_fast.storage.records import check_form, read_record, verified, with_checksum, write_record
from mtt_fast.storage.regular import open_regular, read_text
from mtt_fast.storage.run_folder import read_config, write_config
from mtt_fast.storage.tensor_files import load_tensors, read_header, save_tensors
from mtt_fast.storage.text_files import parse_json
from tests.storage.damage import TEXTS, flip_bit, one_of_each_byte


def test_every_byte_of_small_files_counts(tmp_path: Path) -> None:
    """Flip bits of a tensor file, a record, a line of metrics and options: no flip goes unseen, none gives another error."""
    tensors = {"a": torch.tensor([1.5, -2.0]), "b": torch.tensor(7)}
    path = tmp_path / "small.safetensors"
    save_tensors(path, tensors, {"format": "mtt_fast small 2", "more": "x"}, by_row=["a"])
    expected = load_tensors(path)
    for bit in one_of_each_byte(path):
        flip_bit(path, bit)
        with pytest.raises(InputError, match=r"small\.safetensors: "):
            load_tensors(path)
        flip_bit(path, bit)
    assert all(torch.equal(value, expected[0][name]) for name, value in load_tensors(path)[0].items())

    record = tmp_path / "record.json"
    write_record(record, {"a": 1.5, "b": ["x", None]})
    write_config(tmp_path, {"dataset": "digits", "lr_img": 1e-3, "zca": True, "none": None}, "note")
    for file, read in (
        (record, lambda: read_record(record, "a", "b")),
        (tmp_path / "config.toml", lambda: read_config(tmp_path)),
    ):
        value = read()
        for bit in one_of_each_byte(file):
            flip_bit(file, bit)
            try:
                value_read = read()
            except InputError as error:
                assert str(file) in str(error)  # noqa: PT017 - either is right
            else:
                assert value_read == value  # one kind of white space for another
            flip_bit(file, bit)

    metrics = tmp_path / "metrics.jsonl"
    log = MetricsLog(tmp_path, 0)
    log.write("step", 1, loss=0.25, lr=0.01)
    log.write("evaluation", 1, accuracy_mean=0.5, accuracy_std=0.1, networks=2)
    log.close()
    both = read_records(metrics)
    for bit in one_of_each_byte(metrics):
        flip_bit(metrics, bit)
        assert all(line in both for line in read_records(metrics)), bit
        flip_bit(metrics, bit)


def test_a_checksum_is_that_of_all_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.storage.checksums._BLOCK", 8)
    content = bytes(range(40))
    assert checksum_of(content[:20], memoryview(content)[20:]) == xxhash.xxh3_128_hexdigest(content)


def test_records_come_back_as_they_were() -> None:
    record = {"b": [1, 2.5, None, float("inf")], "a": {"x": "ü", 3: True, 20: ()}}
    assert verified(json.loads(json.dumps(with_checksum(record)))) == json.loads(json.dumps(record))
    assert verified({"old": 1}) == {"old": 1}
    with pytest.raises(ValueError, match="not what was written"):
        verified(with_checksum({"a": 1}) | {"later": 2})


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ([], {"a": int}),
        ([], {"a?": int}),
        ({}, {"a": int}),
        ({"a": "x"}, {"a?": int}),
        ({"a": {"b": 1, "c": "x"}}, {"a": {"*": int}}),
        ({"a": [1, "x"]}, {"a": [int]}),
        ({"a": 1}, {"a": [int]}),
        ({"a": None}, {"a": int | float}),
    ],
)
def test_values_are_checked_against_their_form(value: Any, form: Any) -> None:
    with pytest.raises((KeyError, TypeError)):
        check_form(value, form)
    check_form({"a": 1, "c": {"x": 2}, "more": None}, {"a": int, "b?": str, "c?": {"*": int}})


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "large"])
def test_wrong_headers_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(TEXTS[text]).to_bytes(8, "little") + TEXTS[text])
    with pytest.raises(InputError, match=r"bad\.safetensors: expected a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [],
        None,
    ],
)
def test_wrong_entries_are_refused(tmp_path: Path, entry: Any) -> None:
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "bad.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError, match=r"bad\.safetensors: expected a safetensors file, found a broken header"):
        load_tensors(tmp_path / "bad.safetensors")


def test_open_regular_takes_files_of_a_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    with open_regular(path, 5) as file:
        assert file.read() == b"12345"
    with pytest.raises(InputError, match="expected at most 4 bytes, found 5"):
        open_regular(path, 4)
    with pytest.raises(InputError, match="cannot be read"):
        open_regular(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        open_regular("a\0b")
    os.truncate(path, 1 << 40)
    with pytest.raises(InputError, match="expected at most"):  # of a size that nobody could read
        read_text(path)
    assert parse_json('{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


def test_a_file_that_fails_while_it_is_read_is_named() -> None:
    with pytest.raises(InputError, match=r"/proc/self/mem: cannot be read \(.*\); check the disk"):
        read_text("/proc/self/mem")  # its first page is not there


def test_a_file_without_tensors_ends_after_its_header(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    save_tensors(path, {}, {"a": "b"})
    assert load_tensors(path) == ({}, {"a": "b"})
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match="damaged: expected"):
        load_tensors(path)


def test_steps_are_no_evaluations_and_damaged_lines_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path, 0)
    for iteration in (1, 2, 3):
        log.write("step", iteration, loss=0.5, lr=0.1)
    log.write("evaluation", 3, accuracy_mean=0.5, accuracy_std=0.1, networks=2)
    log.close()
    assert [record["kind"] for record in log.evaluations] == ["evaluation"]
    found = [log.find(*place) for place in (("step",), ("step", 2), ("evaluation",), ("evaluation", 2))]
    assert found == [log.records[0], log.records[1], log.records[3], None]
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == log.records
    assert not caplog.text
    first, second, third, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:9] + b"\n" + third.replace(b"0.5", b"0.7") + last)
    assert [(record["kind"], record["iteration"]) for record in read_records(path)] == [("step", 1), ("evaluation", 3)]
    assert f"{path}: 2 damaged lines are left out" in caplog.text


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "step"},
        {"iteration": 1},
        {"kind": 1, "iteration": 1},
        {"kind": "gradient", "iteration": "1", "cosine": 0.5},
        {"kind": "gradient", "iteration": 1},
        {"kind": "gradient", "iteration": 1, "cosine": "0.5"},
        {"kind": "gradient", "iteration": 1, "cosine": 0.5, "more": None},
    ],
)
def test_lines_that_are_no_records_are_left_out(tmp_path: Path, other: dict[str, Any]) -> None:
    """Check it for lines from before there were checksums, and for the evaluations in a checkpoint."""
    path, whole = tmp_path / "metrics.jsonl", {"kind": "gradient", "iteration": 1, "cosine": 0.5}
    path.write_text(f"{json.dumps(whole)}\n{json.dumps(other)}\n")
    assert read_records(path) == [whole]
    save_tensors(tmp_path / "checkpoint.safetensors", {}, {"evaluations": json.dumps([whole, other])})
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: not a checkpoint of this version"):
        MetricsLog(tmp_path, 1)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write("step", 1, loss=0.5, lr=0.1)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    assert whole, "a record is in the file at once, not in a buffer that a killed run would lose"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|No space"):
            log.write("step", 2, loss=0.5, lr=0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole
    assert len(log.records) == 1
    log.close()
