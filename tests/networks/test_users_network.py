"""Test networks of the user's own: how they are made and drawn, and how another version of their code is known."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtt_fast import InputError
from mtt_fast.networks.by_name import full_name, network_by_name
from mtt_fast.networks.pools import eval_pool
from mtt_fast.networks.users_network import UsersNetwork, is_same_function

SHAPE, CLASSES = (3, 8, 6), 5
NETS = """
import random
import numpy
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channel, num_classes, im_size):
        super().__init__()
        height, width = im_size
        self.features = nn.Linear(channel * height * width, 7)
        self.classifier = nn.Linear(7, num_classes)
        nn.init.normal_(self.classifier.weight)
        self.register_buffer("shift", torch.randn(7))

    def forward(self, images):
        return self.classifier(torch.tanh(self.features(images.flatten(1)) + self.shift))

class Centred(Net):
    def forward(self, images):
        outputs = super().forward(images)
        return outputs - outputs.mean(0)

class Normed(nn.Sequential):
    def __init__(self, channel, num_classes):
        super().__init__(nn.Conv2d(channel, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

class Tuple(Net):
    def forward(self, images):
        return super().forward(images), 0

class Fails(Net):
    def forward(self, images):
        raise RuntimeError("no images today")

def any_names(**arguments):
    assert arguments == {"num_classes": 5}
    return Net(3, 5, (8, 6))

def few_classes(channel, im_size):
    return Net(channel, 4, im_size)

def double(channel, num_classes, im_size):
    return Net(channel, num_classes, im_size).double()

def noisy(channel, num_classes, im_size):
    return nn.Sequential(Net(channel, num_classes, im_size), nn.Dropout(0.5))

class Weakly(nn.Module):
    def __init__(self, channel, num_classes):
        super().__init__()
        self.features = nn.Conv2d(channel, 4, 3)
        self.classifier = nn.Linear(4, num_classes)

    def forward(self, images):
        features = torch.relu(self.features(images))
        return self.classifier(torch.relu(features - 0.5 * features.mean(0)).mean((2, 3)))

class HeadFirst(nn.Module):
    def __init__(self, channel, num_classes):
        super().__init__()
        self.classifier = nn.Linear(144, num_classes)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(144, 144), nn.Tanh())

    def forward(self, images):
        return self.classifier(self.body(images))

class ByNumpy(Net):
    def __init__(self, channel, num_classes, im_size):
        super().__init__(channel, num_classes, im_size)
        self.classifier.bias.data += numpy.random.rand()

class ShiftByRandom(Net):
    def __init__(self, channel, num_classes, im_size):
        super().__init__(channel, num_classes, im_size)
        self.shift += random.random()

class Noise(Net):
    def forward(self, images):
        return super().forward(images) + torch.randn(1)

def seeded(channel, num_classes, im_size):
    torch.manual_seed(0)
    return Net(channel, num_classes, im_size)

class Outer:
    Inner = Net

instance = nn.ReLU()

def partly_half(channel, num_classes, im_size):
    network = Net(channel, num_classes, im_size)
    network.classifier.half()
    return network

def unknown_name(number_of_classes):
    pass

def no_module(num_classes):
    return num_classes

number = 3
"""


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path / "nets.py"


def made(name: str = "Net") -> UsersNetwork:
    network = network_by_name(f"nets.py:{name}", SHAPE, CLASSES)
    assert isinstance(network, UsersNetwork)
    return network


def parameters_of_seed(seed: int) -> Tensor:
    """Return the parameters of the user's class after `torch.manual_seed`."""
    namespace: dict[str, Any] = {"__name__": "nets"}
    exec(compile(NETS, "nets", "exec"), namespace)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(namespace["Net"](3, 5, (8, 6)).parameters()).detach()


def test_it_is_the_module_that_the_class_makes() -> None:
    network = made()
    assert network.num_parameters == 7 * 145 + 5 * 8
    images, theta = torch.randn(4, *SHAPE), network.init(torch.Generator().manual_seed(1))
    hidden = images.flatten(1) @ theta[: 7 * 144].view(7, 144).T + theta[7 * 144 : 7 * 145]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of what is drawn besides parameters
        nn.Linear(144, 7), nn.init.normal_(nn.Linear(7, 5).weight)
        shift = torch.randn(7)
    weight, bias = theta[7 * 145 :].split([35, 5])
    torch.testing.assert_close(network(theta, images), torch.tanh(hidden + shift) @ weight.view(5, 7).T + bias)


def test_a_module_that_begins_always_the_same_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for name, warned in (("Net", False), ("seeded", True)):
        made(name)
        assert (f"nets.py:{name}: every module begins with the same parameters" in caplog.text) == warned


def test_parameters_are_drawn_as_the_class_draws_them() -> None:
    before = torch.get_rng_state()
    seed = int(torch.randint(1 << 62, (), generator=torch.Generator().manual_seed(3)))
    assert torch.equal(made().init(torch.Generator().manual_seed(3)), parameters_of_seed(seed))
    assert not torch.equal(made().init(torch.Generator().manual_seed(4)), parameters_of_seed(seed))
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_may_be_drawn_in_several_threads() -> None:
    network = made()
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda seed: network.init(torch.Generator().manual_seed(seed)), [1, 2] * 50))
    assert all(torch.equal(theta, drawn[place % 2]) for place, theta in enumerate(drawn))


