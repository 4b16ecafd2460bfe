"""The base class of parametrisations, the images that one computes, and the gradients of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mtt_fast.errors import InputError
from mtt_fast.runtime.numerics import numerics

Optimizer = Literal["sgd", "adam"]

_BLOCK = 1 << 21  # values of images that are computed at once
_CLOSE = 1e-3  # relative: more than rounding in float32 changes


class Parametrisation(nn.Module):
    """Compute the synthetic images from parameters, which are learned in place of the pixels.

    `python -m mtt_fast.distill --parametrisation FILE.py:NAME` makes `NAME(images, num_classes, **options)`, where `options` are
    those of `--parametrisation_options`, and `images` (n, C, H, W) float32 the initial images, sorted by class, on the CPU. Every
    run, new or resumed, constructs it three times, with torch's default generator seeded in the same way. The result must be the
    same each time.

    Parameters that require a gradient are learned, by SGD with the momentum `--mom_img` or, if `optimizer` is "adam", by Adam. Other
    parameters and buffers stay as they are: `forward` must not change them. All have to be float32; `torch.view_as_complex` makes complex
    numbers of them.

    Example:
        ```python
        class Quarters(mtt_fast.Parametrisation):  # four images in the storage of one
            def __init__(self, images, num_classes):
                super().__init__()
                self.small = torch.nn.Parameter(interpolate(images, scale_factor=0.5, mode="area"))

            def forward(self, index):
                return interpolate(self.small[index], scale_factor=2, mode="bilinear")
        ```
    """

    optimizer: ClassVar[Optimizer] = "sgd"
    """the optimizer of the parameters: torch.optim.SGD, or torch.optim.Adam with its own defaults"""

    def forward(self, index: Tensor) -> Tensor:
        """Return the images (k, C, H, W) float32 at `index` (k,) int64.

        An image must not depend on which others are computed with it, or on random numbers. In eval mode (`self.training` is
        False) these are the images that are evaluated and saved, which may differ from those that are matched.
        """
        raise NotImplementedError

    def fit(self, images: Tensor) -> None:
        """Fit the parameters to the initial `images` (n, C, H, W), on their device, to which the module has been moved.

        The learned parameters must keep their names, dtypes and shapes. `fit` is called when a run starts or is resumed, with
        torch's default generators seeded in the same way, but not when options are checked. By default it does nothing.
        """

    def relative_rate(self, name: str) -> float:
        """Return the learning rate of the parameter `name`, as a multiple of `--lr_img`."""
        return 1.0

    def penalty(self) -> Tensor | None:
        """Return a scalar that is added to the matching loss, or None for nothing."""
        return None

    def stored_numbers(self) -> int:
        """Return how many 32-bit values must be stored to compute the images again, for the log; by default all parameters.

        Count buffers too if they cannot be recomputed.
        """
        return sum(parameter.numel() for parameter in self.parameters())


def check_whole(name: str, least: int = 1, **options: Any) -> None:
    """Raise `InputError` unless each of the `options` of the parametrisation `name` is a whole number of at least `least`."""
    for option, value in options.items():
        if not isinstance(value, int) or value < least:
            raise InputError(f"`parametrisation` {name}: {option} {value}: expected a whole number from {least} on")


def learned_parameters(parametrisation: Parametrisation) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in parametrisation.named_parameters() if parameter.requires_grad}


def learned_values(parametrisation: Parametrisation) -> dict[str, Tensor]:
    """Return copies of the learned parameters' values, by name."""
    return {name: parameter.detach().clone() for name, parameter in learned_parameters(parametrisation).items()}


@torch.no_grad()
def images_at(
    parametrisation: Parametrisation, values: Mapping[str, Tensor], out: Tensor, *, evaluated: bool = False
) -> Tensor:
    """Write all images at the `values` of the learned parameters to `out` (n, C, H, W), and return it.

    These are the images that are matched, or with `evaluated` those that are evaluated and saved.
    """
    set_values(parametrisation, values)
    parametrisation.train(not evaluated)
    with numerics(out.device, "fp32"):
        for index in _blocks(out):
            out[index] = parametrisation(index)
    return out


def gradients_at(
    parametrisation: Parametrisation, values: Mapping[str, Tensor], images_gradient: Tensor
) -> dict[str, Tensor]:
    """Return the gradients of loss and penalty with respect to the learned parameters at `values`, by name.

    `images_gradient` (n, C, H, W) is the gradient with respect to the images. The images are computed again, some at a time.
    """
    set_values(parametrisation, values)
    parametrisation.train()
    learned = learned_parameters(parametrisation)
    with torch.enable_grad(), numerics(images_gradient.device, "fp32"):
        for index in _blocks(images_gradient):
            parametrisation(index).backward(images_gradient[index])
        if (penalty := parametrisation.penalty()) is not None:
            penalty.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
        for name, parameter in learned.items()
    }
    for parameter in learned.values():
        parameter.grad = None
    return gradients


def are_close(first: Tensor, second: Tensor) -> bool:
    """Return whether images differ by rounding in float32 only."""
    return bool((first - second).abs().max() <= _CLOSE * first.abs().max())


@torch.no_grad()
def set_values(parametrisation: Parametrisation, values: Mapping[str, Tensor]) -> None:
    """Copy `values` into the learned parameters of the same names."""
    for name, parameter in learned_parameters(parametrisation).items():
        parameter.copy_(values[name])


def block_size(images: Tensor) -> int:
    """Return how many of `images` (n, C, H, W) are computed at once."""
    return max(1, _BLOCK // images[0].numel())


def _blocks(images: Tensor) -> Iterator[Tensor]:
    """Yield the indices of the images that are computed at once, in order."""
    yield from torch.arange(len(images), device=images.device).split(block_size(images))
