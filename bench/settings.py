"""Define the settings of the benchmarks: the shapes of the paper's settings by name, or given one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mtt_fast.commands.options import Count
from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.convnet import ConvNet
from mtt_fast.recipes import recipe_options

_IMAGES = {"CIFAR10": (3, 32, 10), "CIFAR100": (3, 32, 100), "Tiny": (3, 64, 200), "ImageNet": (3, 128, 10)}
"""Channels, pixels and classes by the data set's name in recipes (ImageNet: its ten-class subsets)."""

# a benchmark's name, its recipe, and what differs from that: nobody has published 50 images per class at 128 pixels
_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{data}-ipc{ipc}": (f"{data}-ipc{ipc}", {}) for data in ("cifar10", "cifar100", "tiny") for ipc in (1, 10, 50)},
    "imagenet128-ipc1": ("imagenette-ipc1", {}),
    "imagenet128-ipc10": ("imagenette-ipc10", {}),
    "imagenet128-ipc50": ("imagenette-ipc10", {"ipc": 50, "batch_syn": None}),
}
SETTINGS = tuple(_RECIPES)


@dataclass(frozen=True)
class Setting:
    """The shape of an iteration: a network, the number of synthetic images, N steps of batches of b."""

    net: ConvNet
    images: int
    steps: int
    batch: int

    @property
    def side(self) -> int:
        """Return the side of the images, which are square, in pixels."""
        assert isinstance(self.net.image_size, int)
        return self.net.image_size

    def __str__(self) -> str:
        net = self.net
        return (
            f"ConvNet depth {net.depth} width {net.width}{' without norm' if net.norm == 'none' else ''}, "
            f"{net.in_channels}×{net.image_size}×{net.image_size}, {net.num_classes} classes, N = {self.steps}, b = {self.batch}"
        )


@dataclass(frozen=True)
class NetworkShape:
    """A setting by name, and changes to its network."""

    setting: str = "cifar10-ipc10"
    """cifar10-ipc1/10/50, cifar100-…, tiny-…, imagenet128-…"""
    size: Count | None = None
    """resolution in pixels"""
    depth: Count | None = None
    """blocks of the network"""
    width: Count | None = None
    """channels of the network"""

    def resolve(self) -> Setting:
        """Return the setting. Raises `InputError` for an unknown name."""
        setting = setting_named(self.setting)
        net = setting.net
        net = replace(
            net, image_size=self.size or net.image_size, depth=self.depth or net.depth, width=self.width or net.width
        )
        return replace(setting, net=net)

    def label(self) -> str:
        """Return the setting's name with its changes, for file names."""
        changed = [
            f"{name}{value}"
            for name in ("steps", "batch", "size", "depth", "width")
            if (value := getattr(self, name, None))
        ]
        return "-".join([self.setting, *changed])


@dataclass(frozen=True)
class BatchShape(NetworkShape):
    """A setting by name, and changes to a step of it."""

    batch: Count | None = None
    """b, images in a student step"""

    def resolve(self) -> Setting:
        """See `NetworkShape.resolve`."""
        setting = super().resolve()
        batch = self.batch or setting.batch
        return replace(setting, images=max(setting.images, batch), batch=batch)


@dataclass(frozen=True)
class Shape(BatchShape):
    """A setting by name, and changes to it."""

    steps: Count | None = None
    """N, student steps in an iteration"""

    def resolve(self) -> Setting:
        """See `NetworkShape.resolve`."""
        setting = super().resolve()
        return replace(setting, steps=self.steps or setting.steps)


def setting_named(name: str) -> Setting:
    """Return the setting called `name`. Raises `InputError` for an unknown one."""
    if name not in _RECIPES:
        raise InputError(
            f"--setting {name}: no such setting{did_you_mean(name, SETTINGS)}; one of {', '.join(SETTINGS)}"
        )
    recipe, changes = _RECIPES[name]
    options = recipe_options(recipe) | changes
    channels, size, classes = _IMAGES[options["dataset"]]
    net = network_by_name(options["model"], (channels, size, size), classes)
    if not isinstance(net, ConvNet):
        raise InputError(f"--setting {name}: expected a recipe of ConvNet, found one of {options['model']}")
    images = options["ipc"] * classes
    return Setting(net, images, options["syn_steps"], options.get("batch_syn") or images)
