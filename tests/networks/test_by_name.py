"""Test the networks of the public code: counts by arithmetic, names and order, outputs by plain functions, fresh parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtt_fast import ConvNet, FlatModule, InputError, matching_loss, unroll
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.flat_module import statistics_of
from mtt_fast.networks.layers import default_parameters
from mtt_fast.networks.pools import POOLS, eval_pool
from mtt_fast.testing import assert_close, whole_graph

CIFAR, MNIST, TINY, IMAGENETTE = (3, 32, 32), (1, 28, 28), (3, 64, 64), (3, 128, 128)
Shape = tuple[int, ...]


def conv(before: int, after: int, kernel: int) -> int:
    return after * before * kernel**2 + after


def linear(before: int, after: int) -> int:
    return after * before + after


def convnet(shape: Shape, classes: int, width: int = 128, depth: int = 3, norm: int = 2, halvings: int = 3) -> int:
    """Return the number of parameters of a ConvNet with `norm` parameters a channel."""
    channels, side, _ = shape
    side = 32 if side == 28 else side
    inner = conv(channels, width, 3) + (depth - 1) * conv(width, width, 3) + depth * norm * width
    return inner + linear(width * (side >> halvings) ** 2, classes)


def layer_norms(sides: tuple[int, ...]) -> int:
    return sum(2 * 128 * side**2 for side in sides)


def vgg11(shape: Shape, classes: int) -> int:
    widths = (shape[0], 64, 128, 256, 256, 512, 512, 512, 512)
    return sum(conv(a, b, 3) + 2 * b for a, b in pairwise(widths)) + linear(512, classes)


def alexnet(shape: Shape, classes: int, norm: int = 0) -> int:
    layers = ((shape[0], 128, 5), (128, 192, 5), (192, 256, 3), (256, 192, 3), (192, 192, 3))
    return sum(conv(*layer) + norm * layer[1] for layer in layers) + linear(192 * 4 * 4, classes)


def resnet18(shape: Shape, classes: int, features: int) -> int:
    """Return the number of parameters: convolutions have no bias, and the classifier has `features` inputs."""
    total = 9 * shape[0] * 64 + 2 * 64
    for before, after in ((64, 64), (64, 128), (128, 256), (256, 512)):
        total += 9 * before * after + 3 * 9 * after**2 + 4 * 2 * after
        if before != after:
            total += before * after + 2 * after
    return total + linear(features, classes)


COUNTS: list[tuple[str, tuple[int, int, int], int, int]] = [
    ("ConvNet", CIFAR, 10, 320_010),  # published counts, where a literal stands
    ("ConvNet", CIFAR, 100, 504_420),
    ("ConvNetD4", TINY, 200, 857_160),
    ("ConvNetD5", IMAGENETTE, 10, 615_690),
    ("ResNet18BN", CIFAR, 10, 11_173_962),
    ("ResNet34BN", CIFAR, 10, 21_282_122),
    ("ResNet50BN", CIFAR, 10, 23_520_842),
    ("ResNet101BN", CIFAR, 10, 42_512_970),
    ("ResNet152", CIFAR, 10, 58_156_618),
    ("VGG11BN", CIFAR, 10, 9_231_114),
    ("VGG13", CIFAR, 10, 9_416_010),
    ("VGG16BN", CIFAR, 10, 14_728_266),
    ("VGG19", CIFAR, 10, 20_040_522),
    ("LeNet", CIFAR, 10, 62_006),
    ("LeNet", MNIST, 10, 61_706),
    ("MLP", CIFAR, 10, linear(3072, 128) + linear(128, 128) + linear(128, 10)),
    ("MLP", MNIST, 10, linear(784, 128) + linear(128, 128) + linear(128, 10)),
    ("AlexNet", CIFAR, 10, alexnet(CIFAR, 10)),
    ("AlexNet", CIFAR, 100, alexnet(CIFAR, 100)),
    ("AlexNet", MNIST, 10, alexnet(MNIST, 10)),
    ("AlexNetBN", CIFAR, 10, alexnet(CIFAR, 10, norm=2)),
    ("VGG11", CIFAR, 100, vgg11(CIFAR, 100)),
    ("VGG11", MNIST, 10, vgg11(MNIST, 10)),
    ("ResNet18", CIFAR, 100, resnet18(CIFAR, 100, 512)),
    ("ResNet18", MNIST, 10, resnet18(MNIST, 10, 512)),
    ("ResNet18_AP", CIFAR, 10, resnet18(CIFAR, 10, 512 * 16)),
    ("MLP_Tiny", TINY, 200, linear(12_288, 128) + linear(128, 128) + linear(128, 200)),
    ("LeNet_Tiny", TINY, 10, 62_006),
    ("AlexNet_Tiny", TINY, 200, alexnet(TINY, 200)),
    ("VGG11_Tiny", TINY, 200, vgg11(TINY, 200)),
    ("ResNet18_Tiny", TINY, 200, resnet18(TINY, 200, 512)),
    ("ResNet18BN_Tiny", TINY, 200, resnet18(TINY, 200, 512)),
    ("ResNet18BN_AP", CIFAR, 100, resnet18(CIFAR, 100, 512 * 16)),
    ("ResNet18_AP", MNIST, 10, resnet18(MNIST, 10, 512 * 9)),
    *[(f"ConvNetD{d}", IMAGENETTE, 10, convnet(IMAGENETTE, 10, depth=d, halvings=d)) for d in (1, 2, 3, 4, 6, 7)],
    ("ConvNetD8", (3, 256, 256), 10, convnet((3, 256, 256), 10, depth=8, halvings=8)),
    *[(f"ConvNetW{w}", CIFAR, 10, convnet(CIFAR, 10, w)) for w in (32, 64, 128, 256, 512, 1024)],
    *[(f"ConvNet{a}", CIFAR, 10, 320_010) for a in ("AS", "AR", "AL", "ASwish", "IN", "BN", "GN", "MP", "AP")],
    ("ConvNetASwishBN", CIFAR, 10, 320_010),
    ("ConvNetBN", TINY, 200, convnet(TINY, 200)),
    ("ConvNetMP", MNIST, 10, convnet(MNIST, 10)),
    ("ConvNetNN", CIFAR, 10, convnet(CIFAR, 10, norm=0)),
    ("ConvNetKIP", CIFAR, 10, convnet(CIFAR, 10, 1024, norm=0)),
    ("ConvNetLN", CIFAR, 10, convnet(CIFAR, 10, norm=0) + layer_norms((32, 16, 8))),
    ("ConvNetLN", IMAGENETTE, 10, convnet(IMAGENETTE, 10, norm=0) + layer_norms((128, 64, 32))),
    ("ConvNetLN", MNIST, 10, convnet(MNIST, 10, norm=0) + layer_norms((32, 16, 8))),
    ("ConvNetNP", CIFAR, 10, convnet(CIFAR, 10, halvings=0)),
    ("ConvNetNP", MNIST, 10, convnet(MNIST, 10, halvings=0)),
]


@pytest.mark.parametrize(("name", "shape", "classes", "count"), COUNTS)
def test_counts_are_those_of_the_public_code(name: str, shape: tuple[int, int, int], classes: int, count: int) -> None:
    assert network_by_name(name, shape, classes).num_parameters == count


class Reader:
    """A reader of a flat vector, which takes parameters one after another in the order of the layers."""

    def __init__(self, theta: Tensor) -> None:
        self.theta, self.begin = theta, 0

    def take(self, *shape: int) -> Tensor:
        begin, self.begin = self.begin, self.begin + math.prod(shape)
        return self.theta[begin : self.begin].view(shape)

    def conv(self, x: Tensor, after: int, kernel: int, padding: int, stride: int = 1, bias: bool = True) -> Tensor:
        weight = self.take(after, x.shape[1], kernel, kernel)
        return F.conv2d(x, weight, self.take(after) if bias else None, stride, padding)

    def instance(self, x: Tensor) -> Tensor:
        gamma, beta = (self.take(x.shape[1])[:, None, None] for _ in range(2))
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * gamma + beta

    def linear(self, x: Tensor, after: int) -> Tensor:
        x = x.flatten(1)
        return F.linear(x, self.take(after, x.shape[1]), self.take(after))


def plain_alexnet(p: Reader, x: Tensor, first: int = 1) -> Tensor:
    x = F.max_pool2d(p.conv(x, 128, 5, 4 if x.shape[1] == 1 else 2, first).relu(), 2)
    x = F.max_pool2d(p.conv(x, 192, 5, 2).relu(), 2)
    for after in (256, 192, 192):
        x = p.conv(x, after, 3, 1).relu()
    return p.linear(F.max_pool2d(x, 2), 10)


def plain_vgg(p: Reader, x: Tensor, last: int = 1, counts: Sequence[int] = (1, 1, 2, 2, 2)) -> Tensor:
    for after, count in zip((64, 128, 256, 512, 512), counts, strict=True):
        for _ in range(count):
            x = p.instance(p.conv(x, after, 3, 3 if x.shape[1] == 1 else 1)).relu()
        x = F.max_pool2d(x, 2)
    return p.linear(x[:, :, ::last, ::last], 10)


def plain_resnet18(p: Reader, x: Tensor, pooled: bool = False, first: int = 1) -> Tensor:
    x = p.instance(p.conv(x, 64, 3, 1, first, bias=False)).relu()
    for after, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        step = 1 if pooled else stride
        halve = stride == 2 and pooled
        inner = p.instance(p.conv(x, after, 3, 1, step, bias=False)).relu()
        inner = p.instance(p.conv(F.avg_pool2d(inner, 2) if halve else inner, after, 3, 1, bias=False))
        if stride == 2:
            x = p.conv(x, after, 1, 0, step, bias=False)
            x = p.instance(F.avg_pool2d(x, 2) if halve else x)
        x = (inner + x).relu()
    return p.linear(x if pooled else F.avg_pool2d(x, 4), 10)


def plain_resnet50(p: Reader, x: Tensor) -> Tensor:
    x = p.instance(p.conv(x, 64, 3, 1, bias=False)).relu()
    for inner, count, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for stride in (first, *[1] * (count - 1)):
            y = p.instance(p.conv(x, inner, 1, 0, bias=False)).relu()
            y = p.instance(p.conv(y, inner, 3, 1, stride, bias=False)).relu()
            y = p.instance(p.conv(y, 4 * inner, 1, 0, bias=False))
            x = x if x.shape == y.shape else p.instance(p.conv(x, 4 * inner, 1, 0, stride, bias=False))
            x = (y + x).relu()
    return p.linear(F.avg_pool2d(x, 4), 10)


def plain_lenet(p: Reader, x: Tensor, first: int = 1) -> Tensor:
    x = F.max_pool2d(p.conv(x, 6, 5, 2 if x.shape[1] == 1 else 0, first).relu(), 2)
    x = F.max_pool2d(p.conv(x, 16, 5, 0).relu(), 2)
    return p.linear(p.linear(p.linear(x, 120).relu(), 84).relu(), 10)


def plain_mlp(p: Reader, x: Tensor) -> Tensor:
    return p.linear(p.linear(p.linear(x, 128).relu(), 128).relu(), 10)


PLAIN: dict[str, Callable[[Reader, Tensor], Tensor]] = {
    "AlexNet": plain_alexnet,
    "VGG11": plain_vgg,
    "VGG16": partial(plain_vgg, counts=(2, 2, 3, 3, 3)),
    "ResNet18": plain_resnet18,
    "ResNet18_AP": partial(plain_resnet18, pooled=True),
    "ResNet50": plain_resnet50,
    "LeNet": plain_lenet,
    "MLP": plain_mlp,
}
PLAIN_TINY: dict[str, Callable[[Reader, Tensor], Tensor]] = {
    "AlexNet_Tiny": partial(plain_alexnet, first=2),
    "VGG11_Tiny": partial(plain_vgg, last=2),
    "ResNet18_Tiny": partial(plain_resnet18, first=2),
    "LeNet_Tiny": partial(plain_lenet, first=2),
    "MLP_Tiny": plain_mlp,
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in PLAIN for shape in (CIFAR, MNIST)]  # 28 pixels, halved, become odd
    + [(name, TINY) for name in PLAIN_TINY],
)
def test_outputs_equal_the_layers_written_out(name: str, shape: tuple[int, int, int]) -> None:
    net = network_by_name(name, shape, 10)
    theta = net.init(torch.Generator().manual_seed(0)).double()
    theta += 0.02 * torch.randn(theta.shape, dtype=torch.float64)  # the norms' parameters differ too
    images = torch.randn(2, *shape, dtype=torch.float64)
    reader = Reader(theta)
    assert_close("logits", net(theta, images), (PLAIN | PLAIN_TINY)[name](reader, images), 1e-10)
    assert reader.begin == net.num_parameters


ACTIVATIONS = {"AS": torch.sigmoid, "AR": torch.relu, "AL": F.leaky_relu, "ASwish": lambda x: x * torch.sigmoid(x)}


def plain_norm(norm: str, p: Reader, x: Tensor) -> Tensor:
    if norm == "NN":
        return x
    if norm == "IN":
        return p.instance(x)
    if norm == "LN":
        gamma, beta = (p.take(*x.shape[1:]) for _ in range(2))
        mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), correction=0, keepdim=True)
    else:
        gamma, beta = (p.take(x.shape[1])[:, None, None] for _ in range(2))
        if norm == "BN":
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        else:
            groups = x.reshape(len(x), 4, -1)
            mean, var = groups.mean(2), groups.var(2, correction=0)
            mean, var = (value.repeat_interleave(x.shape[1] // 4, 1)[..., None, None] for value in (mean, var))
    return (x - mean) / (var + 1e-5).sqrt() * gamma + beta


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 6)], ids=["colour", "grey"])
@pytest.mark.parametrize(
    ("activation", "norm", "pooling"),
    [*((a, "IN", "AP") for a in ACTIVATIONS), *(("AR", n, "MP") for n in ("NN", "BN", "LN", "GN")), ("AL", "LN", "NP")],
)
def test_variants_of_convnet_equal_the_layers_written_out(
    activation: str, norm: str, pooling: str, shape: tuple[int, int, int]
) -> None:
    net = network_by_name(f"ConvNetD2W8{activation}{norm}{pooling}", shape, 10)
    theta = torch.randn(net.num_parameters, dtype=torch.float64)
    images = torch.randn(3, *shape, dtype=torch.float64)
    reader, x = Reader(theta), images
    for _ in range(2):
        x = ACTIVATIONS[activation](plain_norm(norm, reader, reader.conv(x, 8, 3, 3 if x.shape[1] == 1 else 1)))
        x = {"AP": lambda x: F.avg_pool2d(x, 2), "MP": lambda x: F.max_pool2d(x, 2), "NP": lambda x: x}[pooling](x)
    assert_close("logits", net(theta, images), reader.linear(x, 10), 1e-10)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("ConvNetLN", ["features.0.weight", "features.1.weight", "features.8.bias", "classifier.weight"]),
        ("ConvNetNNMP", ["features.0.weight", "features.3.weight", "classifier.bias"]),
        ("VGG11", ["features.0.weight", "features.1.bias", "features.4.weight", "features.26.weight"]),
        ("AlexNet", ["features.0.weight", "features.3.bias", "features.10.weight", "fc.weight"]),
        ("LeNet", ["features.3.weight", "fc_1.weight", "fc_3.bias"]),
        ("ResNet18", ["conv1.weight", "bn1.weight", "layer2.0.shortcut.1.weight", "layer4.1.bn2.bias"]),
        (
            "ResNet50",
            ["layer1.0.conv3.weight", "layer1.0.shortcut.0.weight", "layer1.2.bn3.bias", "layer4.2.conv2.weight"],
        ),
        ("ResNet18_AP", ["layer2.0.shortcut.0.weight", "layer2.0.shortcut.2.weight", "classifier.bias"]),
    ],
)
def test_parameters_have_the_names_of_the_public_code(name: str, some: list[str]) -> None:
    names = network_by_name(name, CIFAR, 10).layout.names
    assert set(some) <= set(names)
    assert [own_name for own_name in names if own_name in some] == some


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("AlexNetBN", (128, 192, 256, 192, 192)),
        ("VGG11BN", (64, 128, 256, 256, 512, 512, 512, 512)),
        ("ResNet18BN", [channels for channels in (64, 128, 256, 512) for _ in range(5)]),
    ],
)
def test_a_batch_norm_follows_each_convolution(name: str, channels: Sequence[int]) -> None:
    (statistics,) = statistics_of(network_by_name(name, CIFAR, 10))
    assert len(statistics) == sum(2 * count + 1 for count in channels)  # means, variances, and a number of batches


class FirstOfTheLargest(nn.Module):
    """Pool 2×2 values by their maximum; of equal ones the first gets the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(x, 2, stride=2).view(*x.shape[:2], 4, -1)
        first = (windows == windows.amax(2, keepdim=True)).byte().argmax(2, keepdim=True)
        return windows.gather(2, first).view(*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)


