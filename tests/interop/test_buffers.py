"""Test buffers of the public code: exact round trips, one expert in memory, and refusals of what is no trajectory."""

from __future__ import annotations

import ctypes
import itertools
import math
import multiprocessing
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtt_fast import ConvNet, InputError, TrajectoryStore
from mtt_fast.interop import buffer_files, export_experts, export_waypoints, import_experts, read_buffer, read_waypoints
from mtt_fast.interop.buffers import CONVEXIFIED
from mtt_fast.interop.experts import Trajectory, check_trajectory
from mtt_fast.interop.waypoints import WAYPOINTS
from mtt_fast.networks.layout import ParameterLayout
from mtt_fast.runtime.interrupts import Stopped
from mtt_fast.testing import reference_convnet
from tests.interop.buffers import EPOCHS, NET, Epochs, flat, imported, metadata, save_buffers, trained, unmeasured


def test_buffers_come_back_bit_for_bit(tmp_path: Path) -> None:
    experts = [trained(seed) for seed in range(5)]
    save_buffers(tmp_path / "theirs", experts, save_interval=2)
    store = imported(tmp_path / "theirs", tmp_path / "ours")
    assert len(store) == 5
    for index, expert in enumerate(experts):
        assert store.epochs(index) == EPOCHS
        for epoch, row in enumerate(flat(expert)):
            assert torch.equal(store.read(index, epoch).view(torch.int32), row.view(torch.int32))
        store.verify(index)

    files = list(export_experts(store, tmp_path / "back", experts_per_file=2))
    assert [file.name for file in files] == ["replay_buffer_0.pt", "replay_buffer_1.pt", "replay_buffer_2.pt"]
    for n, file in enumerate(files):
        buffer = torch.load(file, weights_only=True)
        assert len(buffer) == (1 if n == 2 else 2)  # what is left is not dropped
        for expert, back in zip(experts[2 * n :], buffer, strict=False):
            for before, after in zip(expert, back, strict=True):
                assert [p.shape for p in after] == [p.shape for p in before]
                assert all(map(torch.equal, after, before))
        assert file.stat().st_size < 2 * (tmp_path / "theirs" / file.name).stat().st_size


