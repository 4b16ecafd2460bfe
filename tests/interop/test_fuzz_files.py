"""Check that every reader of a damaged file names it in one line, or has its original content, in bounded time and memory.

Short by default. The long run: `MTT_FAST_FUZZ=5000 pytest -m fuzz`, with other examples each time.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mtt_fast import InputError, TrajectoryStore, Whitening
from mtt_fast.data import load
from mtt_fast.data.mnist import FILES
from mtt_fast.interop import (
    as_tensor_set,
    buffer_files,
    export_experts,
    export_waypoints,
    import_experts,
    read_buffer,
    read_set,
    read_waypoints,
    write_set,
)
from mtt_fast.interop.experts import check_trajectory
from mtt_fast.interop.tensor_set import SourceInfo
from mtt_fast.storage.checkpoint import State, load_checkpoint, save_checkpoint
from mtt_fast.storage.metrics import read_records
from mtt_fast.storage.records import read_record, with_checksum, write_record
from mtt_fast.storage.run_files import METRICS
from mtt_fast.storage.run_folder import read_config, write_config
from mtt_fast.storage.trajectories import write_expert
from mtt_fast.storage.waypoints import convexified, evenly_spaced
from tests.data.mnist_files import arrays, idx
from tests.interop.buffers import NET, flat, metadata, save_buffers, trained, unmeasured
from tests.interop.helpers import CLASSES, EXAMPLES, IPC, distilled, growing_less_than

pytestmark = pytest.mark.fuzz

fuzzed = settings(max_examples=EXAMPLES or 40, derandomize=not EXAMPLES, deadline=None)
SECONDS = 30.0  # for a file of a few kilobytes, on a busy machine
MEMORY = 256 << 20

CPU = torch.device("cpu")
INFO = SourceInfo(("cat", "dog / wolf", "owl"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), None)


class Reader(NamedTuple):
    """Honest files of one kind, and their reader."""

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    checked: bool = True  # whether damage is found wherever it is; else another sound content may come of it


def content(value: Any) -> Any:
    """Return any content in a form that can be compared exactly."""
    if isinstance(value, Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: content(one) for name, one in vars(value).items()}
    if isinstance(value, dict):
        return {name: content(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [content(one) for one in value]
    return repr(value)


def a_set(folder: Path, kind: str, **options: Any) -> None:
    torch.manual_seed(0)
    write_set(folder, distilled("logits", lr_per_step=torch.rand(4)), kind, **options)


def hard_set(folder: Path, kind: str, **options: Any) -> None:
    torch.manual_seed(0)
    write_set(folder, distilled(), kind, **options)


def old_pair(folder: Path) -> None:
    torch.manual_seed(0)
    plain = as_tensor_set(distilled())
    for name, tensor in (("images", plain.images), ("labels", plain.labels), ("lr", plain.lr)):
        torch.save(tensor, folder / f"{name}_best.pt", _use_new_zipfile_serialization=False)


def kip(folder: Path) -> None:
    (folder / "IPC2").mkdir()
    images = np.random.default_rng(0).random((CLASSES * IPC, 4, 4, 3), np.float32)
    labels = np.eye(CLASSES, dtype=np.float32).repeat(IPC, 0) - 1 / CLASSES
    np.savez_compressed(folder / "IPC2" / "kip.npz", images=images, labels=labels)


def class_folders(folder: Path) -> None:
    for label, name in enumerate(("cat", "dog wolf", "owl")):
        (folder / name).mkdir()
        for number, suffix in enumerate(("png", "jpg", "bmp")):
            values = np.random.default_rng(label).integers(0, 256, (6, 5, 3), np.uint8)
            Image.fromarray(values).save(folder / name / f"{number}.{suffix}")


def foreign_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    hard_set(folder, "parquet")
    table = parquet.read_table(folder / "synthetic.parquet")
    parquet.write_table(pyarrow.table({name: table[name] for name in ("image", "label")}), folder / "synthetic.parquet")


def experts(folder: Path) -> TrajectoryStore:
    save_buffers(folder / "theirs", [trained(seed) for seed in range(2)], 2)
    store = import_experts(
        lambda: read_buffer(folder / "theirs" / "replay_buffer_0.pt"), folder, NET.layout, metadata(), unmeasured
    )
    shutil.rmtree(folder / "theirs")
    return store


def compressed(folder: Path) -> TrajectoryStore:
    rows = flat(trained(0))
    points, course = convexified(rows, NET.layout.sizes, evenly_spaced(len(rows) - 1, 3))
    write_expert(folder, 0, points, metadata(accuracy=unmeasured(rows)), course=course)
    return TrajectoryStore(folder)


def waypoint_buffers(folder: Path) -> None:
    list(export_waypoints(compressed(folder / "ours"), folder))
    shutil.rmtree(folder / "ours")


def replay_buffers(folder: Path) -> None:
    list(export_experts(experts(folder / "ours"), folder))
    shutil.rmtree(folder / "ours")


def of_store(folder: Path) -> object:
    store = TrajectoryStore(folder)
    return [
        (store.indices[place], store.metadata(place), [store.read(place, e / 2) for e in range(2 * store.epochs(place) + 1)])
        for place in range(len(store))
    ]  # fmt: skip


def of_buffers(folder: Path) -> object:
    experts = list(read_buffer(buffer_files(folder)[0]))
    for expert in experts:
        check_trajectory(expert, NET.layout)
    return [expert.rows() for expert in experts]


def of_waypoints(folder: Path) -> object:
    (file,) = (path for path in folder.iterdir() if path.name.startswith("waypoint"))
    experts = list(read_waypoints(file))
    for expert in experts:
        check_trajectory(expert, NET.layout)
    return [(expert.rows(), expert.course) for expert in experts]


def checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 1, 2, 2)
    state = State(7, 2, images, torch.arange(4), torch.tensor(0.01), images / 2, torch.tensor(0.5), skipped=1)
    save_checkpoint(folder, state)


def whitening(folder: Path) -> None:
    torch.manual_seed(0)
    Whitening.fit(torch.rand(20, 1, 2, 3)).save(folder / "zca.safetensors")


LINES = [{"kind": "step", "iteration": i, "loss": 0.5, "lr": 0.01} for i in range(1, 9)]


def metrics(folder: Path) -> None:
    (folder / METRICS).write_text("".join(json.dumps(with_checksum(line)) + "\n" for line in LINES))


def of_metrics(folder: Path) -> str:
    """Check that damaged lines are left out and the others are unchanged."""
    assert all(line in LINES for line in read_records(folder / METRICS))
    return "lines that were written"


def table(folder: Path) -> None:
    write_record(folder / "cross.json", {"cells": [{"question": {"ipc": 1, "lr": 0.01}, "text": "×"}], "versions": {}})


def mnist(folder: Path, zipped: bool) -> None:
    for name, values in zip(FILES, (*arrays(20, 0), *arrays(10, 1)), strict=True):
        raw = idx(values)
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)


def image_folder(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir()
        class_folders(folder / split)


def of_data(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        packed = folder.parent / "packed"
        shutil.rmtree(packed, ignore_errors=True)
        data = load(name, data_path=folder, packed_path=packed, progress=False)
        return data.class_names, data.mean, data.std, data.train, data.test

    return read


READERS = {
    "set": Reader(lambda folder: a_set(folder, "synthetic"), read_set),
    "pair": Reader(lambda folder: a_set(folder, "mtt"), read_set),
    "old pair": Reader(old_pair, read_set, checked=False),
    "ddranking": Reader(lambda folder: a_set(folder, "ddranking"), read_set),
    "dc": Reader(lambda folder: a_set(folder, "dc"), read_set),
    "dc_benchmark": Reader(lambda folder: hard_set(folder, "dc_benchmark"), read_set),
    "kip": Reader(kip, read_set),
    "ncfm": Reader(lambda folder: hard_set(folder, "ncfm"), lambda folder: read_set(folder, info=INFO)),
    "png": Reader(lambda folder: a_set(folder, "png"), read_set),
    "png, hard": Reader(lambda folder: hard_set(folder, "png"), read_set),
    "class folders": Reader(class_folders, lambda folder: read_set(folder, info=INFO), checked=False),
    "parquet": Reader(lambda folder: a_set(folder, "parquet"), read_set),
    "foreign parquet": Reader(foreign_parquet, lambda folder: read_set(folder, info=INFO), checked=False),
    "experts": Reader(experts, of_store),
    "compressed experts": Reader(compressed, of_store),
    "replay buffers": Reader(replay_buffers, of_buffers),
    "waypoint buffers": Reader(waypoint_buffers, of_waypoints),
    "checkpoint": Reader(checkpoint, lambda folder: load_checkpoint(folder, CPU)),
    "whitening": Reader(whitening, lambda folder: Whitening.load(folder / "zca.safetensors")),
    "metrics": Reader(metrics, of_metrics),
    "table": Reader(table, lambda folder: read_record(folder / "cross.json", "a table", "make it again")),
    "config": Reader(lambda folder: write_config(folder, {"dataset": "digits", "ipc": 1, "lr": 0.5}), read_config),
    "mnist, gz": Reader(lambda folder: mnist(folder, True), of_data("MNIST")),
    "mnist": Reader(lambda folder: mnist(folder, False), of_data("MNIST"), checked=False),
    "image folder": Reader(image_folder, of_data("folder"), checked=False),
}  # fmt: skip

HOSTILE_WORDS = (
    "NaN", "Infinity", "-1", "1e400", "1" * 5000, "1" + "0" * 30, "null", "[]", "{}", '"\\ud800"', "[" * 100_000, "true", "0.5",
)  # fmt: skip


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Return what spoils the bytes of a file: bits, cuts, repetitions, strange words in text."""
    kind = draw(st.sampled_from(["bit", "byte", "cut", "drop", "repeat", "zero", "insert", "word", "swap"]))
    rng = random.Random(draw(st.integers(0, 2**32)))

    def spoil(raw: bytes) -> bytes:
        begin, end = sorted((rng.randrange(len(raw)), rng.randrange(len(raw))))
        length = min(end - begin, 1 << rng.randrange(12)) + 1
        part, before, after = raw[begin : begin + length], raw[:begin], raw[begin + length :]
        match kind:
            case "bit":
                return before + bytes([raw[begin] ^ 1 << rng.randrange(8)]) + raw[begin + 1 :]
            case "byte":
                return before + bytes([rng.randrange(256)]) + raw[begin + 1 :]
            case "cut":
                return before
            case "drop":
                return before + after
            case "repeat":
                return before + part * rng.randrange(2, 5) + after
            case "zero":
                return before + bytes(length) + after
            case "insert":
                return before + rng.randbytes(length) + part + after
            case "swap":
                return before + after[:length] + part + after[length:]
        numbers = [place for place, byte in enumerate(raw) if byte in b"0123456789"]
        begin = rng.choice(numbers) if numbers else begin
        end = begin
        while end < len(raw) and raw[end] in b"0123456789.e-+":
            end += 1
        return raw[:begin] + rng.choice(HOSTILE_WORDS).encode() + raw[end:]

    return spoil


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Return the folder of honest files of a kind, and what is read from them; made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("honest") / "files"
            folder.mkdir()
            READERS[kind].write(folder)
            made[kind] = folder, content(READERS[kind].read(folder))
        return made[kind]

    return make


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fail if the test makes the process larger than by `MEMORY`."""
    with growing_less_than(MEMORY):
        yield


def outcome(read: Callable[[Path], object], folder: Path) -> Any:
    """Return the content, or None after a fitting refusal."""
    start = time.monotonic()
    try:
        return content(read(folder))
    except InputError as error:
        message = str(error)
        names = [path.name for path in folder.rglob("*")]
        assert "\n" not in message
        assert message.isprintable()
        assert any(name in message for name in (*names, folder.name, "MNIST")), message
        assert len(message) < 1000, message
        return None
    finally:
        assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
@fuzzed
def test_a_damaged_file_is_named_or_read_as_it_was(
    kind: str, honest: Callable[[str], tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source, expected = honest(kind)
    folder = tmp_path_factory.mktemp("damaged") / "files"
    shutil.copytree(source, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    file = data.draw(st.sampled_from(files))
    spoil = data.draw(damage())
    raw = spoil(file.read_bytes())
    unchanged = raw == file.read_bytes()
    file.write_bytes(raw)
    with growing_less_than(MEMORY):
        result = outcome(READERS[kind].read, folder)
    if unchanged or READERS[kind].checked:
        assert result in (None, expected), f"{file.name} gave other content"
    shutil.rmtree(folder.parent)