@pytest.mark.parametrize("microbatch", [None, 1])
def test_of_equal_values_max_pooling_gives_the_first_one_the_gradient_in_both_sweeps(microbatch: int | None) -> None:
    net = network_by_name("ConvNetD2W4NNMP", (1, 8, 8), 3)
    start = net.init(torch.Generator().manual_seed(0)).double()
    target = start + 0.05 * torch.randn_like(start)
    blocks = torch.randint(0, 3, (6, 1, 2, 2)).double().repeat_interleave(4, 2).repeat_interleave(4, 3)
    images, same = (blocks.clone().requires_grad_() for _ in range(2))
    labels, lr = torch.arange(6) % 3, torch.tensor(0.1, dtype=torch.float64)
    batches = [torch.arange(4), torch.arange(2, 6)]
    matching_loss(unroll(net, start, images, labels, lr, batches, microbatch=microbatch)[-1], start, target).backward()
    by_hand = FlatModule(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=3), nn.ReLU(), FirstOfTheLargest(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
            FirstOfTheLargest(), nn.Flatten(), nn.Linear(36, 3),
        )
    )  # fmt: skip
    expected = whole_graph(by_hand, start, target, same, labels, lr, batches)
    assert images.grad is not None
    assert_close("images", images.grad, expected.images, 1e-9)


