"""Check one flipped bit, one cut, one foreign file: the command that reads it says so in one line, or makes a cache anew."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtt_fast import SyntheticDataset, TrajectoryStore
from mtt_fast.baselines.command import main as baseline
from mtt_fast.commands import cli
from mtt_fast.cross.command import main as cross
from mtt_fast.distill.command import main as distill
from mtt_fast.errors import InputError
from mtt_fast.evaluate import main as evaluate
from mtt_fast.report.__main__ import main as report
from mtt_fast.storage.metrics import read_records
from mtt_fast.storage.records import read_record
from mtt_fast.storage.tensor_files import load_tensors, read_header, save_tensors
from tests.storage.damage import TEXTS, bits_of, flip_bit

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 3 --max_start_epoch 2 --expert_epochs 1 "
    "--syn_steps 3 --Iteration 4 --eval_it 2 --num_eval 2 --epoch_eval_train 1 --batch_real 512 --batch_train 512 --lr_img 10 "
    "--zca"
).split()
EVALUATION = ["--num_eval", "1", "--epoch_eval_train", "1"]


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory, no_curves: None) -> Path:
    """Make a folder with the whole output of a whitened toy run: data, buffers, run, and a table of it."""
    folder = tmp_path_factory.mktemp("integrity")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.run(distill, [*TOY, "--out", "run"]) == 0
        assert cli.run(cross, ["run", "--out", "cross", "--models", "ConvNetD1W4", *EVALUATION]) == 0
    return folder


@pytest.fixture
def working_folder(trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a copy of that folder the working directory."""
    shutil.copytree(trained_folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def expert(folder: str = "buffers") -> Path:
    return next(Path(folder).rglob("expert_0001.safetensors"))


RESUME = ["--out", "run", "--resume", "--Iteration", "6"]
JOBS: list[tuple[str, Callable[..., Any], list[str]]] = [
    ("run/synthetic.safetensors", evaluate, ["run", *EVALUATION]),
    ("run/synthetic.safetensors", cross, ["run", "--out", "other", "--models", "ConvNetD1W4", *EVALUATION]),
    ("run/checkpoint.safetensors", distill, RESUME),
    ("run/config.toml", distill, RESUME),
    ("run/config.toml", report, ["run"]),
    ("run/summary.json", distill, [*TOY, "--out", "run"]),
    ("run/summary.json", report, ["run"]),
    ("cross/cross.json", cross, ["run", "--out", "cross", "--models", "ConvNetD1W4", *EVALUATION]),
]


def says_the_same(text: bytes, other: bytes) -> bool:
    """Return whether two files of JSON hold the same values: 1e-05 is 1E-05, and a time's 17th digit may round to the same number."""
    with contextlib.suppress(ValueError):
        return bool(json.loads(text) == json.loads(other))
    return False


def test_flips_that_leave_a_number_as_it_is_are_no_damage() -> None:
    assert says_the_same(b'{"seconds": 1E-05}', b'{"seconds": 1e-05}')
    assert says_the_same(b'{"seconds": 0.10000000000000001}', b'{"seconds": 0.10000000000000000}')
    assert not says_the_same(b'{"seconds": 0.2}', b'{"seconds": 0.3}')
    assert not says_the_same(b'{"seconds" 0.2}', b'{"seconds": 0.2}')


@pytest.mark.parametrize(("name", "job", "arguments"), JOBS, ids=[f"{name}-{job.__module__}" for name, job, _ in JOBS])
def test_a_flipped_bit_is_named(
    working_folder: Path, capsys: pytest.CaptureFixture[str], name: str, job: Callable[..., Any], arguments: list[str]
) -> None:
    path, whole = Path(name), Path(name).read_bytes()
    for bit in bits_of(path, 30):
        path.write_bytes(whole)
        flip_bit(path, bit)
        if says_the_same(path.read_bytes(), whole):
            continue
        assert cli.run(job, arguments) == 2, bit
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.match(rf"error: (/.*/)?{name}: ", error), bit
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        assert cli.run(job, arguments) == 2, length
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.match(rf"error: (/.*/)?{name}: ", error), length


def test_a_flipped_bit_of_an_expert_is_named_by_whoever_reads_it(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = expert(), expert().read_bytes()
    entries, _ = read_header(path)
    begin, end = entries["parameters"].begin, entries["parameters"].end
    draw, row = random.Random(0), (end - begin) // 4
    in_header = [draw.randrange(8 * begin) for _ in range(20)]
    in_rows = [8 * draw.randrange(begin + number * row, begin + (number + 1) * row) for number in range(3)]
    errors = []
    for bit in in_header + in_rows:
        path.write_bytes(whole)
        flip_bit(path, bit)
        errors.append(cli.run(distill, [*TOY, "--out", "new"]))
        said = capsys.readouterr().err
        if errors[-1]:
            assert (errors[-1], said.strip().splitlines()[-1].partition(f"{path}: ")[0]) == (2, "error: "), bit
        else:  # the four iterations do not come to this row
            assert torch.equal(images_of("new"), images_of("run"))
        shutil.rmtree("new", ignore_errors=True)
    assert errors[: len(in_header)] == [2] * len(in_header)
    assert 2 in errors[len(in_header) :]


def images_of(folder: str) -> torch.Tensor:
    return SyntheticDataset.load(Path(folder) / "synthetic.safetensors").images


@pytest.mark.parametrize("name", ["data/packed/digits.safetensors", "data/packed/digits.zca.safetensors"])
def test_damaged_caches_are_made_anew_to_the_same_result(
    working_folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path, whole = Path(name), Path(name).read_bytes()
    for place, bit in enumerate(bits_of(path, 6)):
        path.write_bytes(whole)
        flip_bit(path, bit)
        caplog.clear()
        assert cli.run(distill, [*TOY, "--out", f"again{place}", "--Iteration", "1", "--eval_it", "9"]) == 0, bit
        assert f"{name}: " in caplog.text, bit
        assert path.read_bytes() == whole
        assert torch.equal(images_of(f"again{place}"), images_of("again0"))


def records(folder: str = "run") -> list[dict[str, Any]]:
    return read_records(Path(folder) / "metrics.jsonl")


@pytest.mark.parametrize("length", [0, 6])
def test_a_damaged_line_does_not_keep_a_run_from_going_on(
    working_folder: Path, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    """Flip, with `length` 0, one bit in each line in turn; else cut there. The summary is that of an undamaged run."""
    shutil.copytree("run", "sound")
    assert cli.run(distill, ["--out", "sound", "--resume", "--Iteration", "6"]) == 0
    expected = read_record("sound/summary.json", "", "")["accuracy"]
    draw = random.Random(0)
    lines = Path("run/metrics.jsonl").read_bytes().splitlines(keepends=True)
    for number in [place for place, line in enumerate(lines) if b'"step"' not in line]:
        shutil.rmtree("again", ignore_errors=True)
        shutil.copytree("run", "again")
        damaged = bytearray(lines[number])
        if length:
            del damaged[length:]
        else:
            damaged[draw.randrange(len(damaged) - 1)] ^= 1 << draw.randrange(8)
        Path("again/metrics.jsonl").write_bytes(b"".join([*lines[:number], damaged, *lines[number + 1 :]]))
        caplog.clear()
        assert cli.run(distill, ["--out", "again", "--resume", "--Iteration", "6"]) == 0
        assert caplog.text.count("again/metrics.jsonl: ") == 1
        assert torch.equal(images_of("again"), images_of("sound"))
        assert read_record("again/summary.json", "", "")["accuracy"] == expected


def test_a_damaged_evaluation_that_no_checkpoint_holds_is_made_again(working_folder: Path) -> None:
    tensors, metadata = load_tensors("run/checkpoint.safetensors")
    kept = [line for line in json.loads(metadata["evaluations"]) if line["iteration"] < 4]
    save_tensors("run/checkpoint.safetensors", tensors, metadata | {"evaluations": json.dumps(kept)})
    before = [line for line in records() if line["kind"] == "evaluation"]
    path = Path("run/metrics.jsonl")
    path.write_text(
        "".join(line for line in path.read_text().splitlines(keepends=True) if '"iteration": 4' not in line)
    )
    Path("run/summary.json").unlink()
    assert len([line for line in records() if line["kind"] == "evaluation"]) == 2
    assert cli.run(distill, ["--out", "run", "--resume"]) == 0
    assert [line for line in records() if line["kind"] == "evaluation"] == before


# Files from before there were checksums.


def without_checksums(path: Path, **changes: str) -> None:
    """Write a file as it was before: format 1 or none, without checksums."""
    tensors = load_file(path)
    metadata = read_header(path)[1]
    save_file(tensors, path, {name: value for name, value in (metadata | changes).items() if value})


def test_old_files_are_read_and_said_to_be_unchecked(working_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in expert().parent.glob("*.safetensors"):
        without_checksums(path, format="mtt_fast expert 1")
    without_checksums(Path("run/synthetic.safetensors"), format="mtt_fast.data.synthetic.1")
    without_checksums(Path("run/checkpoint.safetensors"), format="", evaluations="")
    config = Path("run/config.toml")
    config.write_text("".join(line for line in config.read_text().splitlines(keepends=True) if line[0] != "#"))
    lines = [json.dumps(line) for line in records()]
    Path("run/metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = read_record("run/summary.json", "", "")
    Path("run/summary.json").write_text(json.dumps(summary))
    shutil.copytree("run", "sound")
    assert cli.run(evaluate, ["run", *EVALUATION]) == 0
    assert (
        caplog.text.count("run/synthetic.safetensors: written before files had checksums, so it is read unchecked") == 1
    )
    caplog.clear()
    assert cli.run(distill, RESUME) == 0
    assert caplog.text.count(f"{expert().parent}: written before files had checksums") == 1
    assert len(records()) > len(lines)


def test_an_old_file_is_written_anew(working_folder: Path) -> None:
    from mtt_fast.convert.command import main as convert

    before = TrajectoryStore(expert().parent)
    rows = [before.read(0, epoch) for epoch in range(4)]
    without_checksums(Path("run/synthetic.safetensors"), format="mtt_fast.data.synthetic.1")
    assert cli.run(convert, ["run/synthetic.safetensors", "new.safetensors"]) == 0
    assert read_header("new.safetensors")[0]["images"].checksums
    assert torch.equal(SyntheticDataset.load("new.safetensors").images, images_of("run"))
    without_checksums(expert().parent / "expert_0000.safetensors", format="mtt_fast expert 1")
    assert cli.run(convert, [str(expert().parent), "anew", "--to", "experts"]) == 0
    store = TrajectoryStore(expert("anew").parent)
    assert [store.indices, store.metadata(0)] == [before.indices, before.metadata(0)]
    assert all(torch.equal(store.read(0, epoch), row) for epoch, row in enumerate(rows))
    assert read_header(expert("anew"))[0]["parameters"].checksums
    assert cli.run(convert, [str(expert().parent), "anew", "--to", "experts"]) == 2


@pytest.mark.parametrize("name", ["run/synthetic.safetensors", "run/checkpoint.safetensors"])
def test_a_new_file_without_its_checksums_is_damaged(working_folder: Path, name: str) -> None:
    without_checksums(Path(name))
    with pytest.raises(InputError, match=f"{name}: damaged: its header"):
        load_tensors(name)


# Files that are none, and texts that are none.


def odd_files(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.parametrize(("name", "job", "arguments"), JOBS[::2] + JOBS[-1:], ids=lambda value: str(value)[:20])
def test_what_is_no_file_is_refused_at_once(
    working_folder: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
    job: Callable[..., Any],
    arguments: list[str],
) -> None:
    odd_files(Path(name), kind)
    assert cli.run(job, arguments) == 2
    assert f"{name}: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_an_expert_that_is_no_file_is_refused(
    working_folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    odd_files(expert(), kind)
    assert cli.run(distill, [*TOY, "--out", "new"]) == 2
    assert "expert_0001.safetensors: " in capsys.readouterr().err


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_are_no_records_are_refused(
    working_folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    for name, job, arguments in JOBS[3:]:
        path = Path(name)
        whole = path.read_bytes()
        path.write_bytes(TEXTS[text])
        assert cli.run(job, arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.match(rf"error: (/.*/)?{name}: ", error)
        path.write_bytes(whole)


def test_a_later_versions_files_are_told(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("run/synthetic.safetensors")
    tensors, metadata = load_tensors(path)
    record = json.loads(metadata["record"])
    records: list[Any] = [record | {"later": 1}, {name: value for name, value in record.items() if name != "mean"}, []]
    for changed in records:
        save_tensors(path, tensors, metadata | {"record": json.dumps(changed)})
        assert cli.run(evaluate, ["run", *EVALUATION]) == 2
        assert f"error: {path}: expected a distilled set with all its parts" in capsys.readouterr().err
    save_tensors(path, tensors, metadata | {"format": "mtt_fast.data.synthetic.3"})
    assert cli.run(evaluate, ["run", *EVALUATION]) == 2
    assert f"error: {path}: expected a distilled set" in capsys.readouterr().err
    path = Path("run/checkpoint.safetensors")
    tensors, metadata = load_tensors(path)
    numbers = json.loads(metadata["numbers"])
    del numbers["repeated"]  # which checkpoints of the first versions lack
    others: list[Any] = [{name: value for name, value in numbers.items() if name != left_out} for left_out in numbers]
    for changed in [numbers | {"later": 1}, *others, [1], None]:
        save_tensors(path, tensors, metadata | {"numbers": json.dumps(changed)})
        assert cli.run(distill, RESUME) == 2
        assert f"error: {path}: not a checkpoint of this version" in capsys.readouterr().err
    save_tensors(path, tensors, metadata | {"format": "mtt_fast checkpoint 3"})
    assert cli.run(distill, RESUME) == 2
    assert f"error: {path}: not a checkpoint of this version" in capsys.readouterr().err


def test_a_baselines_checkpoint_is_checked_too(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "dm --dataset digits --model ConvNetD1W4 --Iteration 1 --eval_it 1 --num_eval 1 --epoch_eval_train 1 --out dm".split()
    assert cli.run(baseline, flags) == 0
    path = Path("dm/checkpoint.safetensors")
    whole = path.read_bytes()
    for bit in bits_of(path, 10):
        path.write_bytes(whole)
        flip_bit(path, bit)
        assert cli.run(baseline, ["dm", "--out", "dm", "--resume", "--Iteration", "2"]) == 2
        assert f"error: {path}: " in capsys.readouterr().err
    path.write_bytes(whole)
    assert cli.run(baseline, ["dm", "--out", "dm", "--resume", "--Iteration", "2"]) == 0
