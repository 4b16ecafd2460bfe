"""Test downloads from a server on this machine: whole and checked, or nothing."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mtt_fast.data import cifar, mnist
from mtt_fast.data.download import fetch
from mtt_fast.data.packing import packed
from mtt_fast.errors import InputError
from tests.data import cifar_files, mnist_files

CONTENT = bytes(range(256)) * 4000


class Handler(http.server.BaseHTTPRequestHandler):
    """A server of `files`; a path that begins with /short/ breaks off in the middle, /endless/ names no length."""

    files: dict[str, bytes]
    length = ""

    def do_GET(self) -> None:
        content = self.files.get(self.path.rsplit("/", 1)[1])
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        if self.path.startswith("/odd/"):
            self.send_header("Content-Length", self.length)
        elif not self.path.startswith("/endless/"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path.startswith("/short/") else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def files() -> dict[str, bytes]:
    return {"a.bin": CONTENT}


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[str]:
    handler = type("Serving", (Handler,), {"files": files})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def check_refused(url: str, folder: Path, message: str, checksum: str = md5(CONTENT)) -> None:
    with pytest.raises(InputError, match=message) as raised:
        fetch(url, folder / "a.bin", md5=checksum, progress=False)
    assert "\n" not in str(raised.value)
    assert "by hand to" in str(raised.value)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("below", ["", "endless/"])
def test_a_whole_file_arrives(server: str, tmp_path: Path, below: str) -> None:
    fetch(f"{server}{below}a.bin", tmp_path / "new" / "a.bin", md5=md5(CONTENT), progress=True)
    assert (tmp_path / "new" / "a.bin").read_bytes() == CONTENT
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_a_wrong_checksum_leaves_nothing(server: str, tmp_path: Path) -> None:
    check_refused(f"{server}a.bin", tmp_path, r"expected the checksum \(md5\) 0000, found", "0000")


def test_an_interrupted_transfer_leaves_nothing(server: str, tmp_path: Path) -> None:
    check_refused(f"{server}short/a.bin", tmp_path, f"({len(CONTENT)} bytes, found only {len(CONTENT) // 2}|broke off)")


def test_a_refused_connection_or_page_leaves_nothing(server: str, tmp_path: Path) -> None:
    check_refused(f"{server}b.bin", tmp_path, "expected an answer, found none.*404")
    check_refused("http://127.0.0.1:1/a.bin", tmp_path, "expected an answer, found none")


def test_what_does_not_end_is_cut_off(server: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected at most 1,000 bytes, found more"):
        fetch(f"{server}endless/a.bin", tmp_path / "a.bin", md5=md5(CONTENT), progress=False, most=1000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", ["abc", "-5", "9" * 30, "²"])
def test_a_length_that_is_none_does_not_matter(
    server: str, tmp_path: Path, length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "length", length)
    fetch(f"{server}odd/a.bin", tmp_path / "a.bin", md5=md5(CONTENT), progress=False)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_failed_download_keeps_the_file_before_it(server: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(InputError):
        fetch(f"{server}short/a.bin", tmp_path / "a.bin", md5=md5(CONTENT), progress=False)
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_cifar_is_fetched_once_and_read(
    server: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = cifar_files.archived(cifar_files.python_folder(tmp_path / "made", "CIFAR10"))
    files[archive.name] = archive.read_bytes()
    home = tmp_path / "data"
    with pytest.raises(InputError, match="expected the checksum"):
        cifar.source("CIFAR10", home, None, download=True, progress=False, url=server)  # it is not the real archive
    assert not home.exists()
    spec = replace(cifar.SPECS["CIFAR10"], md5=md5(files[archive.name]))
    monkeypatch.setitem(cifar.SPECS, "CIFAR10", spec)
    source = cifar.source("CIFAR10", home, None, download=True, progress=False, url=server)
    cifar_files.check(packed(source, home / "packed", progress=False), "CIFAR10")
    files.clear()
    again = cifar.source("CIFAR10", home, None, download=True, progress=False, url=server)
    assert again.key == source.key


def test_mnist_is_fetched_and_only_what_is_missing(
    server: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in mnist_files.files(tmp_path / "made").iterdir():
        files[f"{path.name}.gz"] = gzip.compress(path.read_bytes())
    a, b, c, d = (md5(files[f"{name}.gz"]) for name in mnist.FILES)
    monkeypatch.setitem(mnist.SPECS, "MNIST", replace(mnist.SPECS["MNIST"], md5=(a, b, c, d)))
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / f"{mnist.FILES[0]}.gz").write_bytes(files.pop(f"{mnist.FILES[0]}.gz"))  # which the server now lacks
    source = mnist.source("MNIST", tmp_path / "data", download=True, progress=False, url=server)
    mnist_files.check(packed(source, tmp_path / "data" / "packed", progress=False))
