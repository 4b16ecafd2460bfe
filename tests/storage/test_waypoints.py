"""Test compressed experts: places on the path by the definition, bytes read, folders made, mistakes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mtt_fast import InputError, TrajectoryStore
from mtt_fast.commands import cli
from mtt_fast.compress import compress, main
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.tensor_files import load_tensors, save_tensors
from mtt_fast.storage.trajectories import expert_path, write_expert
from mtt_fast.storage.waypoints import Course, convexified, evenly_spaced

SIZES = (6, 3, 20)
LAYOUT = "conv.weight:2x3;conv.bias:3;classifier.weight:4x5"
EPOCHS = 10


def trajectory(epochs: int = EPOCHS, seed: int = 0) -> Tensor:
    """Return a random walk (epochs + 1, 29) whose second layer stands still."""
    steps = torch.randn(epochs + 1, sum(SIZES), generator=torch.Generator().manual_seed(seed))
    steps[1:, 6:9] = 0
    return steps.cumsum(0)


def metadata(epochs: int = EPOCHS, seed: int = 0) -> ExpertMetadata:
    return ExpertMetadata({}, LAYOUT, "digits", "f00d", "none", {"lr": 0.01}, seed, [0.1] * (epochs + 1), {})


def experts(folder: Path, count: int = 3, dtype: torch.dtype = torch.float32) -> Path:
    for index in range(count):
        write_expert(folder, index, trajectory(seed=index), metadata(seed=index), dtype)
    return folder


def by_definition(path: Tensor, waypoints: Tensor, at: tuple[int, ...], epoch: float) -> Tensor:
    """Return θ(e) layer by layer, from sums over the epochs walked: MCT's equations, written out."""
    k = max(k for k, e in enumerate(at[:-1]) if e <= epoch)
    layers = []
    for theta, low, high in zip(path.split(SIZES, 1), *(waypoints[i].split(SIZES) for i in (k, k + 1)), strict=True):
        stride = [0.0] + [float((theta[i] - theta[i - 1]).double().norm()) for i in range(1, len(theta))]

        def walked(e: int, stride: list[float] = stride) -> float:
            return sum(stride[at[k] + 1 : e + 1]) / (sum(stride[at[k] + 1 : at[k + 1] + 1]) or math.inf)

        e = min(math.floor(epoch), at[k + 1] - 1)
        w = (1 - (epoch - e)) * walked(e) + (epoch - e) * walked(e + 1)
        layers.append((1 - w) * low + w * high)
    return torch.cat(layers)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("at", [(0, 10), (0, 4, 7, 10), (0, 1, 2, 10), tuple(range(11))])
def test_every_epoch_is_where_the_definition_says(tmp_path: Path, at: tuple[int, ...], smooth: bool) -> None:
    path = trajectory()
    store = compress(experts(tmp_path, 1), tmp_path / "few", len(at), at, smooth=smooth)
    waypoints = path[list(at)].clone()
    if smooth and len(at) > 2:
        waypoints[1:-1] = torch.stack([(path[e - 1] + path[e + 1]) / 2 for e in at[1:-1]])
        waypoints[-1] = (path[-2] + path[-1]) / 2
    assert torch.equal(load_tensors(expert_path(store.folder, 0))[0]["parameters"], waypoints)
    for epoch in [*range(EPOCHS + 1), 0.25, 3.999, 4.001, 6.5, 9.9]:
        expected = by_definition(path, waypoints, at, epoch)
        torch.testing.assert_close(store.read(0, epoch), expected, rtol=1e-5, atol=1e-5)
    for number in (torch.tensor(6.5, requires_grad=True), torch.tensor([6.5]), np.float32(6.5), Fraction(13, 2)):
        assert torch.equal(store.read(0, number), store.read(0, 6.5))  # type: ignore[arg-type]
    for waypoint, epoch in zip(waypoints, at, strict=True):
        assert torch.equal(store.read(0, epoch), waypoint)
    assert store.epochs(0) == EPOCHS
    store.verify(0)


def test_whole_experts_go_straight_from_epoch_to_epoch(tmp_path: Path) -> None:
    path, store = trajectory(), TrajectoryStore(experts(tmp_path, 1))
    torch.testing.assert_close(store.read(0, 3.25), 0.75 * path[3] + 0.25 * path[4])
    assert torch.equal(store.read(0, 3.0), path[3])
    assert store.course(0) is None
    with pytest.raises(IndexError, match=r"expected an epoch from 0 to 10, found 10\.5"):
        store.read(0, 10.5)