@pytest.mark.parametrize("name", ["ConvNetD2W8MP", "ConvNetD2W8AS", "ConvNetD2W8LN", "ConvNetD2W8BN", "ConvNetD2W8GN"])
def test_the_meta_gradient_of_variants_is_that_of_autograd(name: str) -> None:
    net = network_by_name(name, (3, 8, 8), 3)
    assert isinstance(net, FlatModule)
    start = net.init(torch.Generator().manual_seed(0)).double()
    target = start + 0.05 * torch.randn_like(start)
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    labels, lr = torch.arange(6) % 3, torch.tensor(0.1, dtype=torch.float64)
    batches = [torch.arange(4), torch.arange(2, 6)]
    matching_loss(unroll(net, start, images, labels, lr, batches)[-1], start, target).backward()
    expected = whole_graph(net, start, target, images, labels, lr, batches)
    assert images.grad is not None
    assert_close("images", images.grad, expected.images, 1e-9)


@pytest.mark.parametrize("name", ["MLP", "LeNet", "VGG11BN", "AlexNet_Tiny", "ConvNetD2W8LN"])
def test_a_seed_gives_the_parameters_that_modules_of_torch_have(name: str) -> None:
    torch.manual_seed(3)
    net = network_by_name(name, CIFAR, 10)
    assert isinstance(net, FlatModule)
    assert torch.equal(net.init(torch.Generator().manual_seed(3)), FlatModule.init(net))


