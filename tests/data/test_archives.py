"""Test damaged archives and text files: one line, and nothing else, whatever is in them."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtt_fast.data.archives import read_gzip, read_tar
from mtt_fast.errors import InputError
from mtt_fast.storage.regular import read_lines

WANTED = {"folder/a": 2000, "folder/b": 2000}


def tar(form: int) -> bytes:
    """Return a tar that is not compressed, with the two wanted files and a third of a long name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name in ("folder/a", f"x/{'long' * (40 if form != tarfile.USTAR_FORMAT else 20)}ö", "folder/b"):
            member = tarfile.TarInfo(name)
            member.size = 700
            archive.addfile(member, io.BytesIO(name[-1].encode("latin1") * 700))
    return file.getvalue()


FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("form", FORMS)
def test_whole_archives_are_read(tmp_path: Path, form: int) -> None:
    (tmp_path / "x").write_bytes(gzip.compress(tar(form)))
    whole = {"folder/a": b"a" * 700, "folder/b": b"b" * 700}
    for size in (2000, 700):
        assert read_tar(tmp_path / "x", dict.fromkeys(whole, size), "fix it") == whole
    with pytest.raises(InputError, match=r"x: .* \(folder/b of 700 bytes, where at most 699 can be\); fix it"):
        read_tar(tmp_path / "x", {"folder/a": 700, "folder/b": 699}, "fix it")


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(gzip.compress(bytes(700)))
    assert read_gzip(tmp_path / "x", 700, "fix it") == bytes(700)
    with pytest.raises(InputError, match=r"x: expected at most 699 bytes in it, found more; fix it"):
        read_gzip(tmp_path / "x", 699, "fix it")


def damaged(data: st.DataObject, raw: bytes) -> bytes:
    """Change some bytes, and perhaps leave some out at the end."""
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])


def with_checksums(raw: bytes) -> bytes:
    """Make the headers' own checksums right again, so that what else is wrong is looked at."""
    blocks = bytearray(raw)
    for start in range(0, len(blocks) - 511, 512):
        header = blocks[start : start + 512]
        if header[257:262] == b"ustar":
            total = sum(header[:148]) + 8 * 32 + sum(header[156:])
            blocks[start + 148 : start + 156] = f"{total:06o}\0 ".encode()
    return bytes(blocks)


@settings(max_examples=200)
@given(st.data())
def test_no_damage_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tar.gz"
    if data.draw(st.booleans()):  # in the tar, or in the gzip
        path.write_bytes(gzip.compress(with_checksums(damaged(data, tar(data.draw(st.sampled_from(FORMS)))))))
    else:
        path.write_bytes(damaged(data, gzip.compress(tar(tarfile.GNU_FORMAT))))
    line = ""
    for read in (
        lambda: read_tar(path, WANTED, "fix it"),
        lambda: read_gzip(path, 100_000, "fix it"),
        lambda: read_lines(path, 100_000, "fix it"),
    ):
        try:
            read()
        except InputError as error:
            line = str(error)
        assert "\n" not in line


def test_a_name_as_long_as_the_archive_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("n" * (3 << 20)))
    (tmp_path / "x").write_bytes(gzip.compress(file.getvalue()))
    with pytest.raises(InputError, match=r"x: expected a whole .*unpacks to more than the data set"):
        read_tar(tmp_path / "x", WANTED, "fix it")
