"""Make cases for the engines: random images and labels, a fresh network, and a target that training reaches from it.

An engine maps a `Case` to `Gradients`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.settings import Setting
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.networks.convnet import ConvNet
from mtt_fast.storage.tensor_files import save_tensors
from mtt_fast.testing import reference_convnet

_LR = 0.01  # of the experts, and of the students of most settings
_TARGET_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One iteration: from `start` (P,) through N steps on `images[batches[n]]`, towards `target` (P,)."""

    start: Tensor
    target: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor
    batches: Tensor  # (N, b)


TENSORS = tuple(field.name for field in fields(Iteration))
"""The names of an iteration's tensors."""


@dataclass(frozen=True, kw_only=True)
class Case(Iteration):
    """An iteration of a ConvNet."""

    net: ConvNet


class Gradients(NamedTuple):
    """Gradients of the matching loss."""

    images: Tensor
    lr: Tensor


def make_case(setting: Setting) -> Case:
    """Return a case in float64, on the CPU, whose values are exact in float32.

    The target lies as many steps away as the student takes, on other images with ten times the learning rate. So it lies in a
    direction of training: in a random direction the Hessian terms would seem smaller than they are. And it is far away, as an
    expert's epochs are: float32 loses most digits of a short path.
    """
    generator = torch.Generator().manual_seed(0)
    net = setting.net
    start = net.init(generator)
    other_images = torch.randn(_TARGET_BATCH, net.in_channels, setting.side, setting.side, generator=generator)
    target, student = start, GenericStudent(net)
    labels = torch.randint(net.num_classes, (_TARGET_BATCH,), generator=generator)
    for _ in range(setting.steps):
        target = target - 10 * _LR * student.gradient(target, other_images, labels).gradient
    images = torch.randn(setting.images, *other_images.shape[1:], generator=generator)
    batches = [torch.randperm(setting.images, generator=generator)[: setting.batch] for _ in range(setting.steps)]
    return Case(
        net=net,
        start=start.double(),
        target=target.double(),
        images=images.double(),
        labels=torch.arange(setting.images) % net.num_classes,
        lr=torch.tensor(_LR).double(),
        batches=torch.stack(batches),
    )


def module_of(net: ConvNet) -> nn.Module:
    """Return `net`, whose images are square, as an ordinary module."""
    assert isinstance(net.image_size, int)
    return reference_convnet(net.in_channels, net.num_classes, net.image_size, net.width, net.depth, net.norm)


def small_setting(setting: Setting) -> Setting:
    """Return the smallest case of the same depth that has several channels, pixels, steps and batches."""
    net = setting.net
    small = ConvNet(
        net.in_channels, min(net.num_classes, 4), 2 ** (net.depth + 1), width=6, depth=net.depth, norm=net.norm
    )
    return Setting(small, images=5, steps=3, batch=4)


def case_on(case: Case, dtype: torch.dtype, device: torch.device) -> Case:
    """Return the case in `dtype` on `device`."""

    def moved(value: Tensor) -> Tensor:
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return Case(net=case.net, **{name: moved(value) for name, value in _tensors(case).items()})


def save_case(case: Case, path: Path) -> dict[str, Any]:
    """Write the case's tensors to `path`; return the arguments of `load_case`."""
    save_tensors(path, _tensors(case))
    return {"net": asdict(case.net), "path": str(path)}


def load_case(net: dict[str, Any], path: str) -> Case:
    """Read the case that `save_case` wrote."""
    from safetensors.torch import load_file

    return Case(net=ConvNet(**net), **load_file(path))


def _tensors(case: Case) -> dict[str, Tensor]:
    return {name: getattr(case, name) for name in TENSORS}