@pytest.mark.parametrize("export", [export_experts, export_waypoints])
def test_a_store_without_experts_and_files_of_none_are_refused(tmp_path: Path, export: Any) -> None:
    (tmp_path / "empty").mkdir()
    for count, message in (
        (10, r"empty: expected experts \(expert_0000"),
        (0, "`experts_per_file`: expected at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            list(export(TrajectoryStore(tmp_path / "empty"), tmp_path / "out", count))
    assert not (tmp_path / "out").exists()


def test_the_network_has_the_same_outputs(tmp_path: Path) -> None:
    expert = trained(0)
    save_buffers(tmp_path, [expert], 10)
    store = imported(tmp_path, tmp_path / "ours")
    module, images = reference_convnet(1, 3, 6, 4, 1), torch.randn(2, 1, 6, 6)
    for parameter, value in zip(module.parameters(), expert[-1], strict=True):
        parameter.data = value
    torch.testing.assert_close(NET(store.read(0, EPOCHS), images), module(images))


def test_an_imported_expert_records_its_origin(tmp_path: Path) -> None:
    save_buffers(tmp_path, [trained(0), trained(1, epochs=4)], 1)
    store = imported(tmp_path, tmp_path / "ours", whitening="zca")
    second = store.metadata(1)
    assert (second.fingerprint, second.whitening, second.layout) == ("f00d", "zca", NET.layout.describe())
    assert second.hyperparameters == {"imported_from": "replay_buffer_1.pt, expert 0", "train_epochs": 4}
    assert math.isnan(second.accuracy[0])
    assert second.accuracy[-1] == 0.5


def test_a_stopped_import_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    save_buffers(tmp_path / "theirs", [trained(seed) for seed in range(3)], 10)
    imported(tmp_path / "theirs", tmp_path / "ours")
    kept = tmp_path / "ours" / "expert_0000.safetensors"
    before = kept.stat().st_mtime_ns
    (tmp_path / "ours" / "expert_0001.safetensors").unlink()
    assert len(imported(tmp_path / "theirs", tmp_path / "ours")) == 3
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"expert_0000\.safetensors: made from other images: .* with fingerprint beef"):
        imported(tmp_path / "theirs", tmp_path / "ours", fingerprint="beef")
    with pytest.raises(InputError, match=r"expert_0000\.safetensors: whitened in another way"):
        imported(tmp_path / "theirs", tmp_path / "ours", whitening="zca")
    with pytest.raises(InputError, match=r"expert_0000\.safetensors: holds another expert"):
        imported(tmp_path / "theirs", tmp_path / "ours", network={"kind": "AlexNet"})
    (tmp_path / "ours" / "expert_0002.safetensors").rename(tmp_path / "ours" / "expert_0003.safetensors")
    with pytest.raises(
        InputError, match=r"expert_0003\.safetensors: expected only the experts to import, found another"
    ):
        imported(tmp_path / "theirs", tmp_path / "ours")
    others = tmp_path / "others"  # with files of the same name
    save_buffers(others, [trained(0), trained(7)], 10)
    with pytest.raises(
        InputError, match=r"expert_0001\.safetensors: holds another expert than replay_buffer_0\.pt, expert 1"
    ):
        imported(others, tmp_path / "ours")
    save_buffers(others, [trained(0, EPOCHS + 1)], 10)
    with pytest.raises(InputError, match=r"expert_0000\.safetensors: holds another expert"):
        imported(others, tmp_path / "ours")


def test_an_import_that_was_stopped_between_two_experts_goes_on(tmp_path: Path) -> None:
    """Check too that the folder is not taken for a whole one until then."""
    save_buffers(tmp_path / "theirs", [trained(seed) for seed in range(3)], 10)

    def stop(expert: Trajectory) -> None:
        raise Stopped("stopped", 2)

    with pytest.raises(Stopped):
        imported(tmp_path / "theirs", tmp_path / "ours", each=stop)
    assert [path.name for path in (tmp_path / "ours").glob("expert_*")] == ["expert_0000.safetensors"]
    with pytest.raises(InputError, match="found an unfinished one"):
        TrajectoryStore(tmp_path / "ours")
    assert len(imported(tmp_path / "theirs", tmp_path / "ours")) == 3


def test_a_buffer_made_on_a_cpu_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_buffers(tmp_path / "theirs", [trained(0), trained(1, on_a_gpu=False)], 10)
    with pytest.raises(
        InputError, match=r"expert 1: the parameters are the same in every epoch: .*made on a CPU.*clone"
    ):
        imported(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()  # the first is good, but all are checked before


def test_parameters_may_stand_still_for_an_epoch(tmp_path: Path) -> None:
    first, *others = trained(0)
    save_buffers(tmp_path / "theirs", [[first, [tensor.clone() for tensor in first], *others]], 10)
    store = imported(tmp_path / "theirs", tmp_path / "ours")
    assert torch.equal(store.read(0, 1), store.read(0, 0))
    assert store.epochs(0) == EPOCHS + 1


def test_a_small_buffer_that_names_its_tensors_often_is_refused(tmp_path: Path) -> None:
    net = ConvNet(in_channels=1, num_classes=3, image_size=6, width=64, depth=1)
    first, second = (net.layout.split(torch.randn(net.layout.num_parameters)) for _ in range(2))
    torch.save([[first, *(list(second) for _ in range(50))]], tmp_path / "replay_buffer_0.pt")
    (expert,) = read_buffer(tmp_path / "replay_buffer_0.pt")
    with pytest.raises(InputError, match="the parameters are the same in every epoch"):
        check_trajectory(expert, net.layout)


def test_buffers_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for n in (10, 9, 0):
        (tmp_path / f"replay_buffer_{n}.pt").touch()
        (tmp_path / f"convexified_v2_replay_buffer_{n}.pt").touch()
    assert [file.name for file in buffer_files(tmp_path)] == [f"replay_buffer_{n}.pt" for n in (0, 9, 10)]
    assert len(buffer_files(tmp_path, CONVEXIFIED)) == 3
    assert buffer_files(tmp_path / "replay_buffer_9.pt") == [tmp_path / "replay_buffer_9.pt"]
    (tmp_path / "convexified_replay_buffer_0.pt").touch()
    with pytest.raises(InputError, match=r"of one kind, found convexified_replay_buffer_N\.pt, convexified_v2"):
        buffer_files(tmp_path, CONVEXIFIED)
    with pytest.raises(InputError, match="of one kind, found none"):
        buffer_files(tmp_path, "x(.)")


def spoiled(what: str) -> Any:
    expert = trained(0)
    match what:
        case "another network":
            return [[list(reference_convnet(1, 3, 6, 8, 1).parameters()) for _ in range(3)]]
        case "too few tensors":
            return [[epoch[:-1] for epoch in expert]]
        case "one epoch odd":
            return [[*expert[:-1], [*expert[-1][:-1], torch.zeros(4)]]]
        case "one epoch":
            return [expert[:1]]
        case "no epochs":
            return [expert[0]]
        case "no experts":
            return []
        case "flat":
            return flat(expert)
        case "nan":
            expert[1][0][0, 0, 0, 0] = float("nan")
            return [expert]
    raise AssertionError(what)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another network", r"row 0: the parameters are of another network: expected features\.0\.weight of shape \(4, 1, 3, 3\), found \(8, 1, 3, 3\); .*`model`"),
        ("too few tensors", "of another network: expected 6 tensors, found 5"),
        ("one epoch odd", r"row 3: .*expected classifier\.bias of shape \(3,\), found \(4,\)"),
        ("one epoch", "expert 0: expected a list of two or more epochs, each a list of tensors, found a list of 1"),
        ("no epochs", "expert 0: expected a list of two or more epochs"),
        ("no experts", "expected a list of experts, found a list of 0"),
        ("flat", "expected a list of experts, found Tensor"),
        ("nan", "the parameters after epoch 1 are not finite"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_buffer_is_refused(tmp_path: Path, what: str, message: str) -> None:
    torch.save(spoiled(what), tmp_path / "replay_buffer_0.pt")
    with pytest.raises(InputError, match=message):
        imported(tmp_path, tmp_path / "ours")
    assert not list(tmp_path.glob("ours/*"))


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_broken_and_hostile_buffers_are_refused(tmp_path: Path) -> None:
    torch.save([trained(0), Hostile(tmp_path / "touched")], tmp_path / "replay_buffer_0.pt")
    with pytest.raises(InputError, match="broken or foreign"):
        imported(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "touched").exists()
    save_buffers(tmp_path, [trained(0)], 10)
    whole = (tmp_path / "replay_buffer_0.pt").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "replay_buffer_0.pt").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"replay_buffer_0\.pt: expected tensors saved by torch\.save"):
            imported(tmp_path, tmp_path / "ours")
    with pytest.raises(InputError, match=r"replay_buffer_7\.pt: cannot be read"):
        imported(tmp_path / "replay_buffer_7.pt", tmp_path / "ours")


def test_the_format_of_old_torch_is_read(tmp_path: Path) -> None:
    expert = trained(0)
    torch.save([expert], tmp_path / "replay_buffer_0.pt", _use_new_zipfile_serialization=False)
    store = imported(tmp_path, tmp_path / "ours")
    assert torch.equal(store.read(0, EPOCHS), flat(expert)[EPOCHS])


def test_as_many_tensors_are_read_as_a_hundred_experts_have(tmp_path: Path) -> None:
    """Check files whose list of tensors takes more than a mebibyte: of fewer tensors, with long descriptions."""
    tensors = [tensor.as_strided((1,) * 48, (1 << 60,) * 48) for tensor in torch.zeros(2000).unbind()]
    torch.save([[tensors[:1000], tensors[1000:]]], tmp_path / "replay_buffer_0.pt")
    (expert,) = read_buffer(tmp_path / "replay_buffer_0.pt")
    assert [len(point) for point in expert.points] == [1000, 1000]
    (tmp_path / "replay_buffer_0.pt").rename(tmp_path / "waypoint_buffer_0.pt")
    torch.save([[[0.0] * 1000, [1.0] * 1000]], tmp_path / "step_buffer_0.pt")
    (expert,) = read_waypoints(tmp_path / "waypoint_buffer_0.pt")
    assert [len(point) for point in expert.points] == [1000, 1000]


def test_existing_files_are_not_written_over(tmp_path: Path) -> None:
    save_buffers(tmp_path, [trained(0)], 10)
    store = imported(tmp_path, tmp_path / "ours")
    with pytest.raises(InputError, match=r"replay_buffer_0\.pt: exists already"):
        list(export_experts(store, tmp_path))


def anonymous_memory() -> int:
    """Return the bytes of memory that the system cannot take back, unlike that of mapped files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_of(work: Callable[[], object]) -> int:
    """Return by how much anonymous memory grew, at most, while `work` ran."""
    ctypes.CDLL(None).malloc_trim(0)  # else it would first use what has been freed
    before = peak = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak - before


def import_and_export(folder: Path) -> tuple[int, int, int]:
    """Return the bytes of an expert, and by how much memory grew to import eight of them, and to export four to a file."""
    experts, rows, size = 8, 8, 1 << 18  # 8 MiB an expert, 64 MiB a file
    each = rows * size * 4
    layout = ParameterLayout(("weight",), ((size,),))
    buffer = [[[torch.full((size,), float(expert + row))] for row in range(rows)] for expert in range(experts)]
    file = folder / "replay_buffer_0.pt"
    torch.save(buffer, file)
    del buffer
    common = metadata(layout=layout.describe())
    there = peak_of(lambda: import_experts(lambda: read_buffer(file), folder / "ours", layout, common, unmeasured))
    store = TrajectoryStore(folder / "ours")
    back = peak_of(lambda: list(export_experts(store, folder / "back", experts_per_file=4)))
    assert torch.equal(store.read(7, 3), torch.full((size,), 10.0))
    return each, there, back


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status and glibc to watch the memory")
def test_one_expert_is_in_memory(tmp_path: Path) -> None:
    """Measure in a process of its own: what earlier tests have left in one may be freed, or used again, on the way."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        each, there, back = pool.submit(import_and_export, tmp_path).result()
    assert each / 2 < there < 3 * each, "more than an expert was in memory"
    assert 3 * each < back < 5.5 * each, "more than a file of four experts was in memory"


def test_layouts_survive_their_text() -> None:
    layout = ParameterLayout(("a.weight", "a.bias", "scale"), ((2, 3, 1), (4,), ()))
    assert ParameterLayout.from_text(layout.describe()) == layout


def mct_steps(trajectory: Epochs) -> list[list[Tensor]]:
    """Return the shares of the way as MCT's get_step_and_waypoint defines them: the path's length so far, tensor by tensor."""
    lengths = [
        [torch.norm(after - before, p=2) for before, after in zip(one, other, strict=True)]
        for one, other in itertools.pairwise(trajectory)
    ]
    steps = []
    for point in range(len(trajectory)):
        row = []
        for tensor in range(len(trajectory[0])):
            whole = torch.sum(torch.stack([length[tensor] for length in lengths]))
            so_far = torch.sum(torch.stack([length[tensor] for length in lengths[:point]] + [torch.tensor(0.0)]))
            row.append(so_far / (whole if whole != 0 else 1.0))
        steps.append(row)
    return steps


def mct_point(waypoints: Epochs, pieces: list[list[list[Tensor]]], epoch: float) -> Tensor:
    """Return MCT's get_point_n: shares between those of the epochs around, then the point between the waypoints."""
    for start, end, piece in zip(waypoints[:-1], waypoints[1:], pieces, strict=True):
        if epoch < len(piece) - 1:
            low = int(epoch)
            shares = [torch.lerp(a, b, epoch - low) for a, b in zip(piece[low], piece[low + 1], strict=True)]
            point = [torch.lerp(a, b, share) for a, b, share in zip(start, end, shares, strict=True)]
            return nn.utils.parameters_to_vector(point)
        epoch -= len(piece) - 1
    return nn.utils.parameters_to_vector(waypoints[-1])


@pytest.mark.parametrize(
    ("ends", "name"),
    [((0, 6), "buffer"), ((0, 2, 4, 6), "buffer_ip4"), ((0, 1, 6), "buffer_ip3"), ((0, 6), "buffer_proj")],
)
def test_waypoints_of_mct_are_read_and_written(tmp_path: Path, ends: tuple[int, ...], name: str) -> None:
    experts = [trained(seed, epochs=6) for seed in range(3)]
    waypoints = [[expert[end] for end in ends] for expert in experts]
    pieces = [[mct_steps(expert[begin : end + 1]) for begin, end in itertools.pairwise(ends)] for expert in experts]
    torch.save(waypoints, tmp_path / f"waypoint_{name}_0.pt")
    torch.save(pieces if len(ends) > 2 else [one for (one,) in pieces], tmp_path / f"step_{name}_0.pt")
    (file,) = buffer_files(tmp_path, WAYPOINTS)
    store = import_experts(lambda: read_waypoints(file), tmp_path / "ours", NET.layout, metadata(), unmeasured)
    for expert in range(3):
        assert store.epochs(expert) == 6
        course = store.course(expert)
        assert course is not None
        assert course.smooth == (len(ends) > 2)  # MCT leaves two waypoints as they are
        for epoch in (0, 0.5, 1, 2, 2.25, 3, 4, 5.75, 6):
            expected = mct_point(waypoints[expert], pieces[expert], epoch)
            torch.testing.assert_close(store.read(expert, epoch), expected, rtol=1e-5, atol=1e-6)
        accuracy = store.metadata(expert).accuracy
        assert len(accuracy) == 7
        assert accuracy[-1] == 0.5

    written = list(export_waypoints(store, tmp_path / "back", experts_per_file=2))
    kind = "buffer" if len(ends) == 2 else f"buffer_ip{len(ends)}"
    assert [path.name for path in written] == [f"waypoint_{kind}_0.pt", f"waypoint_{kind}_1.pt"]
    for n in range(2):
        back = torch.load(tmp_path / "back" / f"waypoint_{kind}_{n}.pt", weights_only=True)
        steps = torch.load(tmp_path / "back" / f"step_{kind}_{n}.pt", weights_only=True)
        for place, expert in enumerate(range(2 * n, min(2 * n + 2, 3))):
            for before, after in zip(waypoints[expert], back[place], strict=True):
                assert all(map(torch.equal, before, after))
            own = steps[place] if len(ends) > 2 else [steps[place]]
            for piece, again in zip(pieces[expert], own, strict=True):
                assert torch.equal(torch.tensor(piece)[:-1], torch.tensor(again)[:-1])
                assert torch.tensor(again[-1]).eq(1).all()  # also of a bias before a norm, which stands still
    with pytest.raises(InputError, match="exists already"):
        list(export_waypoints(store, tmp_path / "back"))


def test_each_expert_is_written_at_its_own_waypoints(tmp_path: Path) -> None:
    experts, ends = [trained(seed, epochs=6) for seed in range(2)], [(0, 2, 6), (0, 5, 6)]
    file = tmp_path / "waypoint_buffer_ip3_0.pt"
    waypoints = [[expert[end] for end in own] for expert, own in zip(experts, ends, strict=True)]
    torch.save(waypoints, file)
    pieces = [
        [mct_steps(expert[begin : end + 1]) for begin, end in itertools.pairwise(own)]
        for expert, own in zip(experts, ends, strict=True)
    ]
    torch.save(pieces, tmp_path / "step_buffer_ip3_0.pt")
    assert [expert.place for expert in read_waypoints(file)] == [0, 1]
    store = import_experts(lambda: read_waypoints(file), tmp_path / "ours", NET.layout, metadata(), unmeasured)
    (written,) = export_waypoints(store, tmp_path / "back")
    for before, after in zip(waypoints, torch.load(written, weights_only=True), strict=True):
        assert all(torch.equal(*map(nn.utils.parameters_to_vector, pair)) for pair in zip(before, after, strict=True))
    lengths = [[len(piece) for piece in own] for own in torch.load(written.with_name("step_buffer_ip3_0.pt"))]
    assert lengths == [[3, 5], [6, 2]]


def test_experts_of_different_numbers_of_waypoints_are_not_written_together(tmp_path: Path) -> None:
    experts: list[Trajectory] = []
    for index, ends in enumerate([(0, 2, 6), (0, 1, 5, 6)]):
        trajectory = trained(index, epochs=6)
        pieces = [mct_steps(trajectory[begin : end + 1]) for begin, end in itertools.pairwise(ends)]
        file = tmp_path / f"waypoint_buffer_ip{len(ends)}_0.pt"
        torch.save([[trajectory[end] for end in ends]], file)
        torch.save([pieces], tmp_path / f"step_buffer_ip{len(ends)}_0.pt")
        experts += read_waypoints(file)
    store = import_experts(lambda: iter(experts), tmp_path / "ours", NET.layout, metadata(), unmeasured)
    with pytest.raises(InputError, match="ours: expected 3 waypoints of every expert, found others; export them apart"):
        list(export_waypoints(store, tmp_path / "back"))


def test_a_tensor_that_stands_still_keeps_its_value(tmp_path: Path) -> None:
    trajectory = trained(0, epochs=4)
    for epoch in trajectory:
        epoch[1] = trajectory[0][1]
    torch.save([[trajectory[0], trajectory[-1]]], tmp_path / "waypoint_buffer_0.pt")
    torch.save([mct_steps(trajectory)], tmp_path / "step_buffer_0.pt")
    file = tmp_path / "waypoint_buffer_0.pt"
    store = import_experts(lambda: read_waypoints(file), tmp_path / "ours", NET.layout, metadata(), unmeasured)
    for at in (0, 1.5, 3, 3.9, 4):
        assert torch.equal(NET.layout.split(store.read(0, at))[1], trajectory[0][1])


def test_waypoints_that_do_not_fit_their_steps_are_refused(tmp_path: Path) -> None:
    trajectory, file = trained(0, epochs=4), tmp_path / "waypoint_buffer_ip3_0.pt"
    piece = mct_steps(trajectory[:3])
    torch.save([[trajectory[0], trajectory[2], trajectory[4]]], file)
    for steps, message in (
        ([[piece]], "expert 0: expected waypoints and the steps between them, .*3 waypoints and 1 pieces"),
        ([[[row[:-1] for row in piece], piece]], "expert 0: expected waypoints and the steps between them"),
        ([[0.5]], "expert 0: expected waypoints and the steps between them"),
        ([], r"expected a list of experts, and step_buffer_ip3_0\.pt of as many"),
    ):
        torch.save(steps, tmp_path / "step_buffer_ip3_0.pt")
        with pytest.raises(InputError, match=message):
            list(read_waypoints(file))


def test_whole_experts_are_not_written_as_waypoints(tmp_path: Path) -> None:
    save_buffers(tmp_path, [trained(0)], 10)
    with pytest.raises(InputError, match=r"expected compressed experts, found whole ones.*mtt_fast\.compress"):
        list(export_waypoints(imported(tmp_path, tmp_path / "ours"), tmp_path / "back"))
