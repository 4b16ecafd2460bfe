"""Check that torch's settings in a program around the library or a command, as other code makes them, change no result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from mtt_fast import ConvNet, SyntheticDataset, TrajectoryStore, Whitening, plan
from mtt_fast.commands import cli
from mtt_fast.compress import compress
from mtt_fast.distill.command import main
from mtt_fast.interop import as_tensor_set, export_waypoints, import_experts, read_set, read_waypoints, write_set
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.trajectories import write_expert

NET = ConvNet(in_channels=3, num_classes=2, image_size=4, width=2, depth=1)
IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) // 3
TRAJECTORY = torch.randn(4, NET.num_parameters, generator=torch.Generator().manual_seed(1)).cumsum(0)
METADATA = ExpertMetadata({}, NET.layout.describe(), "digits", "f00d", "none", {"lr": 0.1}, 0, [0.0] * 4, {})
LR = torch.tensor(0.1)
WHITENING = Whitening.fit(IMAGES)


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "a default device without numbers": lambda: torch.device("meta"),
    "float64 by default": float64_by_default,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def experts(folder: Path) -> list[Tensor]:
    write_expert(folder / "whole", 0, TRAJECTORY, METADATA)
    few = compress(folder / "whole", folder / "few", 3)
    return [store.read(0, epoch) for store in (TrajectoryStore(folder / "whole"), few) for epoch in (0, 1.5, 3)]


def waypoints_of_others(folder: Path) -> list[Tensor]:
    write_expert(folder / "whole", 0, TRAJECTORY, METADATA)
    (file,) = export_waypoints(compress(folder / "whole", folder / "few", 3), folder / "foreign")
    read, unmeasured = (lambda: read_waypoints(file)), (lambda rows: [0.0] * len(rows))
    return [import_experts(read, folder / "imported", NET.layout, METADATA, unmeasured).read(0, 1.5)]


def sets(folder: Path) -> list[Tensor]:
    given = SyntheticDataset(IMAGES, LABELS, LR, ("a", "b"), (0.5,) * 3, (0.5,) * 3)
    tensors = []
    for kind in ("mtt", "ddranking", "dc", "synthetic", "png", "parquet"):
        write_set(folder / kind, given, kind, dataset="CIFAR10")
        read = read_set(folder / kind)
        back = as_tensor_set(read) if isinstance(read, SyntheticDataset) else read
        tensors += [back.images, back.labels, back.classes, *([] if back.lr is None else [back.lr])]
    return tensors


def whitening(_: Path) -> list[Tensor]:
    fitted = Whitening.fit(IMAGES)
    return [fitted.matrix, fitted.inverse, WHITENING.apply(IMAGES), WHITENING.invert(IMAGES)]


def planned_memory(_: Path) -> list[Tensor]:
    network = ConvNet(in_channels=3, num_classes=2, image_size=16, width=16, depth=2)  # its kernels take scratch memory
    return [torch.tensor(plan(network, images=(60, 3, 16, 16), steps=2, memory_budget=None).peak_bytes, device="cpu")]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "work",
    [experts, waypoints_of_others, sets, whitening, planned_memory],
    ids=lambda f: f.__name__,
)
def test_a_setting_of_torch_changes_no_result(
    work: Callable[[Path], list[Tensor]], setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # a default device does not reach what poisons new memory in other tests
    _device_constructors.cache_clear()
    expected = work(tmp_path / "without")
    with SETTINGS[setting]():
        found = work(tmp_path / "within")
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)


def test_a_command_in_a_process_with_other_settings_leaves_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a command as a notebook's %run does, after cells that have changed what torch computes with."""
    monkeypatch.undo()
    _device_constructors.cache_clear()
    monkeypatch.chdir(tmp_path)
    toy = (
        "--model ConvNetD1W4 --num_experts 1 --train_epochs 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 "
        "--Iteration 1 --num_eval 1 --epoch_eval_train 1"
    ).split()

    def images(name: str) -> Tensor:
        assert cli.run(main, [*toy, "--out", name, "--buffer_path", f"{name}-experts"]) == 0
        return SyntheticDataset.load(Path(name, "synthetic.safetensors")).images

    expected = images("without")
    with contextlib.ExitStack() as stack:
        for setting in (*SETTINGS.values(), torch.inference_mode):
            stack.enter_context(setting())
        found = images("within")
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device() == torch.device("meta")
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
    assert torch.equal(found, expected)
