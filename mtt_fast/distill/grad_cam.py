"""Weigh the gradients of pixels by Grad-CAM maps of the images (EDF, CVPR 2025; Grad-CAM: Selvaraju et al., ICCV 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Network

_AT_ONCE = 4  # images: ResNet18 takes a tenth of a gigabyte for one of 128×128


def pixel_weights(network: Network, theta: Tensor, images: Tensor, classes: Tensor, beta: float) -> Tensor:
    """Return EDF's factors (n, 1, H, W) of the pixels' gradients, for `images` (n, C, H, W) of `classes` (n,).

    A factor is `beta` plus the map of `grad_cam` where that is at least its mean over the image, and 1 elsewhere.
    """
    parts = zip(images.split(_AT_ONCE), classes.split(_AT_ONCE), strict=True)
    maps = torch.cat([grad_cam(network, theta, *part) for part in parts])
    return torch.where(maps < maps.mean(dim=(2, 3), keepdim=True), 1, beta + maps)


def grad_cam(network: Network, theta: Tensor, images: Tensor, classes: Tensor) -> Tensor:
    """Return how much each pixel of `images` (n, C, H, W) says for the image's class (n,), from 0 to 1: maps (n, 1, H, W).

    The features are those before the network's last pooling (of ResNet18 those of `layer4`), under the parameters `theta`
    (P,). Channels are weighed by the mean gradient of the class's logit, and the positive part of their sum is
    interpolated and scaled. The map of an image without a positive part is 0. Raises `InputError` for a network without
    a pooling.
    """
    with _LastPooling() as pooling:
        logits = network(theta, images.detach().requires_grad_())
    features = pooling.input
    if features is None:
        raise InputError(
            "`cam_model`: expected a network with a pooling, whose input is the map, found none; take ResNet18"
        )
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    weighed = gradient.mean(dim=(2, 3), keepdim=True) * features.detach()
    maps = F.interpolate(weighed.sum(dim=1, keepdim=True).relu(), size=images.shape[2:], mode="bilinear")
    maps = maps - maps.amin(dim=(2, 3), keepdim=True)
    return maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


class _LastPooling(TorchFunctionMode):
    """Keeps the input of the pooling that is called last."""

    input: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("avg_pool2d", "max_pool2d"):
            self.input = args[0]
        return func(*args, **(kwargs or {}))
