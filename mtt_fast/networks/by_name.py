"""Networks by the names of the public code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtt_fast.errors import InputError
from mtt_fast.networks.classics import alexnet, lenet, mlp, vgg
from mtt_fast.networks.convnet import ConvNet
from mtt_fast.networks.convnet_variants import convnet_variant
from mtt_fast.networks.flat_module import FlatModule
from mtt_fast.networks.layers import default_parameters
from mtt_fast.networks.protocol import Trainable
from mtt_fast.networks.resnets import resnet
from mtt_fast.networks.users_network import users_network
from mtt_fast.user_code import is_user_code

_ACTIVATIONS: dict[str, type[nn.Module]] = {"AS": nn.Sigmoid, "AR": nn.ReLU, "AL": nn.LeakyReLU, "ASwish": nn.SiLU}
_NORMS = {"NN": "none", "BN": "batch", "LN": "layer", "IN": "instance", "GN": "group"}
_POOLINGS: dict[str, type[nn.Module] | None] = {"NP": None, "MP": nn.MaxPool2d, "AP": nn.AvgPool2d}
_CONVNET = re.compile(
    rf"ConvNet(?:D(\d{{1,4}}))?(?:W(\d{{1,6}}))?({'|'.join(sorted(_ACTIVATIONS, reverse=True))})?({'|'.join(_NORMS)})?({'|'.join(_POOLINGS)})?"
)
_USUAL_PARTS = ("3", "128", "AR", "IN", "AP")  # of a ConvNet: depth, width, activation, norm and pooling

_OTHERS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "MLP": mlp,
    "LeNet": lenet,
    "AlexNet": alexnet,
    "AlexNetBN": partial(alexnet, batch_norm=True),
    **{f"VGG{depth}": partial(vgg, depth=depth) for depth in (11, 13, 16, 19)},
    **{f"VGG{depth}BN": partial(vgg, depth=depth, batch_norm=True) for depth in (11, 13, 16, 19)},
    **{f"ResNet{depth}": partial(resnet, depth=depth) for depth in (18, 34, 50, 101, 152)},
    **{f"ResNet{depth}BN": partial(resnet, depth=depth, batch_norm=True) for depth in (18, 34, 50, 101, 152)},
    "ResNet18_AP": partial(resnet, average_pooled=True),
    "ResNet18BN_AP": partial(resnet, batch_norm=True, average_pooled=True),
    "MLP_Tiny": mlp,
    "LeNet_Tiny": partial(lenet, first_stride=2),
    "AlexNet_Tiny": partial(alexnet, first_stride=2),
    "VGG11_Tiny": partial(vgg, last_stride=2),
    "ResNet18_Tiny": partial(resnet, first_stride=2),
    "ResNet18BN_Tiny": partial(resnet, batch_norm=True, first_stride=2),
}


class NamedNetwork(FlatModule):
    """A network of the public code: a `FlatModule` in training mode that draws fresh parameters."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(module)
        self._name = name

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw initial parameters (P,), float32, on the generator's device, with `torch`'s default distribution."""
        return default_parameters(self._module, generator)

    def describe(self) -> dict[str, Any]:
        """Return the description of the network, as a record."""
        return {"kind": self._name}


def network_by_name(
    name: str, image_shape: tuple[int, int, int], num_classes: int, *, option: str = "model"
) -> Trainable:
    """Return the network called `name` for images (C, H, W).

    The name is ConvNet with depth, width, activation, norm and pooling, each of them optional, in this order: ConvNetD4,
    ConvNetW256, ConvNetD2W64BN, ConvNetAL, ConvNetNNMP. Activations: AS sigmoid, AR ReLU, AL leaky ReLU, ASwish. Norms: IN
    instance, BN batch, LN layer, GN group, NN none. Pooling: AP average, MP max, NP none. ConvNet alone is ConvNetD3W128ARINAP.
    ConvNetKIP is ConvNetW1024NN. The others are MLP, LeNet, AlexNet, VGG11 (13, 16, 19), ResNet18 (34, 50, 101, 152) and
    ResNet18_AP (average pooled); those of DATM's code for 64-pixel images, LeNet_Tiny, AlexNet_Tiny and ResNet18_Tiny (first
    stride 2), VGG11_Tiny (a quarter of the features) and MLP_Tiny (MLP), all with instance norm where they have a norm; and with
    batch norm AlexNetBN, VGG11BN, ResNet18BN, …, ResNet18BN_AP, ResNet18BN_Tiny. FILE.py:NAME and MODULE:NAME are a user's
    functions or classes (`users_network`).

    `ConvNet` with ReLU, average pooling and instance norm or none is `mtt_fast.ConvNet`, which has a fused student; all others
    are modules in a `FlatModule`. Raises `InputError`, which names the `option`, for any other name, and one that names the
    network for images too small for it.
    """
    if is_user_code(name):
        return users_network(option, name, image_shape, num_classes)
    parts = _convnet_parts(name)
    if parts is None and name not in _OTHERS:
        raise InputError(
            f"`{option}` {name}: expected ConvNet, with depth, width, activation, norm and pooling as in ConvNetD4, "
            f"ConvNetD3W256, ConvNetAL, ConvNetBN or ConvNetNNMP, one of {', '.join(_OTHERS)}, or FILE.py:NAME, a function or class of your own"
        )
    if parts is None:
        return _named(name, partial(_OTHERS[name], image_shape, num_classes))
    channels, height, side = image_shape
    depth, width, (activation, norm, pooling) = int(parts[0]), int(parts[1]), parts[2:]
    if (activation, pooling) == ("AR", "AP") and norm in ("IN", "NN"):
        size = height if height == side else (height, side)
        return ConvNet(channels, num_classes, size, width, depth, norm="instance" if norm == "IN" else "none")
    if min(depth, width) < 1:
        raise InputError(f"`{option}` {name}: expected a depth and a width of at least 1")
    variant = partial(
        convnet_variant, image_shape, num_classes, width=width, depth=depth, activation=_ACTIVATIONS[activation],
        norm=_NORMS[norm], pooling=_POOLINGS[pooling],
    )  # fmt: skip
    return _named(name, variant)


def full_name(described: Mapping[str, Any]) -> str:
    """Return the full name, with all its parts, of the network that `described` describes, for a comparison with another.

    ConvNet, ConvNetD3 and ConvNetW128IN are ConvNetD3W128ARINAP. The result is "" where the record lacks the parts. A user's
    network that has one of these names gets another full name.
    """
    kind = str(described.get("kind", ""))
    parts = _convnet_parts(kind)
    if "outputs" in described and (parts or kind in _OTHERS):
        return f"your own {kind}"
    if "width" in described or described.get("kind") == "ConvNet":
        norm = {"instance": "IN", "none": "NN"}.get(described.get("norm", ""))
        if norm is None or "depth" not in described or "width" not in described:
            return ""
        return f"ConvNetD{described['depth']}W{described['width']}AR{norm}AP"
    return kind if parts is None else "ConvNetD{}W{}{}{}{}".format(*parts)


def short_name(described: Mapping[str, Any]) -> str:
    """Return the shortest name of the network that `described` describes, as ConvNetD2W32; "" where the record lacks its parts."""
    full = full_name(described)
    parts = _convnet_parts(full)
    if parts is None:
        return full
    each = zip(("D", "W", "", "", ""), parts, _USUAL_PARTS, strict=True)
    return "ConvNet" + "".join(letter + part for letter, part, usual in each if part != usual)


def _convnet_parts(name: str) -> tuple[str, ...] | None:
    """Return depth, width, activation, norm and pooling of the ConvNet called `name`; None for the name of another network."""
    match = _CONVNET.fullmatch({"ConvNetKIP": "ConvNetW1024NN"}.get(name, name))
    if match is None:
        return None
    return tuple(part or usual for part, usual in zip(match.groups(), _USUAL_PARTS, strict=True))


def _named(name: str, build: Callable[[], nn.Module]) -> NamedNetwork:
    with torch.random.fork_rng(devices=[]):  # its layers draw parameters that are not used
        return NamedNetwork(name, build())
