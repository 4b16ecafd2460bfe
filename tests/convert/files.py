"""Make sets and experts as the public code saves them, and convert them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast import SyntheticDataset
from mtt_fast.commands import cli
from mtt_fast.convert.command import main
from mtt_fast.data import load
from mtt_fast.testing import reference_convnet

DIGITS = "--dataset digits --model ConvNetD1W4".split()


def convert(*arguments: str) -> int:
    return cli.run(main, arguments)


def distilled(label_kind: str = "indices", **changes: Any) -> SyntheticDataset:
    data = load("digits", data_path="data", progress=False)
    labels = torch.arange(10)
    arguments: dict[str, Any] = {
        "images": torch.randn(10, 1, 8, 8),
        "labels": labels if label_kind == "indices" else torch.randn(10, 10).softmax(1),
        "lr": torch.tensor(0.02),
        "class_names": data.class_names,
        "mean": data.mean,
        "std": data.std,
        "label_kind": label_kind,
        "recipe": {"dataset": "digits", "model": "ConvNetD1W4"},
    }
    return SyntheticDataset(**arguments | changes)


def save_public_pair(labels: Tensor, folder: str = "theirs") -> Tensor:
    Path(folder).mkdir(exist_ok=True)
    images = torch.randn(len(labels), 1, 8, 8)
    torch.save(images.requires_grad_(), f"{folder}/images_best.pt")
    torch.save(labels.requires_grad_(labels.is_floating_point()), f"{folder}/labels_best.pt")
    return images.detach()


def save_public_buffer(folder: str) -> None:
    """Save two experts of two epochs as buffer.py saves them on a GPU."""
    Path(folder).mkdir(parents=True)
    trajectories = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = reference_convnet(1, 10, 8, 4, 1)
        timestamps = [[p.detach().clone() for p in net.parameters()]]
        for _ in range(2):
            for p in net.parameters():
                p.data += 0.01 * torch.randn_like(p)
            timestamps.append([p.detach().clone() for p in net.parameters()])
        trajectories.append(timestamps)
    torch.save(trajectories, f"{folder}/replay_buffer_0.pt")
