"""Test files of other software that are built to hurt, or of another kind: one line that names the file, at once."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtt_fast import InputError, SyntheticDataset, TrajectoryStore
from mtt_fast.checks import shown
from mtt_fast.convert.experts import expert_kinds_of, options_in_path
from mtt_fast.data import load
from mtt_fast.errors import one_line
from mtt_fast.interop import (
    SET_KINDS,
    buffer_files,
    read_set,
    set_kind_of,
    write_set,
)
from mtt_fast.storage.foreign import LARGEST_FILE, as_tensor, plain_tensor
from tests.interop.helpers import CLASSES, EXAMPLES, N, distilled, growing_less_than
from tests.interop.hostile import INFO, refused, rows_of

pytestmark = pytest.mark.usefixtures("bounded")


TENSORS: dict[str, Any] = {
    "a number": torch.tensor(1.0),
    "complex": torch.ones(N, 3, 4, 4, dtype=torch.complex64),
    "sparse": torch.eye(N).to_sparse(),
    "bool": torch.ones(N, 3, 4, 4).bool(),
    "whole": torch.ones(N, 3, 4, 4).int(),
    "eight bits": torch.ones(N, 3, 4, 4).to(torch.float8_e4m3fn),
    "unsigned": torch.ones(N, 3, 4, 4).to(torch.uint16),
    "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "nowhere": torch.ones(N, 3, 4, 4, device="meta"),
    "a claim of 4 TB": torch.ones(1).expand(N, 10**3, 10**4, 10**4),
    "empty": torch.ones(0, 3, 4, 4),
    "no channels": torch.ones(N, 0, 4, 4),
    "five dimensions": torch.ones(N, 3, 4, 4, 1),
    "a list": [torch.ones(3, 4, 4)] * N,
    "a tuple": (torch.ones(N, 3, 4, 4),),
    "a dictionary": {"images": torch.ones(N, 3, 4, 4)},
    "deep": [[[[[[]]]]]],
    "None": None,
    "text": "images",
    "NaN": torch.full((N, 3, 4, 4), float("nan")),
}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux alone")
def test_the_bound_of_these_tests_is_tight() -> None:
    with growing_less_than(64 << 20):
        torch.ones(48 << 20, dtype=torch.uint8)
    with pytest.raises(AssertionError), growing_less_than(64 << 20):
        torch.ones(80 << 20, dtype=torch.uint8)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("what", TENSORS)
def test_wrong_images_are_refused(tmp_path: Path, what: str, old: bool) -> None:
    try:
        torch.save(TENSORS[what], tmp_path / "images_best.pt", _use_new_zipfile_serialization=not old)
    except (RuntimeError, AttributeError, KeyError):
        pytest.skip("torch cannot write it so")
    torch.save(torch.zeros(N).long(), tmp_path / "labels_best.pt")
    refused(lambda: read_set(tmp_path), "images_best.pt")
    torch.save({"data": [[TENSORS[what], torch.zeros(N).long()]]}, tmp_path / "res_x.pt")
    refused(lambda: read_set(tmp_path / "res_x.pt"), "res_x.pt")


@pytest.mark.parametrize("what", ["parameter", "view", "turned", "half", "double", "expanded"])
def test_right_images_are_read(tmp_path: Path, what: str) -> None:
    whole = torch.randn(N, 3, 4, 4)
    images = {
        "parameter": torch.nn.Parameter(whole),
        "view": torch.randn(2 * N, 3, 4, 4)[::2],
        "turned": torch.randn(4, 4, 3, N).permute(3, 2, 0, 1),
        "half": whole.half(),
        "double": whole.double().requires_grad_(),
        "expanded": torch.randn(1, 1, 1, 1).expand(N, 3, 4, 4),
    }[what]
    torch.save(images, tmp_path / "images_best.pt")
    torch.save(torch.zeros(N).long(), tmp_path / "labels_best.pt")
    found = read_set(tmp_path)
    assert found.images.dtype == torch.float32
    assert torch.equal(found.images, images.detach().float())


@pytest.mark.parametrize(
    "rate",
    [
        0.0,
        -1.0,
        float("nan"),
        float("inf"),
        True,
        [0.1],
        [[[]]],
        {},
        None,
        "0.1",
        torch.rand(2),
        torch.tensor(1j),
        1e300,
    ],
)
def test_wrong_learning_rates_are_refused(tmp_path: Path, rate: Any) -> None:
    distilled().export("mtt", tmp_path)
    torch.save(rate, tmp_path / "lr_best.pt")
    refused(lambda: read_set(tmp_path), "_best.pt")


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    distilled().export("mtt", tmp_path)
    (tmp_path / "lr_best.pt").unlink()
    (tmp_path / "lr_best.pt").symlink_to(tmp_path / "gone")
    refused(lambda: read_set(tmp_path), "lr_best.pt")  # a rate that was there is not left out
    (tmp_path / "labels_best.pt").unlink()
    assert "expected the labels of images_best.pt" in refused(lambda: read_set(tmp_path), "labels_best.pt")


PICKLES = {
    "deep": b"]" * 20_000 + b"a" * 19_999 + b".",
    "deep tuples": b")" + b"\x85" * 20_000 + b".",
    "many lists": b"(" + b"]" * 60_000 + b"l.",
    "a large memo": b"]r\xff\xff\xff\x7f.",
    "laughs": b"]q\0(K\1K\1e" + b"".join(b"]q%c(" % i + b"h%c" % (i - 1) * 10 + b"e" for i in range(1, 30)) + b".",
    "itself": b"]q\0h\0a.",
    "bytes": b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "a tensor by size": b"ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R.",
    "a storage by size": b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.",
    "long text": b"X\xff\xff\xff\x7fabc.",
    "a number of digits": b"I" + b"1" * 100_000 + b"\n.",
    "a call": b"cos\nsystem\nX\4\0\0\0true\x85R.",
    "nothing": b"",
    "garbage": b"hello",
}


@pytest.mark.parametrize("name", ["images_best.pt", "res_x.pt", "replay_buffer_0.pt"])
@pytest.mark.parametrize("what", PICKLES)
def test_hostile_pickles_are_refused(tmp_path: Path, what: str, name: str) -> None:
    content, file = b"\x80\2" + PICKLES[what], tmp_path / name
    begin = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    torch.save(torch.zeros(N).long(), tmp_path / "labels_best.pt")
    read = rows_of if name.startswith("replay") else read_set
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3")
    refused(lambda: read(file), name)
    file.write_bytes(b"".join(pickle.dumps(one, 2) for one in begin) + content + pickle.dumps([], 2))
    refused(lambda: read(file), name)


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    def archive(name: str, *members: tuple[str, bytes], packed: bool = False) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as file:
            for member, content in members:
                file.writestr(member, content)
        return tmp_path / name

    number = ("a/data.pkl", b"\x80\2K\1.")
    bomb = archive("images_bomb.pt", number, ("a/data/0", bytes(50_000_000)), packed=True)
    assert "packed members" in refused(lambda: read_set(bomb), bomb.name)
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = archive("images_twice.pt", number, number)
    assert "one name twice" in refused(lambda: read_set(twice), twice.name)
    assert "another archive" in refused(lambda: read_set(archive("images_other.pt", ("x", b""))), "images_other.pt")
    both = tmp_path / "images_both.pt"  # an old file for torch, an archive for others
    both.write_bytes(pickle.dumps(1, 2) + twice.read_bytes())
    refused(lambda: read_set(both), both.name)


@pytest.mark.parametrize("kind", ["mtt", "dc"])
def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path, kind: str) -> None:
    """Check a file whose checksums torch.load itself does not read."""
    file, *_ = distilled().export(kind, tmp_path)
    raw = bytearray(file.read_bytes())
    place = raw.find(torch.load(file)[:, :1].numpy().tobytes()[:16] if kind == "mtt" else struct.pack("<qq", 1, 1))
    assert place > 0
    raw[place] ^= 1
    file.write_bytes(raw)
    refused(lambda: read_set(file), file.name)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    for name in ("images_x.pt", "res_x.pt", "x.parquet", "replay_buffer_0.pt"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(LARGEST_FILE + 1)
        read = rows_of if name.startswith("replay") else read_set
        assert "expected at most" in refused(lambda: read(tmp_path / name), name)  # noqa: B023
        os.truncate(tmp_path / name, 1 << 34)  # zeros
        refused(lambda: read(tmp_path / name), name)  # noqa: B023
        (tmp_path / name).unlink()


NAMES = (
    "images_best.pt", "res_x.pt", "x.parquet", "synthetic.safetensors", "labels.json", "IPC1/x.npz", "replay_buffer_0.pt",
    "waypoint_buffer_0.pt", "expert_0000.safetensors",
)  # fmt: skip


def make(kind: str, place: Path) -> None:
    match kind:
        case "pipe":
            os.mkfifo(place)
        case "device":
            place.symlink_to("/dev/zero")
        case "folder":
            place.mkdir()
        case "loop":
            place.symlink_to(place)
        case "dangling":
            place.symlink_to(place.with_name("gone"))
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(place.name)


def read_any(source: Path) -> object:
    """Find out the kind of a file as `convert` does, and read it."""
    match next(iter(expert_kinds_of(source)), None):
        case "buffer":
            options_in_path(source)
            return [rows_of(file) for file in buffer_files(source)]
        case "waypoints":
            return [rows_of(file) for file in ([source] if not source.is_dir() else sorted(source.iterdir()))]
        case "experts":
            folder = source if source.is_dir() else source.parent
            return [TrajectoryStore(folder).metadata(expert) for expert in range(len(TrajectoryStore(folder)))]
    return read_set(source, set_kind_of(source), info=INFO)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes, links and devices")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "dangling", "socket"])
@pytest.mark.parametrize("name", NAMES)
def test_folders_pipes_and_devices_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    file = tmp_path / "a" / name
    file.parent.mkdir(parents=True)
    monkeypatch.chdir(file.parent)
    make(kind, file)
    for source in (tmp_path / "a", file):
        refused(lambda: read_any(source), "a")  # noqa: B023


@pytest.mark.parametrize("kind", SET_KINDS)
def test_a_path_with_a_nul_is_refused(kind: str) -> None:
    refused(lambda: write_set("a\0b", distilled(), kind), r"a\x00b")
    refused(lambda: read_set("a\0b", kind), r"a\x00b")


def test_a_folder_with_a_nul_in_its_name_is_refused() -> None:
    refused(lambda: TrajectoryStore("a\0b"), r"a\x00b")
    refused(lambda: load("digits", data_path="a\0b"), r"a\x00b")


def test_names_with_line_breaks_stay_on_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "two\nlines\x1b[31m"
    distilled().export("mtt", folder)
    os.truncate(folder / "images_best.pt", 100)
    assert r"two\nlines\x1b[31m" in refused(lambda: read_set(folder), "images_best.pt")
    refused(lambda: read_set(Path("images\0.pt")), r"images\x00.pt")
    refused(lambda: read_set(Path("images" + "x" * 300 + ".pt")), "images")
    assert one_line("a\r\nb\u2028\udcff ×") == r"a\r\nb\u2028\udcff ×"


def test_folders_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distilled().export("mtt", tmp_path / "a")

    def denied(path: Any) -> list[str]:
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "listdir", denied)
    for find in (set_kind_of, expert_kinds_of, buffer_files, read_set):
        assert "Permission denied" in refused(lambda: find(tmp_path / "a"), "a")  # noqa: B023


def test_folders_of_thousands_of_files_are_read_fast(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"images_best_{number}.pt").touch()
        (tmp_path / f"x{number}").symlink_to("gone")
    (tmp_path / f"images_best_{10**20}.pt").touch()
    assert set_kind_of(tmp_path) == "mtt"
    refused(lambda: read_set(tmp_path), tmp_path.name)


def test_hostile_arrays_are_refused(tmp_path: Path) -> None:
    labels = np.ones((6, 2), np.float32)
    honest = np.ones((6, 4, 4, 3), np.float32)
    bad: dict[str, tuple[Any, Any]] = {
        "bomb": (np.zeros((8000, 32, 32, 3), np.float32), np.zeros((8000, 2))),
        "objects": (np.array([None]), labels),
        "complex": (honest.astype(complex), labels),
        "text": (np.array(["a"]), labels),
        "a number": (np.float32(1), labels),
        "no classes": (honest, np.ones((6, 0))),
        "NaN": (honest, labels * np.nan),
        "bytes": (honest.astype(np.uint8), labels),
        "long": (honest.astype(np.longdouble), labels),
        "fields": (np.ones(6, dtype=[("a", "f4")]), labels),
        "dates": (np.ones((6, 4, 4, 3), "M8[s]"), labels),
    }
    for name, (images, targets) in bad.items():
        folder = tmp_path / name / "IPC3"
        folder.mkdir(parents=True)
        np.savez_compressed(folder / "x.npz", images=images, labels=targets)
        refused(lambda: read_set(folder), "x.npz")  # noqa: B023
    (tmp_path / "IPC3").mkdir()
    np.savez(tmp_path / "IPC3" / "x.npz", images=honest.astype(">f2"), labels=labels.astype(">f8"))
    assert read_set(tmp_path / "IPC3").images.shape == (6, 3, 4, 4)


@pytest.mark.parametrize(
    "shape", ["(1000000000000,)", "(-1,)", "(" + "1," * 100 + ")", "(99999999999999999999,)", "(" * 300, "True"]
)
@pytest.mark.parametrize("kind", ["<f4", "|V0", "|O"])
def test_headers_of_arrays_that_claim_more_are_refused(tmp_path: Path, shape: str, kind: str) -> None:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    (tmp_path / "IPC1").mkdir()
    with zipfile.ZipFile(tmp_path / "IPC1" / "x.npz", "w") as archive:
        for name in ("images", "labels"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(100))
    refused(lambda: read_set(tmp_path / "IPC1"), "x.npz")


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.complex_numbers(),
    st.sampled_from([torch.zeros(2), torch.ones(()), torch.zeros(0), torch.eye(2).to_sparse(), torch.ones(2, 3, 4, 4), torch.ones(2).bool()]),
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from(["data", "images", "x"]), inner, max_size=2),
    ),
    max_leaves=12,
)


def problem(read: Callable[[Path], object], file: Path) -> str | None:
    """Return what a refusal says, or None after none."""
    try:
        read(file)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.fuzz
@given(value=ANYTHING, other=ANYTHING)
@settings(max_examples=EXAMPLES or 60, derandomize=not EXAMPLES, deadline=None)
def test_anything_that_torch_saves_is_read_or_refused(
    value: Any, other: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    names = ("images_x.pt", "labels_x.pt", "res_x.pt", "replay_buffer_0.pt", "waypoint_buffer_0.pt", "step_buffer_0.pt")
    for name, content in zip(names, (value, other) * 3, strict=True):
        torch.save(content, folder / name)
    for name in ("images_x.pt", "res_x.pt", "replay_buffer_0.pt", "waypoint_buffer_0.pt"):
        read = rows_of if "buffer" in name else read_set
        if (message := problem(read, folder / name)) is not None:
            assert message.isprintable()
            assert "_x.pt" in message or "buffer_0.pt" in message


@pytest.mark.fuzz
@given(value=ANYTHING)
@settings(max_examples=EXAMPLES or 60, derandomize=not EXAMPLES, deadline=None)
def test_helpers_before_anything(value: Any) -> None:
    assert one_line(shown(value)).isprintable()
    assert len(shown(value)) < 200
    for work, error in (
        (lambda: plain_tensor(value, "x"), InputError),
        (lambda: as_tensor(value, torch.int64), ValueError),
    ):
        try:
            found = work()
        except error:
            continue
        assert type(found) is Tensor


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, [2]], torch.int64),
        ([[1], 2], torch.float32),
        ([[1, 2], [3]], torch.int64),
        ([2**63], torch.int64),
        ([10**400], torch.float32),
    ],
    ids=["a list among numbers", "a number among lists", "lengths", "int64", "float32"],
)
def test_lists_that_are_no_tensor_are_one_kind_of_error(values: list[Any], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        as_tensor(values, dtype)


def test_every_file_that_is_written_can_be_read(tmp_path: Path) -> None:
    """Check that honest files are not refused."""
    for kind in ("mtt", "dc", "ddranking", "png", "parquet", "synthetic", "dc_benchmark"):
        write_set(tmp_path / kind, distilled(), kind)
        found = read_set(tmp_path / kind)
        assert len(found.labels) == N
        assert found.label_kind == "indices"
        if isinstance(found, SyntheticDataset):
            assert len(found.class_names) == CLASSES
