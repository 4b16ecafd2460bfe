"""Compute the weights of pixels from Grad-CAM maps of the images (EDF, CVPR 2025; Grad-CAM: Selvaraju et al., ICCV 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Network

_BATCH = 4  # images in a pass; ResNet18 takes 0.1 GB for one of 128×128
_POOLINGS = ("avg_pool2d", "max_pool2d", "lp_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")


def pixel_weights(network: Network, theta: Tensor, images: Tensor, classes: Tensor, beta: float) -> Tensor:
    """Return EDF's weights (n, 1, H, W) for the gradients of pixels, for `images` (n, C, H, W) of `classes` (n,).

    A weight is `beta` plus the map of `grad_cam` where the map is at least its mean over the image, and 1 elsewhere.
    """
    batches = zip(images.split(_BATCH), classes.split(_BATCH), strict=True)
    maps = torch.cat([grad_cam(network, theta, *batch) for batch in batches])
    return torch.where(maps < maps.mean(dim=(2, 3), keepdim=True), 1, beta + maps)


def grad_cam(network: Network, theta: Tensor, images: Tensor, classes: Tensor) -> Tensor:
    """Return Grad-CAM maps (n, 1, H, W), from 0 to 1, of `images` (n, C, H, W) for their `classes` (n,).

    The features are the input of the network's last pooling (of ResNet18 the output of `layer4`), at the parameters `theta` (P,).
    Each channel is weighed by the mean gradient of the class's logit. The positive part of the sum over channels is interpolated
    to (H, W) and scaled to [0, 1]; without a positive part the map is 0. Raises `InputError` for a network without pooling.
    """
    with _LastPooling() as pooling:
        logits = network(theta, images.detach().requires_grad_())
    features = pooling.input
    if features is None:
        raise InputError(
            "`cam_model`: expected a network with a pooling layer, whose input is mapped, found none; use ResNet18"
        )
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    weighed = gradient.mean(dim=(2, 3), keepdim=True) * features.detach()
    maps = F.interpolate(weighed.sum(dim=1, keepdim=True).relu(), size=images.shape[2:], mode="bilinear")
    maps = maps - maps.amin(dim=(2, 3), keepdim=True)
    return maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


class _LastPooling(TorchFunctionMode):
    """Keep the input of the last pooling that is called: of a layer, or of a mean over all pixels."""

    input: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        result = func(*args, **kwargs)
        if name in (*_POOLINGS, "mean"):
            pooled = args[0] if args else kwargs["input"]
            if name != "mean" or (pooled.dim(), result.dim()) == (4, 2):
                self.input = pooled
        return result