def test_fresh_parameters_follow_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    net = network_by_name("AlexNetBN", CIFAR, 10)

    def drawn(seed: int) -> Tensor:
        return net.init(torch.Generator().manual_seed(seed))

    expected = [drawn(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(drawn, range(4)))
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
    assert not torch.equal(expected[0], expected[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_share_a_network() -> None:
    net = network_by_name("ConvNetD1W8BN", (3, 8, 8), 3)
    images = torch.randn(5, 3, 8, 8)
    thetas = [net.init(torch.Generator().manual_seed(seed)) for seed in range(8)]

    def logits(theta: Tensor) -> Tensor:
        for _ in range(20):
            found = net(theta, images)
        return found

    expected = [logits(theta) for theta in thetas]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(logits, thetas))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_layer_of_an_unknown_kind_is_not_drawn() -> None:
    with pytest.raises(InputError, match="Bilinear: expected a convolution"):
        default_parameters(torch.nn.Bilinear(2, 2, 2))


def test_plain_names_keep_the_network_with_a_student_of_its_own() -> None:
    for name in ("ConvNet", "ConvNetAR", "ConvNetIN", "ConvNetAP", "ConvNetD3W128ARINAP"):
        assert network_by_name(name, CIFAR, 10) == ConvNet(3, 10, 32)
    assert network_by_name("ConvNetKIP", CIFAR, 10) == ConvNet(3, 10, 32, width=1024, norm="none")
    assert network_by_name("ConvNetAL", CIFAR, 10).describe() == {"kind": "ConvNetAL"}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("VGG12", CIFAR, "`model` VGG12: expected ConvNet"),
        ("ConvNetBNAL", CIFAR, "`model` ConvNetBNAL: expected ConvNet"),
        ("ConvNetW6GN", CIFAR, "width divisible by 4, found 6"),
        ("ConvNetNP", (3, 1, 1), "ConvNet with instance norm: expected more than one value to normalise"),
        ("ConvNetW4GNNP", (3, 1, 1), "ConvNet with group norm: expected more than one value to normalise"),
        ("ConvNetD4MP", (3, 8, 8), "4 poolings leave nothing of 8×8 images"),
        ("ConvNetD0MP", CIFAR, "a depth and a width of at least 1"),
        ("VGG11", (3, 16, 16), "VGG11: nothing is left of images"),
        ("LeNet", (1, 8, 8), "LeNet: nothing is left of images"),
        ("AlexNet", (3, 7, 7), "AlexNet: nothing is left of images"),
        ("ResNet18", (1, 8, 8), "ResNet18: nothing is left of images"),
        ("ResNet18_AP", (1, 15, 15), "ResNet18: nothing is left of images"),
        ("ResNet18BN_AP", (1, 7, 7), "ResNet18: nothing is left of images"),
    ],
)
def test_wrong_names_are_refused(name: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        network_by_name(name, shape, 10)


def test_pools_are_those_of_the_public_code() -> None:
    assert eval_pool("S", "ConvNetD4") == ("ConvNetD4",)
    assert eval_pool("S", "ConvNetBN") == ("ConvNet",)
    assert eval_pool("S", "ResNet18BN_AP") == ("ResNet18_AP",)
    assert eval_pool("SS", "ConvNetBN") == ("ConvNetBN",)
    assert eval_pool("C", "AlexNet") == ("AlexNet", "ConvNet")
    assert eval_pool("C", "ConvNet") == ("ConvNet",)
    assert eval_pool("M", "ConvNetD4") == ("ConvNet", "AlexNet", "VGG11", "ResNet18_AP", "ResNet18")
    assert eval_pool("D", "MLP") == ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4")
    assert {name for pool in POOLS.values() for name in pool} <= {name for name, *_ in COUNTS}  # all of them are there
    with pytest.raises(InputError, match="`eval_mode` X: expected one of S, SS, C, M, W, D, A, P, N, B, BN"):
        eval_pool("X", "ConvNet")


@pytest.mark.parametrize("name", ["ConvNetW" + "9" * 30, "ConvNetD" + "9" * 30])
def test_a_network_that_is_too_large_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"`model` {name}: expected ConvNet"):
        network_by_name(name, (1, 8, 8), 10)