def test_waypoints_are_spaced_as_in_the_public_code() -> None:
    assert evenly_spaced(50, 4) == (0, 17, 34, 50)
    assert evenly_spaced(50, 3) == (0, 25, 50)
    assert evenly_spaced(50, 2) == (0, 50)
    assert evenly_spaced(7, 8) == tuple(range(8))
    for count in (1, 9):
        with pytest.raises(InputError, match=f"`num_interpolation` {count}: expected from 2"):
            evenly_spaced(7, count)


@pytest.mark.parametrize("at", [(0,), (0, 5), (1, 10), (0, 5, 5, 10), (0, 7, 5, 10), (0, 11)])
def test_epochs_must_rise_from_the_first_to_the_last(at: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected rising epochs from 0 to the expert's last, 10"):
        convexified(trajectory(), SIZES, at)


def test_the_course_survives_its_text() -> None:
    course = convexified(trajectory(), SIZES, (0, 4, 10), smooth=False)[1]
    again = Course.from_text(course.to_text())
    assert torch.equal(again.positions, course.positions)
    assert (again.epochs, again.sizes, again.smooth) == (course.epochs, course.sizes, False)


def test_a_layer_that_stands_still_moves_with_the_epochs() -> None:
    still = convexified(trajectory(), SIZES, (0, 4, 10))[1].positions[:, 1]
    expected = [epoch / 4 if epoch <= 4 else 1 + (epoch - 4) / 6 for epoch in range(EPOCHS + 1)]
    torch.testing.assert_close(still, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("epochs", "positions", "fits"),
    [
        ((0, 1, 3), [0, 1, 1.5, 2], True),
        ((0, 1, 3), [0, 1, 1 - 1e-6, 2], True),  # as float32 rounds it
        ((0, 1, 3), [0, 1, 0.999, 2], False),
        ((0, 1, 3), [-0.5, 1, 1.5, 2], False),
        ((0, 1, 3), [0, 1, math.nan, 2], False),
        ((0, 1, 3), [0, 1, 2], False),
        ((0, 1, 1, 3), [0, 1, 1.5, 2], False),
        ((1, 3), [0, 1, 1.5, 2], False),
        ((0,), [0], False),
    ],
)
def test_a_course_goes_from_waypoint_to_waypoint(epochs: tuple[int, ...], positions: list[float], fits: bool) -> None:
    course = Course(epochs, (5,), torch.tensor(positions, dtype=torch.float64)[:, None], smooth=False)
    if fits:
        return course.check()
    with pytest.raises(ValueError, match="its positions"):
        course.check()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc/self/io to count the bytes read")
def test_a_read_touches_two_rows_alone(tmp_path: Path) -> None:
    size = 1 << 18  # 1 MiB a row
    of_one_layer = replace(metadata(), layout=f"weight:{size}")
    write_expert(tmp_path, 0, torch.randn(EPOCHS + 1, size), of_one_layer)
    store = compress(tmp_path, tmp_path / "few", 4)
    store.epochs(0)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    for epoch, rows in ((5.5, 2), (7, 1)):
        before = bytes_read()
        store.read(0, epoch)
        assert rows << 20 <= bytes_read() - before < (rows << 20) + (1 << 14)


def run(*arguments: str | Path) -> int:
    return cli.run(main, [str(word) for word in arguments])


def test_the_command_keeps_all_that_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = experts(tmp_path / "ConvNet", dtype=torch.bfloat16)
    assert run(folder, "--num_interpolation", "3") == 0
    store, whole = TrajectoryStore(folder / "waypoints_3"), TrajectoryStore(folder)
    assert store.indices == whole.indices == (0, 1, 2)
    for expert in range(3):
        assert store.metadata(expert) == replace(whole.metadata(expert), made_of=whole.digest(expert))
        assert store.dtype(expert) == torch.bfloat16
        course = store.course(expert)
        assert course is not None
        assert course.epochs == (0, 5, 10)
    told = re.search(r"3 experts of .* as waypoints in .*, ([\d.]+) times smaller", caplog.text)
    assert told is not None
    sizes = [sum(path.stat().st_size for path in each.glob("*.safetensors")) for each in (folder, store.folder)]
    assert float(told[1]) == round(sizes[0] / sizes[1], 1)


def test_those_that_are_missing_are_made_again(tmp_path: Path) -> None:
    folder, few = experts(tmp_path), tmp_path / "few"
    assert run(folder, "--epochs", "0", "6", "10", "--out", few) == 0
    kept, made = expert_path(few, 0).stat().st_mtime_ns, TrajectoryStore(few).read(1, 4.5)
    expert_path(few, 1).unlink()
    assert run(folder, "--epochs", "0", "6", "10", "--out", few) == 0
    assert expert_path(few, 0).stat().st_mtime_ns == kept
    assert torch.equal(TrajectoryStore(few).read(1, 4.5), made)


def test_compressed_experts_keep_their_numbers(tmp_path: Path) -> None:
    folder = experts(tmp_path)
    expert_path(folder, 1).unlink()
    store = compress(folder, tmp_path / "few", 3)
    assert store.indices == (0, 2)
    assert store.metadata(1).seed == 2


def test_experts_of_two_data_sets_are_not_compressed(tmp_path: Path) -> None:
    folder = experts(tmp_path, 2)
    write_expert(folder, 2, trajectory(), replace(metadata(), dataset="pets", fingerprint="beef"))
    with pytest.raises(InputError, match=r"expert_0002\.safetensors: .*pets"):
        compress(folder, tmp_path / "few", 3)
    assert not (tmp_path / "few").exists()


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = experts(tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    assert run(folder, "--num_interpolation", "3") == 0
    few = folder / "waypoints_3"
    before = [path.read_bytes() for path in sorted(few.iterdir())]
    for words, problem in (
        ([], "expected a folder of experts, such as"),
        ([tmp_path / "nowhere"], "nowhere: expected a folder of experts"),
        ([tmp_path / "empty"], "empty: expected experts, found none"),
        ([few], "expert 0 is compressed already"),
        ([folder, "--num_interpolation", "12"], "--num_interpolation 12: expected from 2 waypoints"),
        ([folder, "--epochs", "0", "9"], "--epochs 0 9: expected rising epochs from 0 to the expert's last, 10"),
        ([folder, "--epochs", "0", "5", "9"], "--epochs 0 5 9: expected rising epochs from 0 to the expert's last, 10"),
        (
            [folder, "--epochs", "0", "4", "10"],
            "expected waypoints at (0, 4, 10), smooth True, found waypoints at (0, 5",
        ),
        ([folder, "--num_interpolation", "3", "--smooth", "False"], "smooth False, found waypoints at"),
        (
            [folder, "--epochs", "0", "10", "--smooth", "False"],
            "--smooth: has no effect with two waypoints, which stay as they are; leave it out",
        ),
        ([folder, "--out", folder], "found a whole expert; choose another --out\n"),
    ):
        assert run(*words) == 2
        assert problem in capsys.readouterr().err
    write_expert(folder, 1, trajectory(seed=9), metadata(seed=9))
    assert run(folder, "--num_interpolation", "3") == 2
    assert "expert_0001.safetensors: made from another expert than" in capsys.readouterr().err
    assert [path.read_bytes() for path in sorted(few.iterdir())] == before
    assert not (folder / "waypoints_12").exists()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda record: record.pop("epochs"), "the course between its waypoints is broken"),
        (lambda record: record["positions"].pop(), "the course between its waypoints is broken"),
        (
            lambda record: record["positions"].__setitem__(1, [0.999] * len(SIZES)),
            "the course between its waypoints is broken",
        ),
        (lambda record: record["epochs"].pop(1), "its waypoints do not fit the course between them"),
        (lambda record: record["sizes"].__setitem__(0, 7), "its waypoints do not fit the course between them"),
    ],
)
def test_a_spoilt_course_is_named(tmp_path: Path, spoil, problem: str) -> None:  # type: ignore[no-untyped-def]
    store = compress(experts(tmp_path, 1), tmp_path / "few", 3)
    path = expert_path(store.folder, 0)
    tensors, text = load_tensors(path)
    record = json.loads(text["course"])
    spoil(record)
    save_tensors(path, tensors, text | {"course": json.dumps(record)}, by_row=list(tensors))
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: {problem}.*mtt_fast\.compress"):
        TrajectoryStore(store.folder).read(0, 0)


def test_waypoints_that_do_not_fit_the_course_are_not_written(tmp_path: Path) -> None:
    points, course = convexified(trajectory(), SIZES, (0, 4, 10))
    with pytest.raises(InputError, match=r"the course is between 3 waypoints of 29 parameters, found \(2, 29\)"):
        write_expert(tmp_path, 0, points[:2], metadata(), course=course)
    assert not list(tmp_path.iterdir())


def test_verify_looks_at_the_course_too(tmp_path: Path) -> None:
    store = compress(experts(tmp_path, 1), tmp_path / "few", 3)
    path = expert_path(store.folder, 0)
    content = path.read_bytes()
    at = content.index(b"positions") + 40
    digit = next(place for place in range(at, at + 20) if chr(content[place]) in "123456789")
    path.write_bytes(content[:digit] + (b"1" if content[digit : digit + 1] != b"1" else b"2") + content[digit + 1 :])
    with pytest.raises(InputError, match="damaged"):
        TrajectoryStore(store.folder).verify(0)
