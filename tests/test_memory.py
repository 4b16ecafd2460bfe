"""Peak memory, measured from outside in processes of their own: it must not grow with N, and must obey the budget."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mtt_fast import ConvNet, FlatModule, InputError
from mtt_fast.memory import microbatch_for, parse_bytes
from mtt_fast.student import GenericStudent, forward_bytes

MIB = 2**20

PROGRAM = """
import sys
import torch
from mtt_fast import ConvNet, matching_loss, unroll

torch.set_num_threads(2)
steps, batch, budget = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
net = ConvNet(image_size=32, width=64)
start = net.init(torch.Generator().manual_seed(0))
target = start + 0.01
images = torch.randn(batch, 3, 32, 32, requires_grad=True)
lr = torch.tensor(0.01, requires_grad=True)

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def run(count, batches, **options):
    labels = torch.arange(count) % 10
    path = unroll(net, start, images[:count], labels, lr, batches, **options)
    matching_loss(path[-1], start, target).backward()

run(1, torch.zeros(2, 1, dtype=torch.long))  # libraries and thread pools are loaded
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak()
options = {} if budget == "none" else {"memory_budget": budget}
run(batch, torch.arange(batch).expand(steps, batch), **options)
print(peak() - before)
"""

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")


def peak_bytes(steps: int, batch: int, budget: str = "none", **environment: str) -> int:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(steps), str(batch), budget]
    found = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=200, env=os.environ | environment
    )
    return int(found.stdout)


@needs_proc
def test_peak_grows_with_the_steps_by_the_parameters_alone() -> None:
    # every freed block of 64 KiB goes back at once, so that the peak is what lives, not what the allocator keeps
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    few, many = peak_bytes(5, 8, **exact), peak_bytes(40, 8, **exact)
    parameters = 4 * ConvNet(image_size=32, width=64).num_parameters
    assert many - few <= 1.1 * 35 * parameters


@needs_proc
@pytest.mark.parametrize(("budget", "native"), [("30MiB", "1"), ("40MiB", "1"), ("80MiB", "0"), ("160MiB", "0")])
def test_the_budget_holds(budget: str, native: str) -> None:
    environment = {"MTT_FAST_NATIVE": native}
    assert peak_bytes(3, 40, budget, **environment) <= parse_bytes(budget) < peak_bytes(3, 40, **environment)


def test_the_largest_micro_batch_that_fits() -> None:
    net, images = ConvNet(width=16), torch.zeros(50, 3, 32, 32)

    def size(budget: int | str) -> int | None:
        return microbatch_for(net, GenericStudent(net), budget, torch.float32, images, batch=50, steps=5)

    assert size("10GiB") is None
    smaller, larger = size("40MiB"), size("60MiB")
    assert smaller is not None
    assert larger is not None
    assert 1 <= smaller < larger < 50
    with pytest.raises(InputError, match=r"expected at least .*MiB for 5 steps of 50 images; raise it"):
        size("1MiB")


def test_batch_statistics_need_the_whole_batch() -> None:
    net = FlatModule(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()))
    images = torch.zeros(50, 3, 32, 32)
    assert microbatch_for(net, GenericStudent(net), "1GiB", torch.float32, images, batch=50, steps=2) is None
    with pytest.raises(InputError, match="batch statistics: the batch cannot be cut"):
        microbatch_for(net, GenericStudent(net), "10MiB", torch.float32, images, batch=50, steps=2)


def test_forward_bytes_of_a_small_network() -> None:
    net = ConvNet(in_channels=1, num_classes=2, image_size=4, width=1, depth=1)
    # 8×8 from padding 3; conv, norm and ReLU put out 64 values each, the norm 2 statistics, the pool 16, the classifier 2
    assert forward_bytes(net, torch.Size((1, 4, 4)), torch.float64) == 8 * (3 * 64 + 2 + 16 + 2)


@pytest.mark.parametrize(
    ("text", "value"), [("6GiB", 6 * 2**30), ("1.5 MB", 1_500_000), ("7", 7), (123, 123), ("2kib", 2048)]
)
def test_amounts(text: int | str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "lots", "6 XB", "-3GiB", 0])
def test_amounts_that_are_none(text: int | str) -> None:
    with pytest.raises(InputError, match="memory budget"):
        parse_bytes(text)