@pytest.mark.parametrize(("name", "mixes"), [("Net", False), ("Centred", True), ("Normed", True)])
def test_it_knows_whether_samples_are_mixed(name: str, mixes: bool) -> None:
    assert made(name).mixes_samples == mixes


def test_a_weak_mixing_is_found_in_larger_images() -> None:
    network = network_by_name("nets.py:Weakly", (3, 64, 64), CLASSES)
    assert network.mixes_samples


def test_features_are_the_inputs_of_the_linear_layer_that_is_called_last() -> None:
    network, images = made("HeadFirst"), torch.randn(4, *SHAPE)
    theta = network.init(torch.Generator())
    weight, bias = theta[: 5 * 144].view(5, 144), theta[5 * 144 : 5 * 145]
    torch.testing.assert_close(network.embed(theta, images) @ weight.T + bias, network(theta, images))


def test_it_is_made_once() -> None:
    assert made() is made()


def test_a_name_may_be_an_attribute() -> None:
    assert made("Outer.Inner").describe()["outputs"] == made().describe()["outputs"]


@pytest.mark.parametrize("name", ["ConvNet", "ConvNetD2", "ResNet18"])
def test_a_known_name_is_told_from_the_network_of_this_package(file: Path, name: str) -> None:
    file.write_text(f"{NETS}\n{name} = Net\n")
    assert full_name(made(name).describe()) == f"your own {name}"


def test_arguments_are_those_that_the_function_takes() -> None:
    assert made("any_names").num_parameters == made().num_parameters
    assert eval_pool("S", "nets.py:NormedBN") == ("nets.py:NormedBN",)


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("class Centred", "# a remark\nclass Centred", True),
        ("torch.tanh", "torch.sin", False),
        ("torch.randn(7)", "torch.rand(7)", False),
        ("normal_(self.classifier.weight)", "normal_(self.classifier.weight, std=2)", True),
    ],
    ids=["a remark", "another function", "another buffer", "another start"],
)
def test_another_version_of_the_code_is_known_by_its_outputs(file: Path, before: str, after: str, same: bool) -> None:
    first = made().describe()
    file.write_text(NETS.replace(before, after))
    second = made().describe()
    assert first["kind"] == second["kind"] == "Net"
    assert is_same_function(first, second) == same
    assert is_same_function(first, {"kind": "Net"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Tuple", "nets.py:Tuple: expected the module to return logits, found tuple"),
        ("Fails", r"nets.py:Fails: RuntimeError: no images today \(.*nets.py, line \d+\)"),
        ("few_classes", r"expected logits \(8, 5\) of images \(8, 3, 8, 6\) in 5 classes, found \(8, 4\)"),
        ("double", "expected parameters in torch.float32 on the CPU, found features.weight in torch.float64"),
        ("partly_half", "found classifier.weight in torch.float16 on cpu; leave out"),
        (
            "ByNumpy",
            "expected the same module from the same seed of torch, found another at the second call; draw all numbers by torch",
        ),
        ("ShiftByRandom", "expected the same module from the same seed of torch"),
        ("Noise", "expected the same outputs for the same arguments, found others at the second call"),
        ("noisy", "nets.py:noisy: layer 1 draws random numbers in training mode"),
        (
            "unknown_name",
            "missing a required argument: 'number_of_classes'; it is called with those of channel, num_classes, im_size",
        ),
        ("no_module", "nets.py:no_module: expected a torch.nn.Module, found int"),
        ("number", "expected a function or a class that makes the network, found an object of int"),
        ("instance", "expected a function or a class that makes the network, found an object of ReLU"),
        ("missing", "expected a function or a class that makes the network, found nothing of this name"),
    ],
)
def test_what_is_no_network_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(name)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"`models` none\.py:Net: expected a Python file none\.py, found none"):
        network_by_name("none.py:Net", SHAPE, CLASSES, option="models")
