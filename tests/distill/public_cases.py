"""Read the cases that public code computed, and what it drew in one iteration."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mtt_fast import TrajectoryStore
from mtt_fast.augmentation.operations import Draws, parameters_of_steps
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.distill.segments import Segment
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.trajectories import write_expert

CASES = Path(__file__).parent / "public_code"
IPC = 4
LAYOUT = "features.0.weight:4x3x3x3;features.0.bias:4;features.1.weight:4;features.1.bias:4;classifier.weight:3x64;classifier.bias:3"


def experts(case: dict[str, Tensor], folder: Path) -> TrajectoryStore:
    """Return a store of the case's expert."""
    rows = case["expert"]
    write_expert(folder, 0, rows, ExpertMetadata({}, LAYOUT, "toy", "f00d", "none", {}, 0, [0.5] * len(rows), {}))
    return TrajectoryStore(folder)


def segment(case: dict[str, Tensor], number: int, store: TrajectoryStore) -> Segment:
    """Return what the code drew for iteration `number`: the epoch, the images of each step, and their augmentation."""
    epoch = case[f"epoch_{number}"].item()
    lengths, operations = (case[f"{name}_{number}"].tolist() for name in ("lengths", "operations"))
    draws = []
    for operation, numbers in zip(operations, case[f"numbers_{number}"].split(lengths), strict=True):
        used = numbers[:, ~numbers.isnan().any(0)]  # an operation has one to three numbers for each image
        draws.append(Draws(SiameseAugment().operations[operation], tuple(used.unbind(1))))
    parameters = parameters_of_steps(draws, case["images"].shape)
    start, target = (store.read(0, place).double() for place in (epoch, epoch + 2))
    return Segment(0, epoch, lambda: (start, target, case[f"indices_{number}"], parameters))
