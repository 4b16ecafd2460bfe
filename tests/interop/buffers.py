"""Train experts as the public code does, and save them in its buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtt_fast import ConvNet, TrajectoryStore
from mtt_fast.interop import buffer_files, import_experts, read_buffer
from mtt_fast.interop.experts import Trajectory
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.testing import reference_convnet

NET = ConvNet(in_channels=1, num_classes=3, image_size=6, width=4, depth=1)
EPOCHS = 3
Epochs = list[list[Tensor]]


def trained(seed: int, epochs: int = EPOCHS, on_a_gpu: bool = True) -> Epochs:
    """Return one expert as buffer.py records it; `on_a_gpu`, where `.cpu()` copies."""
    torch.manual_seed(seed)
    images, labels = torch.randn(12, 1, 6, 6), torch.arange(12) % 3
    teacher_net = reference_convnet(1, 3, 6, 4, 1)
    teacher_optim = torch.optim.SGD(teacher_net.parameters(), lr=0.1)

    def recorded() -> list[Tensor]:
        return [p.detach().clone() if on_a_gpu else p.detach().cpu() for p in teacher_net.parameters()]

    timestamps = [recorded()]
    for _ in range(epochs):
        teacher_optim.zero_grad()
        nn.functional.cross_entropy(teacher_net(images), labels).backward()
        teacher_optim.step()
        timestamps.append(recorded())
    return timestamps


def save_buffers(folder: Path, experts: list[Epochs], save_interval: int) -> None:
    """Save as buffer.py does, but with the last group, which buffer.py leaves out when it is short."""
    folder.mkdir(parents=True, exist_ok=True)
    trajectories: list[Epochs] = []
    n = 0
    for expert in experts:
        trajectories.append(expert)
        if len(trajectories) == save_interval or expert is experts[-1]:
            torch.save(trajectories, folder / f"replay_buffer_{n}.pt")
            trajectories = []
            n += 1


def flat(expert: Epochs) -> Tensor:
    return torch.stack([nn.utils.parameters_to_vector(epoch) for epoch in expert])


def metadata(**changes: Any) -> ExpertMetadata:
    arguments: dict[str, Any] = {
        "network": {"kind": "ConvNet"},
        "layout": NET.layout.describe(),
        "dataset": "digits",
        "fingerprint": "f00d",
        "whitening": "none",
        "hyperparameters": {},
        "seed": -1,
        "accuracy": [],
        "versions": {},
    }
    return ExpertMetadata(**arguments | changes)


def unmeasured(rows: Tensor) -> list[float]:
    return [math.nan] * (len(rows) - 1) + [0.5]


def imported(
    source: Path, folder: Path, each: Callable[[Trajectory], None] = lambda expert: None, **changes: Any
) -> TrajectoryStore:
    def experts() -> Iterator[Trajectory]:
        for file in buffer_files(source):
            yield from read_buffer(file)

    return import_experts(experts, folder, NET.layout, metadata(**changes), unmeasured, each=each)
