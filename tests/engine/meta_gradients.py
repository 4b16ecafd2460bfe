"""Compute the meta-gradient of an iteration by the engine, and read golden cases of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from mtt_fast import ConvNet, matching_loss, unroll
from mtt_fast.testing import MetaGradient

_SIZES = ("in_channels", "num_classes", "image_size", "width", "depth")


def meta_gradient(
    net: Any, start: Tensor, target: Tensor, images: Tensor, labels: Tensor, lr: Tensor, batches: Any, **options: Any
) -> MetaGradient:
    """Return the result of `whole_graph`, computed by the engine."""
    theta, pixels, rate = (value.detach().clone().requires_grad_() for value in (start, images, lr))
    targets = labels.detach().clone().requires_grad_(labels.is_floating_point())
    path = unroll(net, theta, pixels, targets, rate, batches, **options)
    loss = matching_loss(path[-1], start=theta, target=target)
    loss.backward()
    assert pixels.grad is not None
    assert rate.grad is not None
    assert theta.grad is not None
    return MetaGradient(path[-1].detach(), loss.detach(), pixels.grad, targets.grad, rate.grad, theta.grad)


class GoldenCase(NamedTuple):
    """A network, the other arguments of an iteration of it, and the result of `whole_graph` in float64."""

    net: ConvNet
    arguments: dict[str, Tensor]
    expected: MetaGradient

    def meta_gradient(self, dtype: torch.dtype, device: str = "cpu", **options: Any) -> MetaGradient:
        """Return the engine's result in `dtype` on `device`."""
        given = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self.arguments.items()
        }
        return meta_gradient(self.net, **given, **options)


def golden_case(folder: Path, name: str) -> GoldenCase:
    """Return the case `name` in the `folder` of golden cases."""
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        info = file.metadata()
    net = ConvNet(**{size: int(info[size]) for size in _SIZES})  # type: ignore[arg-type]
    assert net.layout.describe() == info["parameters"]
    loss, lr, lr_gradient = (tensors.pop(key)[0] for key in ("loss", "lr", "grad_lr"))
    end, images, start = (tensors.pop(key) for key in ("end", "grad_images", "grad_start"))
    labels = tensors.pop("grad_labels", None)
    return GoldenCase(net, tensors | {"lr": lr}, MetaGradient(end, loss, images, labels, lr_gradient, start))
