"""Test ConvNet against the same network built of `torch.nn`, which shares no code with it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from mtt_fast import ConvNet, InputError
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.convnet import Norm
from mtt_fast.testing import assert_close, module_function, reference_convnet

SHAPES = [
    pytest.param((3, 10, 32, 8, 3), id="cifar"),
    pytest.param((1, 10, 28, 4, 3), id="mnist-padding-3"),
    pytest.param((1, 7, 8, 5, 2), id="digits"),
    pytest.param((3, 4, 19, 3, 2), id="odd-size"),
    pytest.param((2, 3, 8, 6, 3), id="down-to-1x1"),
]


NORMS: list[Norm] = ["instance", "none"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_function_equals_the_module(shape: tuple[int, int, int, int, int], norm: Norm) -> None:
    net = ConvNet(*shape, norm)
    module = reference_convnet(*shape, norm)
    theta = torch.randn(net.num_parameters, dtype=torch.float64)
    images = torch.randn(5, shape[0], shape[2], shape[2], dtype=torch.float64)
    parameters = dict(module.named_parameters())
    assert net.layout.names == tuple(parameters)
    assert net.layout.shapes == tuple(parameter.shape for parameter in parameters.values())
    assert_close("logits", net(theta, images), module_function(module)(theta, images), 1e-12)
    torch.nn.utils.vector_to_parameters(theta, module.parameters())
    features = module.get_submodule("features")(images).flatten(1)
    assert_close("embedding", net.embed(theta, images), features, 1e-12)


def test_images_may_be_rectangular() -> None:
    net = ConvNet(image_size=(16, 24), width=4, depth=2, num_classes=3)
    logits = net(net.init(), torch.randn(2, 3, 16, 24))
    assert logits.shape == (2, 3)
    assert net.feature_size == (4, 6)


@pytest.mark.parametrize(
    ("net", "parameters"),
    [
        (ConvNet(3, 10, 32), 320_010),
        (ConvNet(3, 100, 32), 504_420),
        (ConvNet(3, 200, 64, depth=4), 857_160),
        (ConvNet(3, 10, 128, depth=5), 615_690),
        (ConvNet(3, 1000, 64, depth=4), 2_496_360),
    ],
)
def test_parameter_counts_are_those_of_the_public_code(net: ConvNet, parameters: int) -> None:
    assert net.num_parameters == parameters


def test_names_without_a_norm_are_those_of_the_public_code() -> None:
    """Check the names of the public code's module, which counts convolution, ReLU and pool: three layers a block."""
    names = ConvNet(depth=2, width=4, norm="none").layout.names
    assert names[:4] == ("features.0.weight", "features.0.bias", "features.3.weight", "features.3.bias")
    assert names[4:] == ("classifier.weight", "classifier.bias")


@pytest.mark.parametrize("norm", NORMS)
def test_a_seed_gives_the_parameters_that_modules_of_torch_have(norm: Norm) -> None:
    torch.manual_seed(3)
    module = reference_convnet(3, 10, 32, 8, 3, norm)
    theta = ConvNet(width=8, norm=norm).init(torch.Generator().manual_seed(3))
    assert torch.equal(theta, torch.nn.utils.parameters_to_vector(module.parameters()).to(theta))


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_both_orders_and_modes(norm: Norm) -> None:
    net = ConvNet(in_channels=2, num_classes=2, image_size=5, width=2, depth=2, norm=norm)
    theta = (net.init().double() + 0.1).requires_grad_()
    images = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (theta, images))
    assert torch.autograd.gradgradcheck(net, (theta, images))


def test_sizes_may_be_whole_numbers_of_numpy_and_lists() -> None:
    width, side = np.int64(8), np.int64(16)
    for size, same in ((side, 16), ([side, 16], (16, 16)), (torch.Size([16, 16]), (16, 16))):
        net, expected = ConvNet(width=width, image_size=size), ConvNet(width=8, image_size=same)  # type: ignore[arg-type]
        assert net == expected
        assert hash(net) == hash(expected)
        assert json.dumps(net.describe()) == json.dumps(expected.describe())


def test_errors_name_the_cause() -> None:
    with pytest.raises(InputError, match=r"depth 4.*leave nothing"):
        ConvNet(image_size=8, depth=4)
    with pytest.raises(InputError, match=r"width: expected a whole number, found 8\.0"):
        ConvNet(width=8.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="width: expected at least 1, found 0"):
        ConvNet(width=0)
    for size in ("8", "88", 8.0, None, (8, 8, 8), (8, "8")):
        with pytest.raises(InputError, match="image_size: expected a side, or height and width, found"):
            ConvNet(image_size=size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="image_size: expected at least 1, found 0"):
        ConvNet(in_channels=1, image_size=0, depth=1)
    with pytest.raises(InputError, match="norm: expected instance or none, found batch"):
        ConvNet(norm="batch")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a flat vector of shape"):
        ConvNet(width=4)(torch.zeros(7), torch.zeros(1, 3, 32, 32))


def test_names_of_the_public_code_are_read() -> None:
    assert network_by_name("ConvNet", (3, 32, 32), 10) == ConvNet(3, 10, 32)
    assert network_by_name("ConvNetD4", (3, 64, 64), 200) == ConvNet(3, 200, 64, depth=4)
    assert network_by_name("ConvNetD2W64", (1, 8, 8), 10) == ConvNet(1, 10, 8, width=64, depth=2)
    assert network_by_name("ConvNetNN", (3, 32, 32), 10) == ConvNet(3, 10, 32, norm="none")
    assert network_by_name("ConvNetIN", (3, 32, 32), 10) == ConvNet(3, 10, 32)
    assert network_by_name("ConvNetD3W32NN", (1, 28, 28), 10) == ConvNet(1, 10, 28, width=32, norm="none")
    for name in ("ResNet99", "ConvNetXN", "ConvNetNND3"):
        with pytest.raises(InputError, match=f"`model` {name}"):
            network_by_name(name, (3, 32, 32), 10)


def test_a_record_from_before_there_was_a_norm_is_of_the_instance_norm() -> None:
    net = ConvNet(width=4)
    record = dataclasses.asdict(net)
    assert record.pop("norm") == "instance"
    assert ConvNet(**record) == net
